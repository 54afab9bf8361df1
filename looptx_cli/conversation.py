"""A chat on the terminal: lines in, answers out, for `looptx chat` and `looptx generate`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from looptx_cli.console import is_plain, note
from looptx_cli.streaming import print_now, stream
from looptx_core.documents import printable
from looptx_core.errors import LooptxError, UsageError

if TYPE_CHECKING:
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.generation.engine import Engine, Prompt
    from looptx_core.media.batch import MediaItem

HELP = {
    "/help": "these commands",
    "/system TEXT": "what the model is told before the chat; without a text: nothing",
    "/retry": "another answer to the last message",
    "/loops N": "the depth of each token; no number: each stops by the rule",
    "/new": "forget what was said",
    "/exit": "end the chat, as Ctrl-D does",
}
"""What can be typed in a chat beside messages."""


@dataclass
class Conversation:
    """What was said so far, before which the next message stands; a model that was not finetuned
    on chats goes on with the text.

    templated: whether the model was finetuned on chats. items: media of the first message.
    iterations: show each token's loops and confidence.
    """

    engine: Engine
    options: GenerationOptions
    templated: bool
    items: tuple[MediaItem, ...] = ()
    iterations: bool = False
    quiet: bool = False
    system: str = ""
    said: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_system(self.system)

    def run(self) -> None:
        """Read lines and answer them until the input ends, or until /exit."""
        interactive = sys.stdin.isatty()
        if interactive:
            _edit_lines()
        kind = (
            "A chat"
            if self.templated
            else "It continues the text, as it was not finetuned on chats"
        )
        note(f"{kind}; /help helps, Ctrl-D ends.", self.quiet)
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                print_now("\n" if interactive else "")
                return
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.take(line)
            except LooptxError as error:  # too long a line, a file that can't be read
                note(f"looptx: {printable(str(error))}")
            except KeyboardInterrupt:
                print_now("\n")
                note("looptx: interrupted; the chat goes on without this answer")

    def take(self, line: str) -> None:
        """Answer a message, or do what a command says.

        Raises `UsageError` for what can't be done; what was said stays as it was.
        """
        command, _, text = line.strip().partition(" ")
        if not re.fullmatch(r"/[a-z]+", command):
            if line:
                self._answer([*self.said, {"role": "user", "content": line}], self.options)
            return
        match command:
            case "/help":
                for name, meaning in HELP.items():
                    note(f"{name:<14}{meaning}")
            case "/system":
                self._check_system(text.strip())
                self.system = text.strip()
            case "/retry":
                self._retry()
            case "/loops":
                self.options = replace(self.options, loops=_depth(text.strip()))
            case "/new":
                self.said = []
            case _:
                raise UsageError(f"{command} is no command; /help shows them")

    def _retry(self) -> None:
        """Answer the last message again, with other random numbers."""
        if not self.said:
            raise UsageError("/retry: there is no answer yet")
        if self.options.temperature == 0:
            note("temperature 0 gives the same answer again; start with a higher --temperature")
        options = replace(self.options, seed=self.options.seed + 1)
        self._answer(self.said[:-1], options)
        self.options = options

    def _answer(self, said: list[dict[str, str]], options: GenerationOptions) -> None:
        said = self._that_fits(said)
        result = stream(self.engine, self._prompt(said), options, self.iterations, self.quiet)
        self.said = [*said, {"role": "assistant", "content": result.text}]

    def _prompt(self, said: list[dict[str, str]]) -> Prompt:
        from looptx_core.generation.engine import ChatPrompt, MediaPrompt

        if self.templated:
            told = [{"role": "system", "content": self.system}] if self.system else []
            return ChatPrompt((*told, *said), self.items)
        text = "".join(turn["content"] + "\n" * (turn["role"] == "assistant") for turn in said)
        if self.items:
            return MediaPrompt(text, self.items)
        ids = self.engine.tokenizer.encode(text, add_special_tokens=False).ids
        return ids[-self._room :]

    def _that_fits(self, said: list[dict[str, str]]) -> list[dict[str, str]]:
        """The newest turns, with room for the answer."""
        if self.templated:
            while len(said) >= 3 and self.engine.length(self._prompt(said)) > self._room:
                said = said[2:]
        return said

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have."""
        holds = self.engine.model.config.context_limit
        return sys.maxsize if holds is None else max(1, holds - self.options.max_new_tokens)

    def _check_system(self, text: str) -> None:
        if text and not self.templated:
            raise UsageError(
                "a model that was not finetuned on chats takes no system message; leave it out"
            )
        if text and self.items:
            raise UsageError("a system message does not go with pictures; leave one out")


def _depth(text: str) -> int | Literal["auto"]:
    if text in ("", "auto"):
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"/loops {text}: give a depth from 1 up, or none")
    return int(text)


def _edit_lines() -> None:
    """Arrow keys, a history of this chat, and Tab for the commands, where the terminal has them."""
    if is_plain(sys.stdout):
        return
    try:
        import readline
    except ImportError:  # Windows, whose terminal edits lines itself
        return

    def complete(text: str, number: int) -> str | None:
        names = [name.split()[0] for name in HELP]
        return next(iter([name for name in names if name.startswith(text)][number:]), None)

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")

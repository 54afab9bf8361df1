"""looptx chat: what is typed, what is answered, and what the model is given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looptx_cli.conversation import HELP, Conversation
from looptx_cli.main import main
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import DataError, UsageError
from looptx_core.generation.engine import ChatPrompt


@dataclass
class Parrot:
    """An engine that answers with the number of its answer, and remembers what it was given."""

    asked: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    loops: list[Any] = field(default_factory=list)
    most: int = 1000
    model: Any = None

    def __post_init__(self) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(max_loops=4, context_limit=1128))

    def complete(self, prompts: list[Any], options: GenerationOptions, watch: Callable) -> list:
        (prompt,) = prompts
        if self.length(prompt) > self.most:
            raise UsageError("too long")
        self.asked.append(prompt)
        self.seeds.append(options.seed)
        self.loops.append(options.loops)
        step = SimpleNamespace(text=f"answer {len(self.asked)}", loops=2, confidence=0.5)
        watch(step)
        return [SimpleNamespace(text=step.text, tokens=[step])]

    def length(self, prompt: ChatPrompt) -> int:
        return sum(len(message["content"]) for message in prompt.messages)

    @property
    def last(self) -> list[tuple[str, str]]:
        return [(m["role"], m["content"]) for m in self.asked[-1].messages]


@pytest.fixture
def talk() -> Conversation:
    return Conversation(Parrot(), GenerationOptions(), templated=True)  # type: ignore[arg-type]


def test_turns_follow_each_other(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.take("Hello")
    talk.take("More")
    assert talk.engine.last == [("user", "Hello"), ("assistant", "answer 1"), ("user", "More")]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"
    talk.take("/new")
    talk.take("/usr/bin is a folder")  # a path is no command
    assert talk.engine.last == [("user", "/usr/bin is a folder")]


def test_a_system_message_stands_first(talk: Conversation) -> None:
    talk.take("Hello")
    talk.take("/system Be brief.")
    talk.take("More")
    assert talk.engine.last[0] == ("system", "Be brief.") and len(talk.engine.last) == 4
    talk.take("/system")
    talk.take("Again")
    assert talk.engine.last[0] == ("user", "Hello")


def test_retry_asks_the_same_with_another_seed(talk: Conversation) -> None:
    with pytest.raises(UsageError, match="no answer yet"):
        talk.take("/retry")
    talk.take("Hello")
    talk.take("/retry")
    talk.take("/retry")
    assert talk.engine.last == [("user", "Hello")] and talk.engine.seeds == [0, 1, 2]
    talk.take("More")
    assert talk.engine.last[1] == ("assistant", "answer 3")


def test_the_oldest_turns_give_way_and_the_system_message_stays(talk: Conversation) -> None:
    talk.take("/system " + "s" * 400)
    for number in range(6):
        talk.take(f"{number}" * 200)
    assert talk.engine.last[0] == ("system", "s" * 400) and talk.engine.last[-1][1] == "5" * 200
    assert talk.engine.length(talk.engine.asked[-1]) <= 1000 and len(talk.engine.asked) == 6


def test_what_is_refused_changes_nothing(talk: Conversation) -> None:
    talk.take("Hello")
    before = list(talk.said)
    for line in ("x" * 2000, "/nope", "/loops deep", "/loops 0"):
        with pytest.raises(UsageError):
            talk.take(line)
    assert talk.said == before and talk.options == GenerationOptions()
    talk.take("/loops 3")
    talk.take("More")
    talk.take("/loops")
    talk.take("More")
    assert talk.engine.loops == ["auto", 3, "auto"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("cat.png: not a picture"), "looptx: cat.png: not a picture\n"),
        (KeyboardInterrupt(), "looptx: interrupted; the chat goes on without this answer\n"),
    ],
)
def test_a_turn_that_fails_is_one_line_and_the_chat_goes_on(
    talk: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    said: str,
) -> None:
    talk.quiet = True
    lines = iter(["Hello", "Fail", "More"])
    answer = talk.engine.complete

    def complete(prompts: list[Any], *how: Any) -> list:
        if prompts[0].messages[-1]["content"] == "Fail":
            raise error
        return answer(prompts, *how)

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(talk.engine, "complete", complete)
    monkeypatch.setattr("builtins.input", typed)
    talk.run()
    assert capsys.readouterr().err == said
    assert [turn["content"] for turn in talk.said] == ["Hello", "answer 1", "More", "answer 2"]


def test_help_names_each_command(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.take("/help")
    out, err = capsys.readouterr()
    assert out == "" and all(name in err for name in HELP) and len(err.splitlines()) == len(HELP)
    for name in HELP:
        if name != "/exit":  # known, each of them
            try:
                talk.take(name.split()[0])
            except UsageError as error:
                assert "no command" not in str(error)


def test_a_model_without_chats_takes_no_system_message() -> None:
    with pytest.raises(UsageError, match="not finetuned on chats"):
        Conversation(Parrot(), GenerationOptions(), templated=False, system="x")  # type: ignore[arg-type]


def test_lines_from_a_pipe(tiny: Path) -> None:
    """Without a terminal there is no prompt, no colours and no line editing."""
    command = [sys.executable, "-m", "looptx_cli.main", "chat", "--model", str(tiny)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "3", "--ignore-eos", "--show-iterations", "--quiet"],
        input="map\n/nope\nmap\n/exit\nmap\n", capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "looptx: /nope is no command; /help shows them\n"
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(len(line.split()) >= 3 for line in lines)
    assert "\x1b" not in done.stdout and "> " not in done.stdout


def test_a_terminal_has_line_editing(tiny: Path) -> None:
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "looptx_cli.main", "chat", "--model", str(tiny), "--quiet"]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        command, stdin=other_end, stdout=other_end, stderr=subprocess.PIPE, env=environment
    )
    os.close(other_end)
    # The arrow goes back before the last letter, so that /exit is what is read.
    os.write(main_end, b"/ext\x1b[Di\n")
    try:
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert process.stderr is not None and process.stderr.read() == b""
    os.close(main_end)


def test_system_and_pictures_contradict(cat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--image", str(cat), "--system", "Be brief.", "--quiet"]) == 2
    assert "system message" in capsys.readouterr().err

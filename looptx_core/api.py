"""The front door: `load` a model as the command line does, then generate, chat and evaluate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_core.checkpoint.registry import resolve_adapter, resolve_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import UsageError

if TYPE_CHECKING:
    from looptx_core.checkpoint.folder import LoadedModel
    from looptx_core.generation.engine import Engine
    from looptx_core.generation.request import Generation, Prompt, Step
    from looptx_core.generation.transcribe import Segment
    from looptx_core.generation.watch import VideoSession
    from looptx_core.media.base import Source
    from looptx_core.training.evaluate import LoopEvaluation

Report = Callable[[str], object]
_log = logging.getLogger(__name__)


def load(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    attention: str = "auto",
    precision: str = "float32",
    kernel: str = "auto",
    batch_size: int = 32,
    abilities: frozenset[str] = frozenset(),
    report: Report = lambda line: None,
) -> Model:
    """A model that is ready to generate, with everything chosen as `looptx generate` chooses it.

    model: a run or a model folder; None: the newest finished run under ./runs that has the
    `abilities`, else the bundled model. adapter: an adapter's run or folder, on its own base or on
    `model`. attention, precision, kernel: see `choose_backend` and `select_backend`. batch_size:
    the most prompts that run at once. report: called with a line for each choice that most users
    want to know; `Model.choices` has all of them.

    Raises:
        DataError: there is no such model, or it is damaged.
        MissingError: what was asked for can't be had on this machine.
        UsageError: an unknown name.
    """
    from looptx_core.backends.cpu.source import KERNEL
    from looptx_core.machine.kernels import build_ahead

    choices: list[str] = []

    def choose(line: str) -> None:
        choices.append(line)
        report(line)

    found = resolve_adapter(adapter, model) if adapter else resolve_model(model, need=abilities)
    if model is None:
        choose(f"model: {found.folder}, {found.reason}")
    # Compiled while torch is imported, so this can't yet ask torch whether there is a GPU.
    on_cpu = not Path("/dev/nvidiactl").exists()
    if on_cpu and kernel in ("auto", "native") and build_ahead(*KERNEL):
        choose("decoding: its kernel is compiled, once on this machine, some seconds")

    import torch

    from looptx_core.finetuning.load import load_resolved
    from looptx_core.generation.engine import Engine
    from looptx_core.machine.device import best_device
    from looptx_core.model.attention import choose_backend

    device = best_device()
    # On a CPU the kernel rounds the weights itself; elsewhere the model is loaded in that type.
    rounded = device.type == "cpu" and kernel != "torch"
    dtype = torch.bfloat16 if precision == "bf16" and not rounded else torch.float32
    loaded = load_resolved(found, device=device, dtype=dtype)
    chosen = choose_backend(attention, device, dtype)
    choices.append(f"attention: {chosen.name}, {chosen.reason}")
    _log.info(choices[-1])
    loaded.model.attend = chosen.attend
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        loaded.exit,
        ends=loaded.special.ends,
        chat_template=loaded.chat,
        name=loaded.name,
        batch_size=batch_size,
        kernel=kernel,
        precision="float32" if dtype == torch.bfloat16 else precision,
    )
    choose(f"decoding: {engine.kernel}")
    return Model(loaded, engine, tuple(choices))


@dataclass(frozen=True)
class Model:
    """A loaded model. The methods' `options` are the fields of `GenerationOptions`.

    engine: for what these methods don't offer. choices: a line for each choice, with its reason.
    """

    loaded: LoadedModel
    engine: Engine
    choices: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether it was finetuned on chats: whether it has a chat template."""
        return self.loaded.chat_template is not None

    def generate(self, prompt: Prompt | None = None, **options: Any) -> Generation:
        """Continue a prompt: its text, and a record of every token.

        prompt: a text, token ids, or a text with media (`MediaPrompt`); None: an empty text.
        Raises `UsageError` for settings out of range.
        """
        return self.generate_all(["" if prompt is None else prompt], **options)[0]

    def generate_all(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """Continue several prompts together, as a batch."""
        return self.engine.complete(prompts, _options(options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Step]:
        """Continue a prompt, a token at a time; a `Step` has `text`, `loops`, `confidence`, ..."""
        return self.engine.generate([prompt], _options(options))

    def transcribe(self, recording: Source, **options: Any) -> list[Segment]:
        """What is said in a recording of any length, a file or its bytes, with times in seconds.

        Raises `DataError` for a recording that can't be read, `UsageError` for a model that can't
        hear.
        """
        from looptx_core.generation.transcribe import transcribe

        return list(transcribe(self.engine, recording, _options(options)))

    def watch(self, rate: float = 12.5, before: str = "", **options: Any) -> VideoSession:
        """A clip that goes on: `feed` it frames as they come, and `ask` at any time.

        rate: frames a second that the model looks at. before: text in front of the clip. Raises
        `UsageError` for a model that reads no clips.
        """
        from looptx_core.generation.watch import VideoSession

        return VideoSession(self.engine, rate, before=before, options=_options(options))

    def chat(self, messages: str | Sequence[Mapping[str, str]], **options: Any) -> Generation:
        """Answer a message, or a conversation of `{"role": …, "content": …}`.

        Raises `UsageError` where the model was not finetuned on chats.
        """
        from looptx_core.generation.request import ChatPrompt

        if not self.is_chat:
            raise UsageError(
                f"{self.loaded.name} was not finetuned on chats; finetune it on messages, or use "
                "generate"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(ChatPrompt(tuple(messages)), **options)

    def evaluate(self, texts: str | Sequence[str], loops: int | None = None) -> LoopEvaluation:
        """Loss, accuracy and confidence after each of the loops 1 to `loops`, on given texts.

        Each text is cut to the model's context. loops: by default the model's `max_loops`. Raises
        `UsageError` for texts of less than two tokens.
        """
        import torch

        from looptx_core.training.evaluate import evaluate_loops

        if loops is not None and loops < 1:
            raise UsageError(f"`loops` {loops}: at least 1")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        most = model.config.max_seq_len + 1
        found: LoopEvaluation | None = None
        for text in [texts] if isinstance(texts, str) else texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids[:most]
            if len(ids) < 2:
                raise UsageError(f"{text[:40]!r}: a text of two tokens at least has a loss")
            part = evaluate_loops(model, torch.tensor([ids]), loops or model.config.max_loops)
            found = part if found is None else found + part
        if found is None:
            raise UsageError("no texts to evaluate on")
        return found


def _options(given: Mapping[str, Any]) -> GenerationOptions:
    """Raises `UsageError` for an unknown name."""
    known = GenerationOptions.__dataclass_fields__
    if unknown := given.keys() - known.keys():
        raise UsageError(f"{sorted(unknown)[0]}: not one of {', '.join(sorted(known))}")
    return replace(GenerationOptions(), **given)

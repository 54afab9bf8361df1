"""A folder that onnxruntime and onnxruntime-genai open.

    model.onnx              see `onnx_graph`; weights over 1 GB stand in model.onnx.data beside it
    genai_config.json       how onnxruntime-genai feeds it
    config.json             the shape; `loops` is the depth of the graph
    tokenizer.json          and the other files of a model folder

What is written is run before it is kept: onnxruntime's logits have to be the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.atomic import write_folder
from looptx_core.checkpoint.folder import LoadedModel, write_files
from looptx_core.config.model import ModelConfig
from looptx_core.conversion.huggingface import with_use
from looptx_core.conversion.source_check import MOST_DIFFERENCE
from looptx_core.data.sample import sample_text
from looptx_core.errors import LooptxError, MissingError, UsageError
from looptx_core.media.registry import media_for
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import inputs_and_targets
from looptx_core.words import counted

FILE = "model.onnx"
MODEL_TYPE = "looptx-onnx"
APART = 1 << 30
"""Bytes of weights beyond which they get a file of their own: a graph must stay below 2 GB."""
_INSTALL = "pip install 'looptx[onnx]'"
_STEPS = 3  # tokens that the check reads one by one
_USE = """```python
import onnxruntime_genai as og

model = og.Model(FOLDER)
tokenizer, options = og.Tokenizer(model), og.GeneratorParams(model)
options.set_search_options(max_length=60)
generator = og.Generator(model, options)
generator.append_tokens(tokenizer.encode("Call me"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

Every token runs {loops}."""


@dataclass(frozen=True)
class Written:
    """What onnxruntime made of a graph."""

    logit_difference: float
    """From the model's, relative to the largest."""
    loss: float
    """Held-out, nats a token."""
    bits_per_weight: float
    """Stored bits of a weight in the blocks' linear layers, scales included."""
    memory: int
    """Bytes of the weights."""


def require_onnx() -> None:
    """Raise `MissingError` where a package is not installed or can't be imported."""
    try:
        import_module("onnx")
        import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise MissingError(f"`to_onnx` needs the package {error.name}; {_INSTALL}") from error
    except ImportError as error:  # such as a library that it was built for and is not here
        reason = " ".join(str(error).split())[:300]
        raise MissingError(
            "`to_onnx` needs onnx and onnxruntime, which can't be imported here "
            f"({reason}); {_INSTALL}"
        ) from error


def graph_depth(source: LoadedModel, loops: int | None) -> int:
    """The loops of the graph, by default the depth of a plain call.

    Raises `UsageError` for a depth that the model has not, and for a model that a graph of plain
    attention over text can't express.
    """
    config = source.config
    if lacking := _lacking(config):
        mend = "give another model by `model`"
        if config.linear in ("ternary", "packed"):
            mend = "take the one it was made from, and `dtype` int8 to make it small"
        raise UsageError(f"{source.folder}: {lacking}; {mend}")
    if loops is not None and loops > config.max_loops:
        raise UsageError(f"`loops` {loops}: {source.folder} runs at most {config.max_loops}")
    return loops or config.loops


def _lacking(config: ModelConfig) -> str:
    """What the graph has no place for; '' where it can express the model."""
    has = ""
    if media := media_for(config):
        plural = " and ".join(medium.plural for medium in media)
        return f"an ONNX graph has no encoder of {plural}, which this model reads"
    if config.has_memory:
        has = "place for a memory"
    elif config.injection == "streams":
        has = "streams between loops"
    elif config.linear in ("ternary", "packed"):
        has = "ternary weights"
    return has and f"an ONNX graph has no {has}, which this model has"


def onnx_files(files: Mapping[str, Any], source: LoadedModel, loops: int) -> dict[str, Any]:
    """The files of a model folder, as `model_files` gives them, for a graph of `loops` loops."""
    config = source.config
    special = source.special.ids(source.tokenizer)
    decoder = {
        "filename": FILE,
        "session_options": {"provider_options": []},
        "hidden_size": config.d_model,
        "head_size": config.head_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "num_hidden_layers": config.effective_layers(loops),  # pairs of keys and values
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    genai = {
        "model": {
            "type": "decoder",
            **{name: ids for name, ids in special.items() if ids is not None},
            "vocab_size": config.vocab_size,
            "context_length": config.max_seq_len,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_seq_len,
            "past_present_share_buffer": False,
        },
    }
    return {
        **files,
        "config.json": {**files["config.json"], "model_type": MODEL_TYPE},
        "genai_config.json": genai,
        "README.md": with_use(
            files["README.md"], _USE.format(loops=counted(loops, "loop")), "onnx"
        ),
    }


def write_onnx(
    out: Path,
    model: LoopedTransformer,
    loops: int,
    files: Callable[[Written], Mapping[str, Any]],
    *,
    int8: bool,
    tokens: Tensor,
    held_out: Iterable[Mapping[str, Tensor]],
) -> Written:
    """Write the folder, whole or not at all.

    model: in float32. files: what else stands in the folder, once the graph is measured. int8: let
    onnxruntime quantise it. tokens: (rows, length), to compare with the model; held_out: batches
    for the loss.

    Raises:
        LooptxError: onnxruntime does not open the graph, or its logits are not the model's. Those
            of an int8 graph may differ.
    """
    found: list[Written] = []

    def write(place: Path) -> None:
        file = place / FILE
        stored = _write_graph(file, model, loops, int8)
        session = Session(file, model, loops)
        difference = logit_difference(session, model, loops, tokens)
        if not int8 and not difference <= MOST_DIFFERENCE:
            raise LooptxError(
                f"onnxruntime's logits differ by {difference:.1e} of the largest, and "
                f"{MOST_DIFFERENCE:.0e} is the limit; try another version of onnxruntime"
            )
        found.append(Written(difference, mean_loss(session, held_out), *stored))
        write_files(place, files(found[0]))

    write_folder(out, write)
    return found[0]


def _write_graph(file: Path, model: LoopedTransformer, loops: int, int8: bool) -> tuple[float, int]:
    """The bits of a weight in the blocks, and the bytes of all weights."""
    from looptx_core.conversion.onnx_graph import build_graph, save_graph, stored_sizes

    graph = build_graph(model, loops, shared_table=not int8)
    bits, size = stored_sizes(graph)
    if not int8:
        save_graph(graph, file, apart=size > APART)
        return bits, size
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = file.with_name("float32.onnx")
    save_graph(graph, whole, apart=size > APART)
    with _quiet():
        quantize_dynamic(
            whole, file, per_channel=True, weight_type=QuantType.QInt8,
            use_external_data_format=size > APART,
        )  # fmt: skip
    for left in file.parent.glob(whole.name + "*"):
        left.unlink()
    return stored_sizes(file)


class Session:
    """A written graph in onnxruntime, called as the model is: tokens -> logits."""

    def __init__(self, file: Path, model: LoopedTransformer, loops: int) -> None:
        import onnxruntime

        from looptx_core.conversion.onnx_graph import cache_names

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own classes, which have no common base but this
            reason = " ".join(str(error).split())[:300]
            raise LooptxError(
                f"onnxruntime {onnxruntime.__version__} does not open the graph: {reason}; "
                "pip install --upgrade onnxruntime"
            ) from error
        self.config = model.config
        self.cache = cache_names(model.config.effective_layers(loops), "past_key_values")

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, length) -> (rows, length, vocab_size)."""
        return self.run(tokens, torch.ones_like(tokens), ())[0]

    def run(
        self, tokens: Tensor, mask: Tensor, past: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The logits of new tokens (rows, new), and the cache with them.

        mask: (rows, seen + new), 0 for padding on the left. past: of the call before; empty at the
        first.
        """
        rows, new = tokens.shape
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        empty = torch.zeros(rows, self.config.n_kv_heads, 0, self.config.head_dim).numpy()
        feed = {
            "input_ids": tokens.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
            **dict(zip(self.cache, past or [empty] * len(self.cache))),
        }
        logits, *present = self.session.run(None, feed)
        return torch.from_numpy(logits), tuple(present)


@torch.no_grad()
def logit_difference(
    session: Session, model: LoopedTransformer, loops: int, tokens: Tensor
) -> float:
    """max |onnxruntime's - the model's| / max |the model's|.

    tokens: (rows, length). The graph reads them as a batch that is padded on the left, and the last
    tokens one by one; the model reads each row by itself, in one pass.
    """
    rows, length = tokens.shape
    steps = min(_STEPS, length - 1)
    pads = [min(row * length // 8, length - steps - 1) for row in range(rows)]
    mask = torch.stack([(torch.arange(length) >= pad).long() for pad in pads])
    parts, past, seen = [], (), 0
    for new in (length - steps, *[1] * steps):
        here = slice(seen, seen + new)
        logits, past = session.run(tokens[:, here], mask[:, : here.stop], past)
        parts.append(logits)
        seen = here.stop
    theirs = torch.cat(parts, 1)
    gap = size = torch.zeros(())
    for row, pad in enumerate(pads):
        ours = model(tokens[row : row + 1, pad:], loops).logits[0]
        gap = torch.maximum(gap, (theirs[row, pad:] - ours).abs().max())
        size = torch.maximum(size, ours.abs().max())
    return float(gap / size)


def mean_loss(session: Session, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Nats a token, on batches as `evaluate_batch` takes them."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch in batches:
        inputs, targets = inputs_and_targets(batch["tokens"], batch.get("targets"))
        counted = batch["weights"] > 0 if "weights" in batch else torch.ones_like(targets).bool()
        for here in _texts(inputs, batch.get("documents")):
            losses = F.cross_entropy(
                session(inputs[here]).flatten(0, 1), targets[here].flatten(), reduction="none"
            )
            total += losses[counted[here].flatten()].double().sum()
        count += int(counted.sum())
    return float(total / count)


def _texts(inputs: Tensor, documents: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that are read by themselves: all, or each document of each row."""
    if documents is None:
        yield slice(None), slice(None)
        return
    for row, numbers in enumerate(documents):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        ends = list(accumulate(lengths))
        for length, end in zip(lengths, ends):
            yield slice(row, row + 1), slice(end - length, end)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that onnxruntime's quantiser logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def check_text(source: LoadedModel) -> Tensor:
    """Rows of text to compare on, (rows, length)."""
    return sample_text(source.tokenizer, min(48, source.config.max_seq_len))

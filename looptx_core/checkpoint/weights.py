"""A model folder's weights, from the files into a model.

Safetensors only: a pickle is refused, since reading one can run its code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from looptx_core.checkpoint.header import Stored, read_header, total_elements
from looptx_core.config.model import ModelConfig
from looptx_core.documents import open_input, read_json, short, some
from looptx_core.errors import DataError
from looptx_core.media.registry import media_for
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.vocabulary import tie_head
from looptx_core.schema import typed

_PROBED = 64  # values of each tensor in a fingerprint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_weights(
    model: LoopedTransformer,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str | None] = lambda name: name,
    called: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Give a model, which may be on the meta device, the weights of a folder.

    rename: from the folder's names to the model's; None leaves a tensor out. called: the folder's
    names by the model's, for messages, where they differ.
    Raises `DataError` for weights that are missing, damaged, a pickle or of another shape.
    """
    expected = tensors_of(model, None)
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        found |= read_tensors(file, expected, torch.device(device), dtype, rename)
    # What is there already, and not on the meta device, may be absent from the folder.
    lacking = (name for name in expected.keys() - found.keys() if expected[name].is_meta)
    if missing := sorted(called.get(name, name) for name in lacking):
        raise DataError(
            f"{folder}: the weights lack {some(missing)}; config.json or the weights are another "
            "model's, so copy the folder again"
        )
    model.load_state_dict(found, strict=False, assign=True)
    tie_head(model)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()]), "a tensor is unset"


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json."""

    weight_map: dict[str, str]
    """The file of each tensor, by the tensor's name."""
    metadata: dict[str, Any] = field(default_factory=dict)


def check_size(config: ModelConfig, folder: Path) -> None:
    """Raise `DataError` where a folder's weights are too few or too small for a shape.

    Only headers are read, so this comes before a model of that shape is built: a config.json of
    a few bytes can ask for millions of layers.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        refuse_pickle(file)
        stored |= read_header(file)
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    layers += sum(medium.layers(config) for medium in media_for(config))
    width = config.n_heads * config.head_dim
    largest = config.d_model * max(config.vocab_size, config.d_ff, width, config.max_loops // 64)
    # Packed ternary weights hold four in a byte.
    if layers > len(stored) or largest > 4 * total_elements(stored):
        raise DataError(
            f"{folder}: config.json asks for {layers:,} layers of width {config.d_model:,}, and "
            f"the weights hold {len(stored):,} tensors; they are another model's, so copy the "
            "folder again"
        )


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise `DataError` for a tensor that holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    if torch.isfinite(wide.sum()):  # nine times as fast, and a finite sum has finite terms
        return
    if not all(torch.isfinite(end) for end in torch.aminmax(wide)):  # the sum may overflow
        raise DataError(
            f"{file}: {short(name)} holds NaN or infinity, so its training failed or the file is "
            "damaged; use another checkpoint"
        )


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises `DataError` where they are missing or pickles."""
    if (folder / INDEX).is_file():
        file = folder / INDEX
        index = typed(_Index, read_json(file), str(file), ignore_unknown=True)
        for name in (names := sorted(set(index.weight_map.values()))):
            # A name from a file must not lead out of the folder.
            if Path(name).name != name or not (folder / name).is_file():
                raise DataError(f"{folder}: {short(name)} is missing; copy the model again")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            refuse_pickle(file)
    raise DataError(f"{folder}: {WEIGHTS} is missing; copy the model again")


def fingerprint(folder: Path) -> str:
    """What tells a base from another, whatever its number type: names, shapes, some values."""
    total: dict[str, bytes] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as data:
            for name in data.keys():  # noqa: SIM118, it is no mapping
                tensor = data.get_tensor(name)
                last = tensor.numel() - 1  # float32 rounds it up in a tensor of over 2^24 values
                places = torch.linspace(0, last, _PROBED).long().clamp(max=last)
                values = tensor.flatten()[places].to(torch.bfloat16).view(torch.int16)
                shape = f"{name} {list(tensor.shape)}".encode()
                total[name] = shape + values.numpy().tobytes()
    return hashlib.sha256(b"".join(total[name] for name in sorted(total))).hexdigest()


def refuse_pickle(file: Path) -> None:
    """Raise `DataError` for a file that is a pickle by its name or its first bytes."""
    try:
        with open_input(file, pipes=False) as data:
            magic = data.read(8)
    except OSError as error:
        reason = error.strerror
        raise DataError(f"{file}: cannot be read ({reason}); copy the model again") from error
    zipped, pickled = magic[:4] == b"PK\x03\x04", magic[:1] == b"\x80" and magic[1:2] < b"\x08"
    # A safetensors header of 128 bytes starts like a pickle too, but zeros and '{' follow.
    pickled = pickled and magic[2:] != b"\0" * 6
    if file.suffix in PICKLES or zipped or pickled:
        raise DataError(
            f"{file}: a pickle can run code when read and is refused; convert it where you trust "
            "it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            f"'{WEIGHTS}')"
        )


def tensors_of(model: LoopedTransformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters by name, each once (`embedding.weight` stands for a tied head), and buffers."""
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    tensors = {name: p.detach() for name, p in model.named_parameters()} | buffers
    if dtype is None:
        return tensors
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def read_tensors(
    file: Path,
    expected: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    rename: Callable[[str], str | None],
) -> dict[str, Tensor]:
    """The tensors of one file, by name; each must be expected, of its shape and a float."""
    refuse_pickle(file)
    read_header(file)
    found: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as data:
            theirs = list(data.keys())
            names = {name: ours for name in theirs if (ours := rename(name))}
            if unknown := sorted(t for t, ours in names.items() if ours not in expected):
                raise DataError(
                    f"{file}: unexpected {some(unknown)}; config.json or the weights are another "
                    "model's, so copy the folder again"
                )
            for stored, name in names.items():
                tensor = data.get_tensor(stored)
                wanted = expected[name]
                floats = wanted.is_floating_point()
                alike = tensor.is_floating_point() if floats else tensor.dtype == wanted.dtype
                if tensor.shape != wanted.shape or not alike:
                    raise DataError(
                        f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, but config.json "
                        f"asks for {'floats' if floats else wanted.dtype} {list(wanted.shape)}; "
                        "copy the folder again"
                    )
                check_finite(tensor, name, file)
                # A copy: aligned, and independent of the file.
                kind = (dtype if floats else None) or tensor.dtype
                found[name] = tensor.to(device, kind, copy=True)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file}: not a whole safetensors file ({reason}); copy or save the model again"
        ) from error
    return found

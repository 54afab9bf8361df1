"""The model folder, by Hugging Face's conventions.

    config.json             shape, format_version, fingerprint of the tokenizer, facts
    model.safetensors       or shards with model.safetensors.index.json; tied tensors once
    tokenizer.json          and tokenizer_config.json
    codec-<kind>/           of a model that draws or speaks, its codec, as in `codec_folder.py`
    generation_config.json  end and padding ids; under `exit` the model's own exit rule
    ...                     what the model's media store, such as preprocessor_config.json
    digests.json            SHA-256 of the files of weights
    README.md               the model card

A folder appears whole or not at all (`atomic.py`); its weights are read by `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor

import looptx_core
from looptx_core.atomic import write_file, write_folder
from looptx_core.checkpoint.card import model_card
from looptx_core.checkpoint.codec_folder import codec_name, load_codec, write_codec
from looptx_core.checkpoint.special_tokens import SpecialTokens
from looptx_core.checkpoint.weights import check_size, load_weights, tensors_of
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import FIRST_FORMAT, FORMAT_VERSION, ModelConfig
from looptx_core.data.chat import ChatTemplate
from looptx_core.data.tokenizer import end_id, fingerprint, load_tokenizer, vocabulary_size
from looptx_core.documents import COPY_AGAIN, check_links, read_json, read_text, to_json
from looptx_core.errors import DataError
from looptx_core.machine.integrity import check_folder, write_digests
from looptx_core.media.codec.opened import Opened, opened_codec
from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.flops import parameter_count
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import to_float
from looptx_core.outputs import check_model_target
from looptx_core.schema import typed
from looptx_core.words import quoted

MODEL_TYPE = "looptx"
_NOT_SHAPE = {
    *("model_type", "architectures", "format_version", "torch_dtype", "looptx_version"),
    *("tokenizer_fingerprint", "facts", "command"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that running it takes. The model is in evaluation mode."""

    model: LoopedTransformer
    config: ModelConfig
    tokenizer: Tokenizer
    exit: ExitSettings
    facts: dict[str, Any]
    folder: Path
    chat_template: str | None = None
    """Of a model that was finetuned on chats; `data.chat` has ours."""
    special: SpecialTokens = field(default_factory=SpecialTokens)
    """What begins and ends its texts."""

    @property
    def chat(self) -> ChatTemplate | None:
        """Its way to write chats where it is another's; None: ours."""
        return ChatTemplate.of_others(self.chat_template, self.special.names())

    @property
    def end(self) -> int:
        """The token that ends an answer: the first of those at which generation stops."""
        return self.special.ends[0] if self.special.ends else end_id(self.tokenizer)

    @property
    def name(self) -> str:
        """The folder's name, or the run's for its `final`."""
        return model_name(self.folder)


def model_name(folder: Path) -> str:
    """A model's or an adapter's name: its folder's, the run's for its `final`, or its name on the
    hub for a snapshot in the hub's cache."""
    path = folder.resolve()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.parent.name if path.name == "final" else path.name


def save_model(
    folder: str | Path,
    model: LoopedTransformer,
    tokenizer: Tokenizer,
    *,
    exit_settings: ExitSettings,
    facts: Mapping[str, Any],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    files: Mapping[str, Any] | None = None,
    special: SpecialTokens | None = None,
) -> Path:
    """Write a model folder, whole or not at all.

    Args:
        facts: of the training, for the card and config.json; JSON values.
        overwrite: replace a model folder that is there; the old one stays until the new is whole.
        max_shard_size: bytes a file of weights, or text such as '5GB'.
        dtype: of the stored weights; absent: the model's own.
        chat_template: for tokenizer_config.json, as in `data.chat`.
        files: more files by name, JSON documents or texts.
        special: what begins and ends texts; absent: the tokens of the tokenizer with usual names.
    Raises:
        UsageError: the folder exists and may not be replaced.
        DataError: the tokenizer has more tokens than the model.
        LooptxError: it can't be written; what was there is intact.
    """
    folder = Path(folder)
    check_model_target(folder, overwrite)
    weights, own = model_files(folder, model, tokenizer, exit_settings, facts, dtype,
                               chat_template, special)  # fmt: skip
    write_model(folder, weights, {**own, **(files or {})}, max_shard_size)
    return folder


def model_files(
    folder: Path,
    model: LoopedTransformer,
    tokenizer: Tokenizer,
    exit_settings: ExitSettings,
    facts: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    special: SpecialTokens | None = None,
    depth: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_model` writes: tensors by name, and files by name, JSON documents or texts.

    depth: the loops of a format that has one depth and no exits.
    """
    check_vocabulary(tokenizer, model.config, "the tokenizer")
    weights = tensors_of(model, dtype)
    stored = next(t.dtype for t in weights.values() if t.is_floating_point())
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "format_version": FORMAT_VERSION,
        "looptx_version": looptx_core.__version__,
        "torch_dtype": str(stored).removeprefix("torch."),
        **model.config.to_dict(),
        "tokenizer_fingerprint": fingerprint(tokenizer),
        **({"loops": depth} if depth else {}),
        "facts": dict(facts),
    }
    special = special or SpecialTokens.known(tokenizer)
    name = folder.resolve().parent.name if folder.name == "final" else folder.name
    return weights, {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": tokenizer_config(special, model.config.max_seq_len, chat_template),
        "generation_config.json": {
            **special.ids(tokenizer),
            **({} if depth else {"exit": asdict(exit_settings)}),
        },
        "README.md": model_card(
            name, model.config, parameter_count(model.config), exit_settings, facts, depth
        ),
        "config.json": config,
        **_media_files(model),
        **_codecs(model),
    }


def _codecs(model: LoopedTransformer) -> dict[str, Any]:
    """The codecs by which the model writes media, by their folders' names."""
    return {codec_name(written): opened_codec(written.codec) for written in model.config.written}


def _media_files(model: LoopedTransformer) -> dict[str, Any]:
    """What the media store, by name; several may have keys in one document."""
    found: dict[str, Any] = {}
    for medium in model.media:
        for name, content in medium.files(model.config).items():
            found[name] = {**found.get(name, {}), **content}
    return found


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    files: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write tensors and files, JSON documents or texts, whole or not at all."""

    def write(place: Path) -> None:
        save_torch_state_dict(weights, place, max_shard_size=max_shard_size)
        write_files(place, files)
        write_digests(place)

    write_folder(folder, write)


def write_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write files by name, JSON documents, texts or codecs, into a folder that is new."""
    for name, content in files.items():
        if isinstance(content, Opened):
            write_codec(folder / name, content.codec, content.facts)
            continue
        text = content if isinstance(content, str) else to_json(content)
        (folder / name).write_text(text, "utf-8")


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read a model folder, of this format or an older one.

    Args:
        dtype: of the weights in memory; absent: as stored.
    Raises:
        DataError: a file is missing, damaged, of a newer format or not of this model, or the
            weights are a pickle, or not those that the folder was written with.
    """
    loaded = load_empty(folder)
    folder = loaded.folder
    load_weights(loaded.model, folder, device=device, dtype=dtype)
    for written in loaded.config.written:
        place = folder / codec_name(written)
        if not place.is_dir():
            raise DataError(
                f"{folder}: {place.name}, by which it {written.SECTION}s, is missing; {COPY_AGAIN}"
            )
        _, found = load_codec(place)
        if found != written.codec:
            raise DataError(
                f"{place}: another codec than the one that this model was trained with; "
                "put that one back"
            )
    check_folder(folder)
    return loaded


def load_empty(folder: str | Path) -> LoadedModel:
    """A model folder whose weights are not read: they stay on the meta device.

    Raises `DataError` as `load_model` does for the other files.
    """
    folder = Path(folder)
    config, settings = read_config(folder)
    tokenizer = read_tokenizer(folder, config, settings.get("tokenizer_fingerprint", ""))
    exit_settings = read_exit(folder)
    check_size(config, folder)
    with init_empty_weights():
        model = LoopedTransformer(config)
    facts = settings.get("facts") or {}
    if not isinstance(facts, dict):
        raise DataError(f"{folder / 'config.json'}: facts must hold keys of its own; copy the "
                        "model again")  # fmt: skip
    return LoadedModel(
        model.eval(),
        config,
        tokenizer,
        exit_settings,
        facts,
        folder,
        read_chat_template(folder),
        SpecialTokens.read(folder, tokenizer),
    )


def as_float(loaded: LoadedModel) -> LoadedModel:
    """The same with float weights in place of int8 ones, to train or to change them."""
    model = to_float(loaded.model)
    return replace(loaded, model=model, config=model.config)


def tokenizer_config(
    special: SpecialTokens, length: int, chat_template: str | None = None
) -> dict[str, Any]:
    """What tokenizer_config.json holds. length: the model's context, tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        **special.names(),
        **({"chat_template": chat_template} if chat_template else {}),
    }


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a model's or an adapter's tokenizer_config.json, or beside it."""
    if (apart := folder / "chat_template.jinja").is_file():  # as transformers saves it
        return read_text(apart)
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):  # several by name, of which transformers takes this one
        each = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = each.get("default")
    return found if isinstance(found, str) else None


def update_generation_config(folder: str | Path, exit_settings: ExitSettings) -> None:
    """Store another exit rule in a model folder, atomically; its other settings stay.

    Raises:
        DataError: the folder has no readable generation_config.json.
        LooptxError: it can't be written; the old one is intact.
    """
    file = Path(folder) / "generation_config.json"
    text = to_json({**read_json(file), "exit": asdict(exit_settings)})
    write_file(file, text)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape of a model folder, and all of its config.json.

    Raises `DataError` for a folder that is no model's, or of another format.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such model folder; give a run or a model folder")
    check_links(folder)
    file = folder / "config.json"
    settings = read_json(file)
    if (kind := settings.get("model_type")) != MODEL_TYPE:
        raise DataError(f"{file}: model_type is {kind!r}, not '{MODEL_TYPE}'; give a looptx model")
    version = settings.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < FIRST_FORMAT:
        raise DataError(
            f"{file}: format_version is {version!r}, and the first released format is "
            f"{FIRST_FORMAT}; copy or train the model again"
        )
    if version > FORMAT_VERSION:
        raise DataError(
            f"{file}: format_version {version} is newer than {FORMAT_VERSION}, the last that "
            f"looptx {looptx_core.__version__} reads; upgrade looptx"
        )
    if "auto_map" in settings:
        raise DataError(
            f"{folder}: in transformers' format; make it looptx's by "
            f"looptx convert --from-hf {quoted(folder)}"
        )
    shape = {key: value for key, value in settings.items() if key not in _NOT_SHAPE}
    return typed(ModelConfig, shape, str(file)), settings


def read_tokenizer(folder: Path, config: ModelConfig, expected: str | None = None) -> Tokenizer:
    """The folder's tokenizer, which must fit the model and have the fingerprint `expected`."""
    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(file, mend=COPY_AGAIN)
    check_vocabulary(tokenizer, config, str(file))
    if expected is not None and expected != fingerprint(tokenizer):
        raise DataError(
            f"{file}: not the tokenizer that this model was trained with; put that one back"
        )
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Ids must fit the embedding; a model may have more rows, to fill up to a round number."""
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise DataError(
            f"{where} has {size} tokens, but the model has {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def read_exit(folder: Path) -> ExitSettings:
    file = folder / "generation_config.json"
    settings = read_json(file).get("exit", {})
    found = typed(ExitSettings, settings, f"{file}, exit")
    gains = {len(part) for part in (found.gain_slope, found.gain_power, found.gain_offset)}
    if len(found.stated) not in (0, 3) or len(gains) > 1:
        raise DataError(
            f"{file}, exit: stated has three numbers, and gain_slope as many as gain_power and "
            "gain_offset; copy the model again"
        )
    return found

"""The data that a model was trained on: noted in its folder, and opened again for other commands.

`data.json` says of which kind it is, where it was, and how its held-out part was chosen, so that
a model is trained further and judged by what it was made for.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.bundled import bundled_corpus, bundled_questions, bundled_shards
from looptx_core.data.corpus import Corpus
from looptx_core.data.datamodule import Batches, TokenData
from looptx_core.data.examples import Example, ExampleData, Packed, padding_id, read_examples
from looptx_core.data.mixture import RECORDS, MixedData
from looptx_core.data.records import media_named, read_records
from looptx_core.data.resolve import resolve_data
from looptx_core.data.shards import Manifest
from looptx_core.data.split import hold_out
from looptx_core.data.tokenizer import fingerprint
from looptx_core.errors import DataError
from looptx_core.media import media_for

FILE = "data.json"
FORMAT_VERSION = 1
_SETTINGS = {
    *("seed", "seq_len", "batch_size", "mix", "document_mask", "augment", "skip_bad"),
    *("val_fraction", "too_long", "train_on_prompt"),
}


@dataclass(frozen=True)
class OwnData:
    """What a model was trained on, or will be.

    kind: 'text' may hold pictures with texts too, 'records' are a finetuning's. inputs: as given,
    with whole paths; none: the bundled data of the kind. shards: of the text, where it became
    some. settings: of the run, those that choose and cut the data.
    """

    kind: Literal["text", "records"]
    inputs: tuple[str, ...] = ()
    shards: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kind: Literal["text", "records"],
        inputs: Sequence[str | Path],
        settings: Mapping[str, Any],
        shards: Path | None = None,
    ) -> OwnData:
        """To note, with paths that hold wherever the next command is started."""
        whole = tuple(path for item in inputs for path in _whole(item))
        kept = {key: value for key, value in settings.items() if key in _SETTINGS}
        return cls(kind, whole, str(shards.resolve()) if shards else None, kept)

    def to_dict(self) -> dict[str, Any]:
        """The document `data.json`."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @property
    def name(self) -> str:
        """In a few words, for people."""
        if self.inputs:
            return ", ".join(Path(item).name for item in self.inputs)
        return "the bundled text" if self.kind == "text" else "the bundled questions"

    @property
    def missing(self) -> list[str]:
        """The inputs that are gone."""
        inputs = [item for item in self.inputs if not item.startswith("hf:")]
        if self.kind == "text" and self._has_shards():
            inputs = self._pairs()
        return [item for item in inputs if not Path(item).exists()]

    def _has_shards(self) -> bool:
        return bool(self.shards) and (Path(str(self.shards)) / "manifest.json").is_file()

    def _pairs(self) -> list[str]:
        """Inputs of pictures with texts; one that is gone counts if it can be nothing else."""
        return [item for item in self.inputs if media_named([item]) or not Path(item).exists()]


def own_data(folder: Path, facts: Mapping[str, Any]) -> OwnData | None:
    """What the model in a folder was trained on; None where nothing is known of it.

    Raises `DataError` for a damaged note.
    """
    try:
        found = json.loads((folder / FILE).read_text("utf-8"))
        if found.pop("format_version") != FORMAT_VERSION:
            raise DataError(f"{folder / FILE}: of another format; upgrade looptx")
        found["inputs"] = tuple(map(str, found["inputs"]))
        made = OwnData(**found)
    except FileNotFoundError:
        # A model of the bundled text needs no note.
        return OwnData("text") if facts.get("data") == [bundled_corpus().name] else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / FILE}: damaged; remove it, or copy the model again") from error
    if made.kind not in ("text", "records") or not isinstance(made.settings, dict):
        raise DataError(f"{folder / FILE}: damaged; remove it, or copy the model again")
    return made


def given_data(inputs: Sequence[str]) -> OwnData:
    """Data that is named now; its first records tell the kind."""
    kind: Literal["text", "records"] = "records" if _are_records(inputs) else "text"
    return OwnData.of(kind, inputs, {"skip_bad": True, "too_long": "truncate"})


def open_data(
    data: OwnData,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    seq_len: int,
    rows: int,
    report: Callable[[str], object] = lambda line: None,
    **how: Any,
) -> Batches:
    """Batches to train on and to judge by, split as in the run that made the note.

    seq_len, rows: of text; records have their run's. how: the other arguments of `Batches`.
    Raises `DataError` for data that can't be read or that is of another tokenizer.
    """
    own = data.settings
    limit = min(own.get("seq_len") or 2 * seq_len, config.max_seq_len)
    few = min(own.get("batch_size") or rows, rows)
    skip_bad = bool(own.get("skip_bad"))
    if data.kind == "records":
        return _records(data, tokenizer, config, limit, few, skip_bad, report, how)
    pairs = [item for item in data.inputs if media_named([item])]
    shards = _shards(data, [item for item in data.inputs if item not in pairs], tokenizer)
    how["document_mask"] = own.get("document_mask", True)
    if not pairs:
        cut = min(seq_len, config.max_seq_len)
        return TokenData(shards, seq_len=cut, micro_batch=rows, **how)
    how["seed"] = own.get("seed", how.get("seed", 0))
    only = len(pairs) == len(data.inputs) and "mix" not in own
    records = read_records(pairs, skip_bad)
    for medium in records.media:
        if medium not in media_for(config):
            raise DataError(f"{pairs[0]}: has {medium.plural}, and this model reads none")
    mix = (0.0, 1.0) if only else TrainConfig(mix=own.get("mix", "1:1")).weights
    mixed = MixedData(
        shards, records, config, seq_len=limit, micro_batch=few,
        mix=mix, skip_bad=skip_bad, augment=own.get("augment", True), **how,
    )  # fmt: skip
    if only:  # no text was named, so none judges
        mixed.val = mixed.val_parts[RECORDS]
        mixed.val_sequences = min(mixed.val_sequences, len(mixed.val))
    return mixed


def own_text(folder: Path) -> tuple[str, ...] | None:
    """The inputs of text that a model was trained on, without records of media; () is the bundled
    text. None where nothing is known, or where it was finetuned on records."""
    data = own_data(folder, {})
    if data is None or data.kind == "records":
        return None
    texts = tuple(item for item in data.inputs if not media_named([item]))
    return (str(data.shards),) if texts and data._has_shards() else texts


def split_examples(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """What to train on, and what is held out, by groups where there are some."""
    keys = [_key(example) for example in examples]
    # A few examples many times over are a finetuning too, which needs some of each.
    grouped = any(example.group is not None for example in examples)
    train, held = hold_out(keys, share, seed, whole=grouped)
    return [examples[i] for i in train], [examples[i] for i in held]


def packed(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: ModelConfig,
    seq_len: int,
    seed: int | None = None,
    augment: bool = False,
) -> Packed:
    """Examples side by side. seed: for what is drawn anew in each epoch; None: held out."""
    draws = augment and seed is not None
    return Packed(examples, seq_len, padding_id(tokenizer), config, seed, draws)


def _key(example: Example) -> bytes:
    """What an example is held out by: its group, else all that it holds."""
    if example.group is not None:
        return example.group.encode()
    return example.ids.tobytes() + "".join(str(file.path) for file in example.files).encode()


def _records(
    data: OwnData,
    tokenizer: Tokenizer,
    config: ModelConfig,
    seq_len: int,
    rows: int,
    skip_bad: bool,
    report: Callable[[str], object],
    how: Mapping[str, Any],
) -> ExampleData:
    own = data.settings
    found = read_examples(
        data.inputs or [str(bundled_questions())],
        tokenizer,
        seq_len=seq_len,
        too_long=own.get("too_long", "truncate"),
        train_on_prompt=own.get("train_on_prompt", False),
        skip_bad=skip_bad,
        config=config,
    )
    if found.skipped or found.dropped or found.truncated:
        report(
            f"data: left out {found.skipped} records that can't be used and {found.dropped} that "
            f"are too long; shortened {found.truncated}"
        )
    seed = own.get("seed", 0)
    train, val = split_examples(found.kept, own.get("val_fraction", 0.1), seed)
    shape = (tokenizer, config, seq_len)
    return ExampleData(
        packed(train, *shape, seed, own.get("augment", True)),
        packed(val, *shape),
        micro_batch=rows,
        **how,
    )


def _shards(data: OwnData, texts: list[str], tokenizer: Tokenizer) -> Path:
    if data.shards and data._has_shards():
        shards = Path(data.shards)
        if Manifest.read(shards).tokenizer == fingerprint(tokenizer):
            return shards
    if texts:
        return resolve_data(texts, tokenizer=tokenizer)
    return bundled_shards(tokenizer.get_vocab_size(), tokenizer)


def _whole(item: str | Path) -> list[str]:
    """An input with its whole path, each file of a pattern; a name that is no path as it is."""
    text = str(item)
    if Path(text).exists():
        return [str(Path(text).resolve())]
    found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []  # noqa: PTH207
    return [str(Path(file).resolve()) for file in found] or [text]


def _are_records(inputs: Sequence[str]) -> bool:
    """Whether an input's first record is a question with its answer, or a conversation."""
    folders = [item for item in inputs if Path(item).is_dir()]
    other = {i for i in folders if (Path(i) / "manifest.json").exists() or media_named([i])} | {"-"}
    named = [item for item in inputs if item not in other]
    if not named:
        return False
    with Corpus(named) as corpus:
        for source in corpus.sources:
            _, record = next(corpus.records_of(source), ("", None))
            if isinstance(record, dict) and not record.keys().isdisjoint(("prompt", "messages")):
                return True
    return False

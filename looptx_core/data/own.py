"""The data that a model was trained on: noted in its folder, and opened again for other commands.

`data.json` says of which kind it is, where it was, and how its held-out part was chosen, so that
a model is trained further and judged by what it was made for.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from looptx_core.config.finetune import parse_columns
from looptx_core.config.model import ModelConfig
from looptx_core.config.ranges import check_ranges
from looptx_core.config.run import parse_mix
from looptx_core.data.bundled import CORPUS, bundled_questions, bundled_shards
from looptx_core.data.chat import ChatTemplate
from looptx_core.data.corpus import Corpus
from looptx_core.data.datamodule import Batches, TokenData
from looptx_core.data.examples import ExampleData, read_examples, split_packed
from looptx_core.data.mixture import RECORDS, MixedData
from looptx_core.data.records import media_named, read_records
from looptx_core.data.resolve import resolve_data, resolve_sources
from looptx_core.data.shards import Manifest
from looptx_core.data.tokenizer import fingerprint
from looptx_core.documents import read_json, some
from looptx_core.errors import DataError
from looptx_core.media.registry import MEDIA, media_for
from looptx_core.schema import typed
from looptx_core.words import counted

FILE = "data.json"
FORMAT_VERSION = 1
# What tells a question with its answer, or a conversation, from a text.
_OF_RECORDS = ("prompt", "messages", "instruction", "conversations")
_MEND = "remove it, or copy the model again"


@dataclass(frozen=True)
class _Settings:
    """The settings of a run that choose and cut its data; absent ones are the reader's choice."""

    seed: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    mix: str | None = None
    document_mask: bool | None = None
    augment: bool | None = None
    skip_bad: bool | None = None
    val_fraction: float | None = None
    too_long: Literal["error", "drop", "truncate"] | None = None
    train_on_prompt: bool | None = None
    columns: tuple[str, ...] | None = None
    direction: Literal["both", "read", "write"] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        parse_columns(self.columns or ())
        if self.mix is not None:
            parse_mix(self.mix)


_SETTINGS = {setting.name for setting in fields(_Settings)}


@dataclass(frozen=True)
class OwnData:
    """What a model was trained on, or will be.

    kind: 'text', which records of media may be mixed with, or 'records' of a finetuning. inputs:
    as given, with absolute paths; none: the bundled data of the kind. media: the inputs that are
    mixed with the text. shards: of the text, where it became some. settings: of the run, those
    that choose and cut the data. weights: of each of the inputs and media; none: the text is joined
    and weighed against all media by the setting `mix`.
    """

    kind: Literal["text", "records"]
    inputs: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    shards: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        kind: Literal["text", "records"],
        inputs: Sequence[str | Path],
        settings: Mapping[str, Any],
        *,
        shards: Path | None = None,
        media: Sequence[str | Path] = (),
        weights: Sequence[float] = (),
    ) -> OwnData:
        """To note, with paths that hold wherever the next command is started."""
        kept = {key: value for key, value in settings.items() if key in _SETTINGS}
        where = str(shards.resolve()) if shards else None
        texts, others = _absolute(inputs), _absolute(media)
        # A pattern became several files, which have no weights of their own.
        each = tuple(weights) if len(weights) == len(texts) + len(others) else ()
        return cls(kind, texts, others, where, kept, each)

    def to_dict(self) -> dict[str, Any]:
        """The document `data.json`."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @property
    def name(self) -> str:
        """In a few words, for people."""
        if names := [Path(item).name for item in (*self.inputs, *self.media)]:
            return ", ".join(names)
        return "the bundled text" if self.kind == "text" else "the bundled questions"

    @property
    def missing(self) -> list[str]:
        """The inputs that are gone."""
        inputs = () if self.has_shards else self.inputs
        named = [item for item in (*inputs, *self.media) if not item.startswith("hf:")]
        return [item for item in named if not Path(item).exists()]

    def same_inputs(self, other: OwnData) -> bool:
        """Whether both are of the same kind and the same files."""
        return (self.kind, self.inputs, self.media) == (other.kind, other.inputs, other.media)

    @property
    def has_shards(self) -> bool:
        """Whether its text can still be had as it was tokenised."""
        return bool(self.shards) and (Path(str(self.shards)) / "manifest.json").is_file()


def own_data(folder: Path, facts: Mapping[str, Any]) -> OwnData | None:
    """What the model in a folder was trained on; None where nothing is known of it.

    Raises `DataError` for a damaged note.
    """
    file = folder / FILE
    if not file.exists():
        # A model of the bundled text needs no note.
        return OwnData("text") if facts.get("data") == [CORPUS] else None
    found = read_json(file, mend=_MEND)
    if found.pop("format_version", None) != FORMAT_VERSION:
        raise DataError(f"{file}: of another format; upgrade looptx")
    if missing := {"inputs", "media"} - found.keys():
        raise DataError(f"{file}: {some(sorted(missing))} is missing; {_MEND}")
    own = typed(OwnData, found, str(file), mend=_MEND)
    settings = typed(_Settings, own.settings, f"{file}, settings", mend=_MEND)
    given = {key: getattr(settings, key) for key in own.settings}
    return replace(own, settings={key: v for key, v in given.items() if v is not None})


def given_data(inputs: Sequence[str]) -> OwnData:
    """Data that is named now; its first records tell the kind."""
    settings = {"skip_bad": True, "too_long": "truncate"}
    if _are_records(inputs):
        return OwnData.of("records", inputs, settings)
    media = [item for item in _absolute(inputs) if media_named([item])]
    texts = [item for item in _absolute(inputs) if item not in media]
    return OwnData.of("text", texts, settings, media=media)


def open_data(
    data: OwnData,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    seq_len: int,
    rows: int,
    chat: ChatTemplate | None = None,
    end: int | None = None,
    held_out_only: bool = False,
    report: Callable[[str], object] = lambda line: None,
    **how: Any,
) -> Batches:
    """Batches to train on and to judge by, split as in the run that made the note.

    seq_len, rows: of text; records have their run's. chat, end: as for `read_examples`.
    held_out_only: nothing will be trained, as for `MixedData`. how: the other arguments of
    `Batches`.
    Raises `DataError` for data that can't be read or that is of another tokenizer.
    """
    own = data.settings
    limit = min(own.get("seq_len") or 2 * seq_len, config.max_seq_len)
    few = min(own.get("batch_size") or rows, rows)
    skip_bad = bool(own.get("skip_bad"))
    if data.kind == "records":
        return _records(data, tokenizer, config, limit, few, skip_bad, chat, end, report, how)
    how["document_mask"] = own.get("document_mask", True)
    weights = data.weights
    if len(weights) != len(data.inputs) + len(data.media) or not data.inputs:
        weights = ()
    if weights:
        shards = resolve_sources(data.inputs, tokenizer=tokenizer)
    else:
        shards = [text_shards(data, tokenizer)]
    if not data.media and not weights:
        cut = min(seq_len, config.max_seq_len)
        return TokenData(shards[0], seq_len=cut, micro_batch=rows, **how)
    for name in sorted(media_named(data.media)):
        if MEDIA[name] not in media_for(config):
            plural = MEDIA[name].plural
            raise DataError(f"{data.media[0]}: has {plural}, and this model reads none")
    how["seed"] = own.get("seed", how.get("seed", 0))
    only = not data.inputs and "mix" not in own
    groups = [[item] for item in data.media] if weights else [data.media]
    mixed = MixedData(
        shards, [read_records(group, skip_bad) for group in groups], config, seq_len=limit,
        micro_batch=few, skip_bad=skip_bad,
        mix=weights or parse_mix(own.get("mix") or ("0:1" if only else "1:1"))[:2],
        augment=own.get("augment", True), direction=own.get("direction", "both"),
        held_out_only=held_out_only, **how,
    )  # fmt: skip
    if only:  # no text was named, so none judges
        mixed.val = mixed.val_parts[RECORDS]
        mixed.val_sequences = min(mixed.val_sequences, len(mixed.val))
    return mixed


def text_shards(data: OwnData, tokenizer: Tokenizer) -> Path:
    """The folder of shards of data of the kind 'text', by this tokenizer.

    Raises `DataError` for text that can't be read or that is of another tokenizer.
    """
    if data.shards and data.has_shards:
        shards = Path(data.shards)
        if Manifest.read(shards).tokenizer == fingerprint(tokenizer):
            return shards
    if data.inputs:
        return resolve_data(data.inputs, tokenizer=tokenizer)
    return bundled_shards(tokenizer.get_vocab_size(), tokenizer)


def _records(
    data: OwnData,
    tokenizer: Tokenizer,
    config: ModelConfig,
    seq_len: int,
    rows: int,
    skip_bad: bool,
    chat: ChatTemplate | None,
    end: int | None,
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
        columns=own.get("columns", ()),
        chat=chat,
        end=end,
    )
    if found.skipped or found.dropped or found.truncated:
        report(
            f"data: left out {counted(found.skipped, 'record')} that can't be used and "
            f"{found.dropped} that are too long; shortened {found.truncated}"
        )
    train, val = split_packed(
        found.kept,
        tokenizer,
        config,
        seq_len=seq_len,
        val_fraction=own.get("val_fraction", 0.1),
        seed=own.get("seed", 0),
        augment=own.get("augment", True),
    )
    return ExampleData(train, val, micro_batch=rows, **how)


def _absolute(inputs: Sequence[str | Path]) -> tuple[str, ...]:
    """Absolute paths of inputs, each file of a pattern; a name that is no path as it is."""
    paths: list[str] = []
    for text in map(str, inputs):
        magic = not Path(text).exists() and glob.has_magic(text)
        found = sorted(glob.glob(text, recursive=True)) if magic else [text]  # noqa: PTH207
        paths += [str(Path(path).resolve()) if Path(path).exists() else path for path in found]
        paths += [] if found else [text]
    return tuple(paths)


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
            if isinstance(record, dict) and not record.keys().isdisjoint(_OF_RECORDS):
                return True
    return False

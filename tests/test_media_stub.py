"""The joint of media: a medium of this file alone is trained on, read, written and looked into."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import abilities, resolve_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.chat import chat_prompt
from looptx_core.data.content import content_ids
from looptx_core.data.examples import PackedExamples, read_examples
from looptx_core.data.records import media_named, read_records
from looptx_core.data.shards import Manifest, open_shards
from looptx_core.errors import DataError, UsageError
from looptx_core.generation.engine import ChatPrompt, Engine, MediaPrompt
from looptx_core.inspection.media import inspect_media
from looptx_core.media.base import Grid, Medium
from looptx_core.media.batch import MediaBatch, MediaItem, batch_items, lay_out
from looptx_core.media.image.read import read_picture
from looptx_core.media.registry import MEDIA, media_for
from looptx_core.media.writer import Writer
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.run import fit_vocabulary, train

READ, OPENS = 6, 7
"""Reserved tokens: a tone that is read, and what begins one that is written."""
LONGEST, COUNT, VALUES = 50, 3, 2


class Tones(Medium):
    """A JSON list of tones, each of two numbers; written ones are three of four codes."""

    name, noun, plural = "tones", "melody", "melodies"
    marker, ability, write_key = "<|tones|>", "hearing", "sing"
    suffixes = (".tones",)
    axes = 3
    encoder_name, head_name = "ear", "ear_head"

    def token(self, config: ModelConfig) -> int:
        return READ

    def read(
        self, source: Any, config: ModelConfig, where: str | None = None, augment: Any = None
    ) -> MediaItem:
        tones = _numbers(source, where)
        if augment is not None:
            tones = tones + torch.from_numpy(augment.normal(0, 0.01, tones.shape)).float()
        return MediaItem(self.name, tones, (len(tones),))

    def positions(self, grid: Grid) -> Tensor:
        """Time is the first coordinate; the others stand."""
        found = torch.zeros(self.axes, grid[0], dtype=torch.long)
        found[0] = torch.arange(grid[0])
        return found

    def encoder(self, config: ModelConfig) -> nn.Module:
        return _Ear(VALUES, self.section(config).get("width", 8), config.d_model)

    def flops(self, config: ModelConfig) -> int:
        return 1000

    def inspect(self, walk: Any, item: MediaItem) -> dict[str, Any]:
        states = torch.stack([state for state, _ in walk()])
        return {"moved": (states[1:] - states[:-1]).norm(dim=-1).mean(1).tolist()}

    def sentences(self, found: Mapping[str, Any]) -> list[str]:
        return [f"{found['melody']}, {found['length']} tones: {found['caption']}"]

    def codes(self, config: ModelConfig) -> int:
        return 4

    def writer(self, config: ModelConfig) -> Writer:
        return _Singer(self.section(config)["first_code"])


class _Ear(nn.Module):
    def __init__(self, values: int, hidden: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(values, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, batch: MediaBatch) -> Tensor:
        return self.layers(batch.features)


class _Singer(Writer):
    """Three codes; the second differs from the first."""

    opens, codes = OPENS, 4

    def __init__(self, first_code: int) -> None:
        self.first_code = first_code

    def allowed(self, written: Sequence[int], said: Sequence[int] = ()) -> Sequence[int]:
        every = super().allowed(written)
        return [code for code in every if len(written) != 1 or code != written[0]]

    def finished(self, written: Sequence[int], said: Sequence[int] = ()) -> bool:
        return len(written) == COUNT

    def encode(
        self, source: Any, where: str | None = None, said: Sequence[tuple[int, bytes]] = ()
    ) -> list[int]:
        high = _numbers(source, where)[:COUNT, 0] > 0
        bits = [int(bit) for bit in high]
        return [self.first_code + 2 * (number % 2) + bit for number, bit in enumerate(bits)]

    def render(self, written: Sequence[int], options: GenerationOptions) -> bytes:
        return json.dumps([code - self.first_code for code in written]).encode()


def _numbers(source: Any, where: str | None) -> Tensor:
    name = where or str(source)
    try:
        text = source if isinstance(source, bytes) else Path(source).read_bytes()
        tones = torch.tensor(json.loads(text), dtype=torch.float32)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{name}: no melody; give a JSON list") from error
    if tones.dim() != 2 or tones.shape[1] != VALUES or not 1 <= len(tones) <= LONGEST:
        raise DataError(f"{name}: not 1 to {LONGEST} tones of {VALUES} numbers")
    return tones


SHAPE = ModelConfig(
    d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, prelude_layers=1, core_layers=1,
    coda_layers=0, max_loops=3, max_seq_len=96,
)  # fmt: skip
WORDS = {"low": -1.0, "high": 1.0}


@pytest.fixture(scope="module", autouse=True)
def tones() -> Iterator[Medium]:
    medium = Tones()
    MEDIA[medium.name] = medium
    yield medium
    del MEDIA[medium.name]


@pytest.fixture(scope="module")
def melodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low and high ones, of three to five tones, each with its name and as what is to be sung."""
    folder = tmp_path_factory.mktemp("melodies")
    records: list[dict[str, Any]] = []
    for number in range(24):
        word = list(WORDS)[number % 2]
        tones = [[WORDS[word], step / 10] for step in range(3 + number % 3)]
        (folder / f"{number}.tones").write_text(json.dumps(tones))
        sung = {"parts": [{"text": f"sing {word}"}, {"sing": f"{number}.tones"}]}
        records += [{"tones": f"{number}.tones", "text": word, "group": f"a{number // 4}"}, sung]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def run(melodies: Path, colour_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of looptx's own training on text and melodies."""
    config = TrainConfig(
        steps=80, seq_len=32, batch_size=8, mix="1:4", lr=5e-3, val_every=80, val_batches=1,
        optimizer="adamw", save_every=80,
    )  # fmt: skip
    model = fit_vocabulary(
        MEDIA["tones"].enable(SHAPE), Manifest.read(colour_shards).vocab_size, False
    )
    out = tmp_path_factory.mktemp("runs") / "a"
    lines: list[str] = []
    result = train(
        config, model, data=colour_shards, records=[melodies / "all.jsonl"], folder=out,
        report=lines.append,
    )  # fmt: skip
    assert result is not None and "melodies: 48 records" in lines
    assert len(result.caption_loss_by_loop) == 3
    return out / "final"


def test_what_was_learned_is_stored_under_the_mediums_names(run: Path) -> None:
    loaded = load_model(run)
    first = loaded.tokenizer.get_vocab_size()
    assert loaded.config.vocab_size == first + 4
    assert loaded.config.media == {"tones": {"first_code": first}}
    assert json.loads((run / "config.json").read_text())["media"] == loaded.config.media
    assert "ear.layers.0.weight" in loaded.model.state_dict()
    assert abilities(run) == {"weights", "hearing"}
    assert resolve_model(run, need=frozenset({"hearing"})).folder == run
    with pytest.raises(DataError, match="no vision"):
        resolve_model(run, need=frozenset({"vision"}))


def test_melodies_are_read_in_generation(run: Path, melodies: Path) -> None:
    loaded = load_model(run)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    items = [MEDIA["tones"].read(melodies / f"{n}.tones", loaded.config) for n in range(4)]
    options = GenerationOptions(temperature=0, max_new_tokens=8)
    said = engine.complete([MediaPrompt("", (item,)) for item in items], options)
    assert [result.text.strip() for result in said] == ["low", "high", "low", "high"]
    assert all(not result.outputs for result in said)
    assert said[0].prompt_tokens == 1 + items[0].length


@pytest.mark.parametrize("speculate", [0, 2])
def test_melodies_are_written_in_generation(run: Path, speculate: int) -> None:
    loaded = load_model(run)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    options = GenerationOptions(temperature=0, max_new_tokens=8, speculate=speculate)
    asked = [MediaPrompt(f"sing {word}", write="tones") for word in WORDS]
    low, high = engine.complete(asked, options)
    for result, codes in ((low, [0, 2, 0]), (high, [1, 3, 1])):
        (output,) = result.outputs
        assert (output.medium, json.loads(output.content)) == ("tones", codes)
        assert output.ids == tuple(step.id for step in result.tokens[:COUNT])
        assert [step.output for step in result.tokens].index(output) == COUNT - 1
        assert result.text == "" and result.finish_reason == "end"


def test_a_melody_begins_where_the_model_opens_one(run: Path) -> None:
    loaded = load_model(run)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    options = GenerationOptions(temperature=0, max_new_tokens=8)
    (result,) = engine.complete([MediaPrompt("sing high")], options)
    assert result.tokens[0].id == OPENS
    assert [json.loads(output.content) for output in result.outputs] == [[1, 3, 1]]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_only_allowed_codes_are_drawn(run: Path, temperature: float) -> None:
    """An untrained model would draw text among them, and a hot one a forbidden repetition."""
    loaded = load_model(run)
    torch.manual_seed(0)
    model = LoopedTransformer(loaded.config)
    engine = Engine(model, loaded.tokenizer)
    first = loaded.config.media["tones"]["first_code"]
    for seed in range(8):
        options = GenerationOptions(
            temperature=temperature, max_new_tokens=COUNT + 2, seed=seed, ignore_eos=True
        )
        (result,) = engine.complete([MediaPrompt("", write="tones")], options)
        ids = [step.id for step in result.tokens]
        assert all(id_ >= first for id_ in ids[:COUNT]) and ids[0] != ids[1]
        assert all(id_ < first for id_ in ids[COUNT:])
        assert len(result.outputs) == 1
    short = replace(options, max_new_tokens=2)
    (result,) = engine.complete([MediaPrompt("", write="tones")], short)
    assert not result.outputs and result.finish_reason == "length"


def test_the_command_trains_on_it_and_resumes(
    melodies: Path, colour_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No flag names the medium: the records do."""
    keys = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "core_layers", "max_loops")
    shape = {key: getattr(SHAPE, key) for key in keys} | {"coda_layers": 0}
    settings = {"seq_len": 32, "batch_size": 4, "val_batches": 1, "model": shape}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--data", str(colour_shards)]
    command += ["--data", str(melodies / "all.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "2"]) == 0
    assert "melodies: an encoder" in capsys.readouterr().err
    assert "hearing" in abilities(tmp_path / "run" / "final")
    before = load_model(tmp_path / "run" / "final").config
    resume = ["train", "--resume", str(tmp_path / "run"), "--steps"]
    assert main([*resume, "3"]) == 0
    assert "resumed: at step 2" in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "final").config == before
    melody = melodies / "1.tones"
    written = melody.read_text()
    melody.write_text(written + " ")
    assert main([*resume, "4"]) == 4
    melody.write_text(written)
    assert "the media data is not what this run began with" in capsys.readouterr().err


def test_melodies_are_looked_into(run: Path, melodies: Path) -> None:
    loaded = load_model(run)
    found = inspect_media(loaded, {"tones": [str(melodies / "1.tones")]}, loaded.exit, 3)
    (entry,) = found["melodies"]
    assert (entry["melody"], entry["length"], entry["caption"]) == ("1.tones", 4, "high")
    assert len(entry["moved"]) == 2 and min(entry["moved"]) > 0
    assert MEDIA["tones"].sentences(entry) == ["1.tones, 4 tones: high"]


def test_each_medium_is_turned_by_axes_of_its_own(cat: Path) -> None:
    """Three beside the two of images: six coordinates, of which each medium has its own pattern."""
    config = MEDIA["tones"].enable(replace(SHAPE, vision_layers=1, vision_width=24, max_patches=6))
    assert [medium.name for medium in media_for(config)] == ["image", "tones"]
    picture = read_picture(cat, config)
    rows, columns = picture.grid
    melody = MediaItem("tones", torch.zeros(3, VALUES), (3,))
    patches = [config.image_token] * picture.length
    tokens = torch.tensor([[9, READ, READ, READ, 8, *patches, 8]])
    media = batch_items([picture, melody])
    found = lay_out(tokens, media, config)
    corner = 5
    after = corner + max(rows, columns)
    by_row = [corner + r for r in range(rows) for _ in range(columns)]
    by_column = [corner + c for _ in range(rows) for c in range(columns)]
    assert len(found.positions) == 6
    for number, axis in enumerate(found.positions[:, 0].tolist()):
        assert axis[:5] == ([0, 1, 2, 3, 4] if number % 3 == 0 else [0, 1, 1, 1, 4])
        assert axis[5:-1] == (by_column if number % 2 else by_row)
        assert axis[-1] == after
    alone = lay_out(tokens[:, 4:], batch_items([picture]), replace(config, media={}))
    assert torch.equal(alone.positions.repeat(3, 1, 1) + 4, found.positions[..., 4:])
    assert found.groups is not None
    assert found.groups[0].tolist() == [-1] * 5 + [0] * picture.length + [-1]
    torch.manual_seed(0)
    model = LoopedTransformer(config)
    both = model(tokens, 2, media=media).logits
    moved = media | {"tones": MediaBatch(torch.ones(3, VALUES), media["tones"].grids)}
    assert torch.equal(both[:, :1], model(tokens, 2, media=moved).logits[:, :1])
    assert not torch.allclose(both[:, -1], model(tokens, 2, media=moved).logits[:, -1])


def test_one_grammar_of_records(run: Path, melodies: Path, colour_shards: Path) -> None:
    """Markers, chats and prompts place a melody as they place a picture."""
    loaded = load_model(run)
    melody = MEDIA["tones"].read(melodies / "0.tones", loaded.config)
    records = [
        {"tones": "0.tones", "prompt": "a<|tones|>b", "response": "c"},
        {"messages": [{"role": "user", "content": "a<|tones|>b", "tones": ["0.tones"]},
                      {"role": "assistant", "content": "c"}]},
        {"parts": [{"text": "a"}, {"tones": "0.tones"}, {"text": ["b", "c"]}]},
    ]  # fmt: skip
    file = melodies / "forms.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    assert media_named([file]) == media_named([melodies / "all.jsonl"]) == {"tones"}
    found = read_examples([str(file)], loaded.tokenizer, seq_len=64, config=loaded.config)
    assert found.media == {"tones": 3} and found.chat
    text = content_ids("a<|tones|>b", loaded.tokenizer, (melody,), loaded.config)
    assert text.count(READ) == 3
    turns = chat_prompt(
        [{"role": "user", "content": "a<|tones|>b"}], loaded.tokenizer, (melody,), loaded.config
    )
    engine = Engine(loaded.model, loaded.tokenizer)
    asked = ChatPrompt(({"role": "user", "content": "a<|tones|>b"},), (melody,))
    assert engine.encode(asked) == turns
    for example, before in zip(found.kept, ([engine.end, *text], turns, [engine.end, *text])):
        assert example.ids[: len(before)].tolist() == before
        assert not example.counted[example.ids == READ].any()
    assert len(found.kept[2].ways) == 2
    packed = PackedExamples(found.kept, 64, 1, loaded.config, seed=0, augment=True)
    assert packed[0]["media.tones.features"].shape == (9, VALUES)
    assert packed[0]["media.tones.grids"].tolist() == [[3]] * 3
    with pytest.raises(DataError, match="has a melody, and this model reads none"):
        read_examples([str(file)], loaded.tokenizer, seq_len=64, config=SHAPE)
    with pytest.raises(UsageError, match=r"2 <\|tones\|> in a text for 1 melodies"):
        content_ids("<|tones|><|tones|>", loaded.tokenizer, (melody,), loaded.config)


def test_bad_melodies(run: Path, melodies: Path) -> None:
    loaded = load_model(run)
    (melodies / "long.tones").write_text(json.dumps([[0.0, 0.0]] * (LONGEST + 1)))
    for bad, says in (("long", "line 1: .*not 1 to 50 tones"), ("none", "no melody none.tones")):
        file = melodies / "bad.jsonl"
        file.write_text(json.dumps({"tones": f"{bad}.tones", "text": "a"}))
        with pytest.raises(DataError, match=says):
            read_examples([str(file)], loaded.tokenizer, seq_len=64, config=loaded.config)
    text = LoopedTransformer(SHAPE)
    engine = Engine(text, loaded.tokenizer)
    melody = MEDIA["tones"].read(melodies / "0.tones", loaded.config)
    with pytest.raises(UsageError, match="this model reads no melodies"):
        engine.generate([MediaPrompt("", (melody,))])
    with pytest.raises(UsageError, match="this model writes no melodies"):
        engine.generate([MediaPrompt("", write="tones")])


def test_records_of_one_group_are_held_out_together(melodies: Path, colour_shards: Path) -> None:
    from looptx_core.data.mixture import MixedData

    lines = [json.loads(line) for line in (melodies / "all.jsonl").read_text().splitlines()]
    file = melodies / "grouped.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines if "group" in line))
    config = fit_vocabulary(
        MEDIA["tones"].enable(SHAPE), open_shards(colour_shards).manifest.vocab_size, False
    )
    data = MixedData(
        colour_shards, read_records([file]), config, seq_len=32, mix=(0, 1), micro_batch=2,
        batches=1,
    )  # fmt: skip
    held = {example.group for example in data.val_parts["records"].examples}
    trained = {example.group for example in data.train.parts[0].examples}
    assert held and trained and not held & trained
    assert len(data.val_parts["records"].examples) == 4 * len(held)

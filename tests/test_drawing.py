"""Models that draw: rows of codes, records that are written, and `generate --draw`."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import codec_cases
import numpy as np
import pytest
import torch
from PIL import Image

from looptx_cli.main import main
from looptx_core.checkpoint.codec_folder import load_codec, save_codec, with_codec
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import abilities
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data import mixture
from looptx_core.data.directions import in_directions
from looptx_core.data.encode_record import encode_record
from looptx_core.data.example import CODES_COUNT, Example, code_ranges, target_weights
from looptx_core.data.records import Record, read_records
from looptx_core.errors import DataError
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.inspection import written
from looptx_core.inspection.page import sentences
from looptx_core.inspection.report import inspect_loops
from looptx_core.media.registry import MEDIA, writers
from looptx_core.model.code_rows import fold_code_rows, share_code_rows
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.run import train

SHAPE = ModelConfig(
    d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, prelude_layers=1, core_layers=1,
    coda_layers=0, max_loops=2, max_seq_len=96, vision_layers=1, vision_width=24, patch_size=4,
    max_patches=4,
)  # fmt: skip
codec = partial(codec_cases.telling, seed=26)
"""One that has learned nothing, under which the colours have codes of their own."""
GREEDY = GenerationOptions(temperature=0, max_new_tokens=4)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour with its name, as records."""
    folder = tmp_path_factory.mktemp("drawings")
    named = codec_cases.write_pictures(folder / "all", 16)
    records = [{"image": f"all/{file}", "text": name, "group": file} for file, name in named]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def model_folder(
    drawings: Path, codec_folder: Path, config: ModelConfig, colour_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    settings = TrainConfig(
        steps=60, seq_len=32, batch_size=8, mix="0:1", lr=1e-2, val_every=60, val_batches=1,
        optimizer="adamw", save_every=60, augment=False, mean_loops=1.0, codec=str(codec_folder),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "a"
    result = train(
        settings, config, data=colour_shards, records=[drawings / "all.jsonl"], folder=out
    )
    assert result is not None
    return out / "final"


def asked(name: str) -> MediaPrompt:
    return MediaPrompt(name, write="image")


def test_it_draws_what_it_learned(writing_engine: Engine, drawings: Path) -> None:
    """Each colour by name, in a batch with others as alone."""
    writer = writing_engine.writers["image"]
    names = list(codec_cases.COLOURS)
    expected = [tuple(writer.encode(drawings / f"all/{n}.png")) for n in range(len(names))]
    assert len(set(expected)) == len(names)
    found = writing_engine.complete([asked(name) for name in names], GREEDY)
    assert [result.outputs[0].ids for result in found] == expected
    for name, result in zip(names, found):
        (alone,) = writing_engine.complete([asked(name)], GREEDY)
        assert [step.id for step in alone.tokens] == [step.id for step in result.tokens]
        assert [step.loops for step in alone.tokens] == [step.loops for step in result.tokens]
        assert result.text == ""
    (media,) = found[0].media
    assert media["codes"] == list(expected[0]) and media["kind"] == "image"
    assert media["loops"] == [step.loops for step in found[0].tokens]
    picture = Image.open(io.BytesIO(found[0].outputs[0].content))
    assert (picture.format, picture.size) == ("PNG", (8, 8))


def test_it_reads_too(
    writing_engine: Engine, writing: LoadedModel, drawings: Path, model_folder: Path
) -> None:
    item = MEDIA["image"].read(drawings / "all/2.png", writing.config)
    (said,) = writing_engine.complete([MediaPrompt("", (item,))], GREEDY)
    assert said.text.strip() == "blue" and not said.media
    assert abilities(model_folder) == {"weights", "vision", "drawing"}


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_guidance_by_its_definition(
    writing_engine: Engine, writing: LoadedModel, guidance: float
) -> None:
    """u + guidance (c - u), with c after the name and u after none; in a batch as alone."""
    first, codes = writing.config.draw.first_code, writing.config.draw.codes
    opens = writing.config.draw.token
    options = replace(GREEDY, loops=2, prompt_loops=2, guidance=guidance)
    results = writing_engine.complete([asked("green"), asked("black")], options)
    for name, result in zip(("green", "black"), results):
        ids = writing.tokenizer.encode(name, add_special_tokens=False).ids
        prompted, free = [writing_engine.end, *ids, opens], [writing_engine.end, opens]
        for step in result.tokens:
            with torch.no_grad():
                c, u = (
                    writing.model(torch.tensor([seen]), 2).logits[0, -1]
                    for seen in (prompted, free)
                )
            mixed = (u + guidance * (c - u))[first : first + codes]
            assert step.id == first + int(mixed.argmax())
            prompted.append(step.id)
            free.append(step.id)
    same = results[0].outputs[0].ids == results[1].outputs[0].ids
    assert same == (guidance == 0)  # the name says nothing then


def test_codes_in_pictures_and_words_in_texts(writing: LoadedModel) -> None:
    """Whatever the model wants: it has learned nothing, is hot and is punished for repeating."""
    torch.manual_seed(0)
    engine = Engine(LoopedTransformer(writing.config), writing.tokenizer)
    first = writing.config.draw.first_code
    for seed in range(4):
        options = GenerationOptions(
            temperature=9, max_new_tokens=9, seed=seed, ignore_eos=True, repetition_penalty=1.5
        )
        (result,) = engine.complete([asked("red")], options)
        ids = [step.id for step in result.tokens]
        assert all(id_ >= first for id_ in ids[:4]) and all(id_ < first for id_ in ids[4:])
        assert len(result.media) == 1
    (short,) = engine.complete([asked("red")], replace(options, max_new_tokens=3))
    assert not short.media and short.finish_reason == "length"


def test_an_inspection_maps_what_is_drawn(
    writing: LoadedModel, colour_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib import pyplot as plt

    from looptx_cli.inspect_loops import _show

    settings = InspectConfig(
        prompt="red", seq_len=16, val_batches=1, batch_size=4, decode_tokens=0, max_new_tokens=2
    )
    document, _ = inspect_loops(writing, colour_shards, settings)
    (found,) = document["written"]
    assert (found["kind"], found["rows"], found["columns"]) == ("image", 2, 2)
    assert found["seconds"] is None and len(found["confidence_by_loop"]) == 2
    assert np.array(found["shown"]).shape == (8, 8, 3)
    assert any("the picture 'red': 4 codes" in said for said in sentences(document))
    capsys.readouterr()
    _show(document)
    assert "the picture 'red': loops, and how sure" in capsys.readouterr().out
    ((title, (name, draw, count)),) = written.figures(found, 1).items()
    assert "'red'" in title and name == "written-1.png"
    figure, axes = plt.subplots(1, count)
    draw(axes)
    assert np.array_equal(axes[1].images[0].get_array(), np.reshape(found["loops"], (2, 2)))
    plt.close(figure)


@pytest.mark.parametrize("tied", [True, False])
def test_shared_rows_become_ordinary_ones(config: ModelConfig, tied: bool) -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(replace(config, tie_embeddings=tied)).double()
    share_code_rows(model)
    assert model.code_rows is not None
    model.double()
    first, codes = config.draw.first_code, config.draw.codes
    assert not model.embedding.weight[first : first + codes].any()
    tokens = torch.tensor([[3, 40, config.draw.token, first, first + 5, first + codes - 1, 7]])
    before = model(tokens, 2).logits
    before.square().sum().backward()
    (shared,) = model.code_rows.each
    assert shared.table.grad is not None and shared.table.grad.any()
    fold_code_rows(model)
    assert model.code_rows is None
    assert torch.allclose(model(tokens, 2).logits, before, atol=1e-12)
    rows = model.embedding.weight[first : first + codes]
    a, b, c, d = rows[0], rows[1], rows[3], rows[4]  # of levels 3, 2, 2
    assert torch.allclose(b - a, d - c, atol=1e-12)


def test_records_in_both_directions(
    drawings: Path, config: ModelConfig, writing: LoadedModel
) -> None:
    records = read_records([drawings / "all.jsonl"])
    assert in_directions(records, "both", ()) is records
    read, write, both = (
        in_directions(records, direction, writers(config)).records
        for direction in ("read", "write", "both")
    )
    assert (len(read), len(write), len(both)) == (16, 16, 32)
    example = encode_record(write[0], writing.tokenizer, config)
    draw = config.draw
    codes = writers(config)["image"].encode(drawings / "all/0.png")
    name = writing.tokenizer.encode("red", add_special_tokens=False).ids
    assert example.ids.tolist() == [0, *name, draw.token, *codes, 0]
    assert example.counted.tolist() == [False] * (len(name) + 2) + [True] * 5
    unasked = [way for way in example.ways if way.ids.tolist() == [0, draw.token, *codes, 0]]
    assert len(example.ways) == 10 and len(unasked) == 1
    assert both[0].group == both[1].group == "0.png"
    ranges = code_ranges(config)
    assert target_weights(example, ranges)[example.counted].tolist() == [1.0] * 5
    ids = np.array([0, draw.token, *codes * 25, 0])
    long = example._replace(ids=ids, counted=np.arange(len(ids)) > 1)
    targets = target_weights(long, ranges)
    assert targets[-1] == 1 and targets[:-1].sum() == pytest.approx(CODES_COUNT)
    with pytest.raises(DataError, match="writes no pictures"):
        encode_record(write[0], writing.tokenizer, SHAPE)


def test_where_nothing_is_trained_only_what_is_held_out_is_encoded(
    drawings: Path, config: ModelConfig, colour_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, encoded = read_records([drawings / "all.jsonl"]), []

    def noted(record: Record, *others: object) -> Example:
        encoded.append(record.where)
        return encode_record(record, *others)

    monkeypatch.setattr(mixture, "encode_record", noted)
    shape = {"seq_len": 32, "mix": (0, 1), "direction": "both", "micro_batch": 2, "batches": 1}
    whole = mixture.MixedData(colour_shards, records, config, **shape)
    assert len(encoded) == 32
    encoded.clear()
    held = mixture.MixedData(colour_shards, records, config, **shape, held_out_only=True)
    assert 2 <= len(encoded) < 8 and len(held.val) == len(whole.val) and not len(held.train)
    for ours, theirs in zip(held.val_dataloader(), whole.val_dataloader(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_codec_is_refused(
    config: ModelConfig, codec_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    save_codec(tmp_path / "d", codec_cases.build(seed=2), {})
    with pytest.raises(DataError, match="another codec"):
        with_codec(config, tmp_path / "d")
    assert with_codec(config, codec_folder).draw.codec == config.draw.codec
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    (copy / "digests.json").unlink()
    shutil.rmtree(copy / "codec-picture")
    with pytest.raises(DataError, match="codec-picture, by which it draws, is missing"):
        load_model(copy)
    shutil.copytree(tmp_path / "d", copy / "codec-picture")
    with pytest.raises(DataError, match="another codec"):
        load_model(copy)


def test_the_commands(
    model_folder: Path, drawings: Path, codec_folder: Path, colour_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    draw = ["generate", "red", "--model", str(model_folder), "--temperature", "0", "--draw"]
    assert main([*draw, "a.png", "--json", "--show-iterations", "--guidance", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    (media,) = document["media"]
    assert media["file"] == "a.png" and len(media["codes"]) == len(media["confidence"]) == 4
    assert media["codes"] == [token["id"] for token in document["tokens"]]
    assert document["text"] == "" and media["seconds"] is None and media["elapsed"] > 0
    with Image.open("a.png") as picture, Image.open("a-iterations.png") as beside:
        assert picture.size == (8, 8) and beside.size == (3 * 48 + 2 * 24, 48)
    assert main([*draw, "a.jpg", "--show-iterations", "--draw-steps", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "a.jpg" and len(shown.out.splitlines()) == 4
    assert "4 codes" in shown.err
    with Image.open("a.jpg") as picture:
        assert picture.format == "JPEG"
    assert main([*draw, "a.png", "--quiet"]) == 0  # its own kind is replaced
    (tmp_path / "text.png").write_text("no picture")
    capsys.readouterr()
    for arguments, code, says in (
        ([*draw, "text.png"], 2, "no PNG picture, so it is not replaced"),
        ([*draw, str(tmp_path)], 2, "a folder"),
        ([*draw, "a.txt"], 2, "ends in .png"),
        ([*draw, "none/a.png"], 2, "no folder none"),
        ([*draw, "a" * 300 + ".png"], 2, "File name too long; choose another name"),
        ([*draw, "b.png", "--draw-steps", "0"], 2, "--draw-steps must lie between"),
        ([*draw, "b.png", "--draw-steps", "10000"], 2, "--draw-steps must lie between"),
        ([*draw, "b.png", "--guidance", "nan"], 2, "--guidance"),
        ([*draw, "b.png", "--max-new-tokens", "3"], 2, "a picture takes 4"),
        ([*draw, "b.png", "--guidance", "2", "--speculate", "2"], 2, "exclude each other"),
        ([*draw, "b.png", "blue"], 2, "one prompt"),
        (["generate", "red " * 90, "--model", str(model_folder), "--draw", "b.png"], 2, "shorten"),
    ):
        assert main(arguments) == code, arguments
        assert says in capsys.readouterr().err
    assert not Path("b.png").exists()


def test_training_resumes_by_its_codec(
    drawings: Path, codec_folder: Path, colour_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "core_layers", "max_loops")
    shape = {key: getattr(SHAPE, key) for key in (*keys, "vision_layers", "vision_width")}
    settings = {"seq_len": 32, "batch_size": 4, "val_batches": 1, "model": shape}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    own = tmp_path / "codec"
    codec, _ = load_codec(codec_folder)
    save_codec(own, codec, {})
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--data", str(colour_shards)]
    command += ["--data", str(drawings / "all.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*command, "--direction", "write", "--steps", "1"]) == 2
    assert "--direction write needs a codec" in capsys.readouterr().err
    assert main([*command, "--codec", str(drawings), "--dry-run"]) == 4
    assert "codec.json is missing" in capsys.readouterr().err
    assert main([*command, "--codec", str(own), "--direction", "write", "--steps", "2"]) == 0
    before = load_model(tmp_path / "run/final")
    assert before.config.draw.codes == 12
    resume = ["train", "--resume", str(tmp_path / "run"), "--steps"]
    assert main([*resume, "3"]) == 0
    assert load_model(tmp_path / "run/final").config.draw == before.config.draw
    save_codec(own, codec_cases.build(seed=2), {})
    assert main([*resume, "4"]) == 4
    assert "another codec" in capsys.readouterr().err


def test_a_map_replaces_no_file_of_another_kind(tmp_path: Path) -> None:
    from looptx_cli.main import main

    (tmp_path / "a-iterations.png").write_text("notes")
    drawing = ["generate", "x", "--draw", str(tmp_path / "a.jpg"), "--show-iterations"]
    assert main(drawing) == 2
    assert (tmp_path / "a-iterations.png").read_text() == "notes"


def test_the_bundled_model_draws_in_colour(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drawn = tmp_path / "tomato.png"
    flags = ["--guidance", "2", "--loops", "1", "--json", "--quiet"]
    assert main(["generate", "tomato, noto", "--draw", str(drawn), *flags]) == 0
    (media,) = json.loads(capsys.readouterr().out)["media"]
    assert (media["kind"], len(media["codes"])) == ("image", 36)
    red, green, blue = Image.open(drawn).convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > green + 20 and red > blue + 20

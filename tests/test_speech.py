"""Models that speak: mels and sound, alignment, the order of text and codes, `generate --speak`."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speech_cases
import torch

from looptx_cli.main import main
from looptx_core.checkpoint.codec_folder import load_codec
from looptx_core.checkpoint.folder import LoadedModel, load_model, save_model
from looptx_core.checkpoint.registry import abilities
from looptx_core.config.codec import SHAPES, CodecConfig
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.data.directions import in_directions
from looptx_core.data.encode_record import encode_record
from looptx_core.data.records import read_records
from looptx_core.data.tokenizer import load_tokenizer
from looptx_core.errors import DataError, UsageError
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.generation.request import Generation
from looptx_core.inspection import written
from looptx_core.inspection.written import inspect_written
from looptx_core.media.audio import align, speak, vocoder
from looptx_core.media.audio.coded import frames_of, grid_of, stretches, to_frames, to_patches
from looptx_core.media.audio.read import item_of, samples_of
from looptx_core.media.registry import MEDIA, writers
from looptx_core.model.loop import LoopedTransformer

SHAPE = ModelConfig(
    d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, prelude_layers=1, core_layers=1,
    coda_layers=0, max_loops=3, max_seq_len=400,
)  # fmt: skip
SHAPE = replace(SHAPE, audio=replace(SHAPE.audio, layers=1, width=24))
OPTIONS = GenerationOptions(temperature=0.9, max_new_tokens=390, draw_steps=1)
codec = speech_cases.build
SOUND = Path("looptx_core/assets/samples/hello.wav")


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """No token of a text is spoken for long, as a model that has learned nothing would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speak, "TOKEN_SECONDS", 0.2)
        yield


@pytest.fixture(scope="module")
def model_folder(
    config: ModelConfig, colour_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that has learned nothing, so that it says anything that it may."""
    torch.manual_seed(4)
    model = LoopedTransformer(config)
    out = tmp_path_factory.mktemp("models") / "speaker"
    tokenizer = load_tokenizer(str(colour_shards))
    return save_model(out, model, tokenizer, exit_settings=ExitSettings(), facts={})


def asked(text: str) -> MediaPrompt:
    return MediaPrompt(text, write="audio")


def test_mels_are_cut_and_come_back() -> None:
    config = CodecConfig(kind="speech", **SHAPES["speech"])
    frames = frames_of(torch.from_numpy(speech_cases.tone(700, 0.97)))
    assert frames.max() == 1 and frames.min() >= -1
    patches = to_patches(frames, config)
    assert grid_of(patches, config) == (-(-len(frames) // 4), 2)
    again = to_frames(patches, config)
    assert torch.equal(again[: len(frames)], frames) and (again[len(frames) :] == -1).all()
    assert 2 * config.bits / 0.04 <= 500
    nothing = frames_of(torch.zeros(3200))
    assert (nothing == -1).all()
    pieces = stretches(torch.cat([frames, frames]), config)
    assert pieces.shape[1:] == (64, 160) and len(pieces) > 2
    assert torch.equal(pieces[0], to_patches(torch.cat([frames, frames])[:128], config))


def test_sound_of_mels_has_these_mels() -> None:
    frames = frames_of(torch.from_numpy(samples_of(SOUND, "hello", 9)))
    sound = vocoder.to_sound(frames, seed=1)
    again = frames_of(torch.from_numpy(sound))[: len(frames)]
    loud = frames > -0.25
    assert (again - frames)[loud].abs().mean() * 40 < 2.5  # decibels
    assert np.array_equal(sound, vocoder.to_sound(frames, seed=1))
    assert not np.array_equal(sound, vocoder.to_sound(frames, seed=2))
    assert np.abs(sound).max() == pytest.approx(vocoder.LOUDEST)
    vocoder.use_vocoder(lambda mels, seed: torch.full((len(mels),), float(seed)))
    try:
        assert vocoder.to_sound(frames, seed=3).tolist() == [pytest.approx(0.7)] * len(frames)
    finally:
        vocoder.use_vocoder(None)


def test_a_window_makes_codes_of_any_length() -> None:
    """A code depends on its neighbourhood alone, in the encoder and in the detokeniser."""
    codec = speech_cases.build()
    patches = torch.rand(1, 60, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = codec.encode(patches, (30, 2))
    numbers = codec.encoder(patches, (30, 2)), codec.encoder(patches[:, :40], (20, 2))
    assert torch.allclose(numbers[0][:, :32], numbers[1][:, :32], atol=1e-5)
    assert not torch.allclose(numbers[0][:, :40], numbers[1], atol=1e-3)
    once = codec.decode(whole, (30, 2), steps=1, loops=1)
    assert torch.equal(once, codec.decode(whole, (30, 2), steps=1, loops=1))
    assert torch.equal(codec.quantiser.codes(codec.quantiser.values(whole)), whole)


def test_the_most_likely_spelling_by_trying_all() -> None:
    draw = np.random.default_rng(0)
    for label in ([1, 2], [1, 1], [2], [1, 2, 1]):
        scores = np.log(draw.dirichlet(np.ones(3), 6))
        best, way = -np.inf, ()
        for path in itertools.product(range(3), repeat=6):
            if [s for s, _ in itertools.groupby(path) if s] != label:
                continue
            score = sum(scores[row, symbol] for row, symbol in enumerate(path))
            best, way = max((best, way), (score, path))
        runs = [(s, [row for row, _ in some]) for s, some in
                itertools.groupby(enumerate(way), key=lambda e: e[1])]  # fmt: skip
        expected = [(rows[0], rows[-1]) for symbol, rows in runs if symbol]
        assert list(zip(*align.spell(scores, label))) == expected


def test_words_are_found_in_a_recording(codec_folder: Path) -> None:
    load_codec(codec_folder)  # names the bundled recogniser
    samples = samples_of(SOUND, "hello", 9)
    item, encoder = item_of(samples), align.recogniser()
    middle, end = align.frames_of_tokens(item, [b"hello", b" world"], encoder, "x")
    assert 0.3 < middle / (len(samples) / 160) < 0.65 and end == 8 * len(item.features)
    with pytest.raises(DataError, match="too long for what is heard"):
        align.frames_of_tokens(item, [b"many words" * 20], encoder, "x")


def test_text_leads_its_codes_token_by_token(
    writing: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speak, "frames_of_tokens", speech_cases.even)
    records = read_records([speech_cases.write_records(tmp_path / "all", 4)])
    writer = writers(writing.config)["audio"]
    ways = {direction: in_directions(records, direction, ["audio"]).records
            for direction in ("read", "write", "both")}  # fmt: skip
    assert [len(some) for some in ways.values()] == [4, 4, 8]
    example = encode_record(ways["write"][1], writing.tokenizer, writing.config)
    assert not example.others  # speech is written to a text alone
    words = writing.tokenizer.encode("green red", add_special_tokens=False).ids
    ids = example.ids.tolist()
    assert ids[: len(words) + 2] == [0, *words, writer.opens] and ids[-2:] == [writer.closes, 0]
    written, codec = ids[len(words) + 2 : -1], writer.codec
    assert writer.is_open(written[:-1], words) and writer.finished(written, words)
    assert [token for token in written if token < writer.first_code] == [
        token for word in words for token in (word, writer.closes)
    ]
    samples = samples_of(tmp_path / "all/1.wav", "x", 9)
    patches = to_patches(frames_of(torch.from_numpy(samples)), codec.config)
    codes = codec.encode(patches[None], grid_of(patches, codec.config))[0] + writer.first_code
    assert [token for token in written if token in writer.code_ids] == codes.tolist()
    counted = [token in writer.code_ids or token == writer.closes for token in written]
    assert example.counted.tolist() == [False] * (len(words) + 2) + counted + [True]


def test_what_may_follow(writing: LoadedModel) -> None:
    writer = writers(writing.config)["audio"]
    code, close, opens = writer.first_code, writer.closes, writer.opens
    codes = list(writer.code_ids)
    assert writer.transcript([0, 40, 41, code, close, 50, 51]) == [50, 51]
    said = [50, 51]
    assert list(writer.allowed([], said)) == [50]
    assert list(writer.allowed([50], said)) == [*codes, close]
    assert list(writer.allowed([50, code], said)) == codes  # both bands of a moment
    assert list(writer.allowed([50, close], said)) == [51]
    assert list(writer.allowed([50, close, 51], said)) == codes  # something is said
    full = [50, *[code] * writer.codes_of(speak.TOKEN_SECONDS)]
    assert list(writer.allowed(full, said)) == [close]
    assert list(writer.allowed([], [])) == codes
    assert not writer.finished([50, close, 51, code, code], said)
    assert writer.finished([50, close, 51, code, code, close], said)
    for broken in ([51], [50, 50], [50, close, 50], [opens]):
        assert not writer.is_open(broken, said)


def spoken(result: Generation, engine: Engine) -> list[int]:
    """The tokens of the text within a speech."""
    writer = engine.writers["audio"]
    (output,) = result.outputs
    return [token for token in output.ids if token < writer.first_code and token != writer.closes]


def test_every_word_once_and_in_order(writing_engine: Engine) -> None:
    texts = ["red green", "black", "a whale and a ship"]
    each = [replace(OPTIONS, seed=n, loops=1 + n) for n in range(3)]
    found = writing_engine.complete([asked(text) for text in texts], each)
    for text, own, result in zip(texts, each, found):
        assert spoken(result, writing_engine) == writing_engine.tokenizer.encode(text).ids
        assert result.finish_reason == "end" and result.text == ""
        (alone,) = writing_engine.complete([asked(text)], [own])
        assert [step.id for step in alone.tokens] == [step.id for step in result.tokens]
        (media,), (output,) = result.media, result.outputs
        assert media["kind"] == "audio" and set(media["loops"]) == {own.loops}
        assert len(media["codes"]) == len(media["confidence"]) == media["seconds"] / 0.04 * 2
        samples, rate = soundfile.read(io.BytesIO(output.content))
        assert rate == 16_000 and len(samples) == pytest.approx(rate * media["seconds"])
        assert output.content == alone.outputs[0].content
    with pytest.raises(UsageError, match="`guidance`"):
        writing_engine.complete([asked("red")], replace(OPTIONS, guidance=2.0))


def test_a_speech_in_an_answer_ends_and_text_goes_on(writing_engine: Engine) -> None:
    writer = writing_engine.writers["audio"]
    words = writing_engine.tokenizer.encode("red green").ids
    options = replace(OPTIONS, ignore_eos=True, max_new_tokens=380)
    (result,) = writing_engine.complete([[0, *words, writer.opens]], options)
    output = result.outputs[0]
    others = result.tokens[len(output.ids) :]
    after = list(itertools.takewhile(lambda step: step.id != writer.opens, others))
    assert after and not any(step.id in writer.code_ids for step in after)


def test_an_inspection_maps_the_codes_over_time(
    writing: LoadedModel, writing_engine: Engine
) -> None:
    deep = replace(writing.exit, min_loops=3)
    (found,) = inspect_written(writing, "red green", deep, 3, seed=1, report=print)
    engine = Engine(writing.model, writing.tokenizer, deep)
    (result,) = engine.complete(
        [asked("red green")], GenerationOptions(seed=1, max_new_tokens=390, draw_steps=1)
    )
    (media,) = result.media
    assert (found["kind"], found["columns"]) == ("audio", 2)
    assert found["rows"] * 2 == len(media["codes"]) and found["seconds"] == media["seconds"]
    assert found["loops"] == media["loops"] == [3] * len(media["codes"])
    assert found["confidence"] == pytest.approx(media["confidence"], abs=1e-4)
    assert found["confidence_by_loop"][2] == pytest.approx(media["confidence"], abs=2e-4)
    assert found["confidence_by_loop"][0] != found["confidence_by_loop"][2]
    assert len(found["shown"]) == 80 and len(found["shown"][0]) >= 4 * found["rows"]
    lines = written.lines(found)
    assert lines[1].split()[:2] == ["seconds", "0.00"] and len(lines) == 4 + 3
    mean = sum(found["confidence"][:2]) / 2 if found["rows"] <= 16 else None
    assert mean is None or lines[3].split()[2] == f"{100 * mean:.0f}"


def test_speaking(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    say = ["generate", "red green", "--model", str(model_folder), "--draw-steps", "1", "--speak"]
    assert main([*say, "a.wav", "--json", "--show-iterations"]) == 0
    document = json.loads(capsys.readouterr().out)
    (media,) = document["media"]
    assert media["file"] == "a.wav" and document["text"] == "" and media["seconds"] > 0
    assert len(media["codes"]) == len(media["loops"]) == len(media["confidence"])
    assert soundfile.info("a.wav").duration == pytest.approx(media["seconds"])
    with Image.open("a-iterations.png") as beside:
        assert beside.size == (len(media["codes"]) // 2 * 12, 160 + 2 * 24 + 2 * 8)
    assert main([*say, "a.flac", "--show-iterations"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "a.flac" and len(lines) == 2 + len(
        load_tokenizer(str(model_folder)).encode("red green").ids
    )
    assert "codes to sound" in shown.err and soundfile.info("a.flac").format == "FLAC"
    assert main([*say, "a.ogg", "--quiet"]) == 0 and main([*say, "a.ogg", "--quiet"]) == 0
    (tmp_path / "text.wav").write_text("no sound")
    capsys.readouterr()
    long, none = "red " * 10_000, str(SOUND.parent)
    for arguments, code, says in (
        ([*say, "text.wav"], 2, "no WAV recording, so it is not replaced"),
        ([*say, str(tmp_path)], 2, "a folder"),
        ([*say, "a.mp3"], 2, "ends in .wav"),
        ([*say, "none/a.wav"], 2, "no folder none"),
        ([*say, "b.wav", "--draw", "b.png"], 2, "exclude each other"),
        ([*say, "b.wav", "--guidance", "2"], 2, "guidance"),
        ([*say, "b.wav", "--max-new-tokens", "2"], 1, "--max-new-tokens"),
        (["generate", long, "--model", str(model_folder), "--speak", "b.wav"], 2, "shorten"),
        (["generate", "", "--model", str(model_folder), "--speak", "b.wav"], 2, "a text to say"),
        (["generate", " \n", "--model", str(model_folder), "--speak", "b.wav"], 2, "a text to say"),
        (["generate", "a", "--model", none, "--speak", "b.wav"], 4, ""),
    ):
        assert main(arguments) == code, arguments[2:]
        assert says in capsys.readouterr().err
    assert not Path("b.wav").exists()


def test_a_model_learns_to_speak_by_the_command(
    colour_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speak, "frames_of_tokens", speech_cases.even)
    file = speech_cases.write_records(tmp_path / "all", 12)
    small = ["encoder_layers=1", "encoder_width=32", "width=32", "max_loops=2", "rows=8"]
    tokenize = ["tokenize", "--codec", "speech", str(file), "--steps", "2", "--batch-size", "4"]
    tokenize += [part for key in small for part in ("--set", f"codec_model.{key}")]
    assert main([*tokenize, "--out", "c", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["codec"] == "speech" and report["bits"] < 500 and report["mel_error"]["1"] > 0
    assert main([*tokenize, "--out", "d", "--set", "codec_model.columns=3"]) == 2
    assert "a patch of speech" in capsys.readouterr().err
    keys = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "core_layers", "max_loops")
    shape = {key: getattr(SHAPE, key) for key in keys} | {"audio": {"layers": 1, "width": 24}}
    settings = {"seq_len": 200, "batch_size": 2, "val_batches": 1, "steps": 2, "model": shape}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    command = ["train", "--config", "c.yaml", "--data", str(colour_shards), "--data", str(file)]
    assert main([*command, "--codec", "c", "--out", "run", "--mix", "0:1"]) == 0
    assert "--speak" in capsys.readouterr().err
    assert abilities(tmp_path / "run/final") == {"weights", "hearing", "speaking"}
    found = load_model(tmp_path / "run/final")
    assert found.config.speak.codes == 1000 and found.model.code_rows is None
    (result,) = Engine(found.model, found.tokenizer).complete([asked("red")], OPTIONS)
    assert result.outputs
    assert MEDIA["audio"].writer(found.config) is not None

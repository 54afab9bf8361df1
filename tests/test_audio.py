"""Recordings: read within limits, as Whisper's features, encoded, heard, and learned from."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_cases import HEARING, RATE, mels, spoken, write_recordings

from looptx_core.backends.select import select_backend
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.example import Example, unlabelled
from looptx_core.data.examples import PackedExamples, read_examples
from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.media.audio.features import log_mels
from looptx_core.media.batch import MediaItem, batch_items, lay_out
from looptx_core.media.registry import MEDIA
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

AUDIO = MEDIA["audio"]
TOKEN = HEARING.audio.token


def wav(samples: np.ndarray, rate: int = RATE, **how: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **how})
    return file.getvalue()


def model_of(config: ModelConfig = HEARING, seed: int = 0) -> LoopedTransformer:
    torch.manual_seed(seed)
    return LoopedTransformer(config).eval()


def test_log_mels_are_whispers() -> None:
    transformers = pytest.importorskip("transformers")
    sound = spoken(["low", "high", "mid"], seed=3)
    sound = np.pad(sound, (0, -len(sound) % 1280))
    extractor = transformers.WhisperFeatureExtractor()
    wanted = extractor(sound, sampling_rate=RATE, return_tensors="np", padding=False)
    found = log_mels(torch.from_numpy(sound)).view(-1, 80).T
    assert np.abs(wanted["input_features"][0] - found.numpy()).max() < 1e-4
    padded = log_mels(torch.from_numpy(sound[:-700]))
    assert padded.shape == log_mels(torch.from_numpy(sound)).shape


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_formats_rates_and_channels(form: str) -> None:
    """One second of a tone by any file is the same tone."""
    time = np.arange(48_000) / 48_000
    tone = np.stack([0.4 * np.sin(2 * np.pi * 440 * time)] * 2, 1).astype(np.float32)
    content = wav(tone, 48_000, format=form)
    assert AUDIO.measure(content, HEARING) == (13,)
    item = AUDIO.read(content, HEARING)
    assert item.grid == (13,) and item.features.shape == (13, 640)
    plain = log_mels(torch.from_numpy(tone[::3, 0].copy())).view(-1, 80)[8:-16]
    loud = plain > plain.max() - 0.5
    assert (item.features.view(-1, 80)[8:-16] - plain)[loud].abs().max() < 0.1


def test_eight_channels_at_192_khz() -> None:
    sound = np.zeros((192_000, 8), np.float32)
    sound[:, 3] = np.sin(np.arange(192_000) / 100)
    item = AUDIO.read(wav(sound, 192_000), HEARING)
    assert item.grid == (13,) and item.features.max() > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"RIFF nothing of a sound", "not a recording that can be read"),
        (b"", "not a recording that can be read"),
        (wav(np.zeros(0, np.float32)), "without samples"),
        (wav(np.full(16_000, np.nan, np.float32), subtype="FLOAT"), "no numbers"),
        (wav(np.zeros(31 * RATE, np.float32)), r"0:31\.0 long or more, and this model hears 30 s"),
    ],
)
def test_bad_recordings(content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        AUDIO.read(content, HEARING, "x.wav")


def test_a_recording_of_one_sample_is_silence() -> None:
    """At 48 kHz nothing of it is left at 16 kHz."""
    short = io.BytesIO()
    soundfile.write(short, np.zeros(1, np.float32), 48_000, format="WAV")
    assert AUDIO.read(short.getvalue(), HEARING, "x.wav").grid == (1,)


def test_what_a_header_claims(tmp_path: Path) -> None:
    flac = wav(spoken(["low"] * 9), format="FLAC", subtype="PCM_16")
    with pytest.raises(DataError, match=r"truncated|not a recording"):
        AUDIO.read(flac[: len(flac) // 2], HEARING)
    whole = wav(spoken(["low"]))
    for cut in (whole[:100], wav(spoken(["low"]), format="AIFF", subtype="PCM_16")[:100]):
        with pytest.raises(DataError, match=r"holds 100 of the [\d,]+ bytes"):
            AUDIO.read(cut, HEARING)
    lies = bytearray(whole)
    lies[40:44] = (2**31 - 1).to_bytes(4, "little")
    honest = AUDIO.read(wav(spoken(["low"])), HEARING)
    assert torch.equal(AUDIO.read(bytes(lies), HEARING).features, honest.features)
    with pytest.raises(DataError, match=r"no such recording; check the path"):
        AUDIO.read(tmp_path / "none.wav", HEARING)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match="not a regular file"):
        AUDIO.read(tmp_path / "pipe.wav", HEARING)


def test_three_hours_are_refused_by_the_header(tmp_path: Path) -> None:
    file = tmp_path / "long.wav"
    with soundfile.SoundFile(file, "w", 8000, 1, "PCM_U8") as long:
        for _ in range(108):
            long.write(np.zeros(8000 * 100, np.int16))
    with pytest.raises(DataError, match=r"long\.wav: 3:00:00\.0 long or more"):
        AUDIO.measure(file, HEARING)


def test_the_sound_of_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(spoken(["low"] * 5)[None], "fltp", "mono")
        frame.rate = 16_000
        for part in (frame, None):
            container.mux(sound.encode(part))
    item = AUDIO.read(file, HEARING)
    plain = AUDIO.read(wav(spoken(["low"] * 5)), HEARING)
    assert abs(item.length - plain.length) <= 2
    cut = min(item.length, plain.length) - 2
    assert (item.features[:cut] - plain.features[:cut]).abs().mean() < 0.2
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingError, match=r"pip install 'looptx\[video\]'"):
        AUDIO.read(file, HEARING)


def test_a_batch_equals_single_recordings() -> None:
    """In the encoder, and after the loops, with text and in any order."""
    model = model_of().double()
    items = [MediaItem("audio", mels(n, n).double(), (n,)) for n in (5, 2, 7)]
    encoder = model.encoders()["audio"]
    together = encoder(batch_items(items)["audio"]).vectors.split([5, 2, 7])
    for item, found in zip(items, together):
        assert torch.allclose(encoder(batch_items([item])["audio"]).vectors, found, atol=1e-9)
    rows = [torch.tensor([[0, *[TOKEN] * n, *range(20, 32 - n)]]) for n in (5, 2, 7)]
    batch = model(torch.cat(rows), 2, media=batch_items(items)).logits
    for row, item, found in zip(rows, items, batch):
        alone = model(row, 2, media=batch_items([item])).logits[0]
        assert torch.allclose(alone, found, atol=1e-9)


@pytest.mark.parametrize("attention", ["causal", "both"])
def test_cached_equals_uncached(attention: Any) -> None:
    """A recording before the text, and one after it: the cache goes on where it stands."""
    audio = replace(HEARING.audio, attention=attention)
    model = model_of(replace(HEARING, audio=audio)).double()
    items = [MediaItem("audio", mels(n, n).double(), (n,)) for n in (4, 3)]
    parts = [[0, *[TOKEN] * 4, 21, 22], [23], [*[TOKEN] * 3, 24], [25]]
    tokens = torch.tensor([[token for part in parts for token in part]])
    whole = model(tokens, 2, media=batch_items(items)).logits
    cache, found = model.new_cache(1, 32, 2), []
    for part, item in zip(parts, (items[0], None, items[1], None)):
        media = batch_items([item]) if item else None
        found.append(model(torch.tensor([part]), 2, cache=cache, media=media).logits)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-9)


def test_text_is_as_it_would_be_without_ears() -> None:
    model, deaf = model_of(), LoopedTransformer(replace(HEARING, audio=ModelConfig().audio))
    deaf.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("hearing.")}
    )
    tokens = torch.arange(20, 50)[None]
    assert torch.equal(model(tokens, 3).logits, deaf.eval()(tokens, 3).logits)
    picture_model = model_of(replace(HEARING, vision_layers=1, vision_width=24))
    media = batch_items([MediaItem("audio", mels(2), (2,))])
    layout = lay_out(torch.tensor([[0, TOKEN, TOKEN, 9]]), media, picture_model.config)
    assert layout.positions.tolist() == [[[0, 1, 2, 3]]] * 2


def test_the_kernel_goes_on_after_a_recording() -> None:
    """The prompt runs by torch, what follows by the kernel, with the same states."""
    model = model_of()
    kernel, why = select_backend(model, "auto")
    if kernel.name != "native":
        pytest.skip(why)
    torch_backend, _ = select_backend(model, "torch")
    tokens = torch.tensor([[0, *[TOKEN] * 6, 21]])
    media, logits = batch_items([MediaItem("audio", mels(6), (6,))]), []
    for backend in (kernel, torch_backend):
        cache = model.new_cache(1, 32, 2)
        run = backend.begin(cache, [0], tokens.shape[1], tokens, media)
        start = run.embed(tokens)
        run.logits(run.iterate(start, start, [1], 2))
        cache.view(tokens.shape[1], [0]).advance()
        run = backend.begin(cache, [0])
        start = run.embed(torch.tensor([[22]]))
        logits.append(run.logits(run.iterate(start, start, [1], 2)))
    assert torch.allclose(*logits, atol=1e-4)


def test_ctc_is_torchs_over_the_bytes_and_skips_what_does_not_fit() -> None:
    model = model_of().train()
    labels = [AUDIO.label("Ab", (3,)), None, AUDIO.label("", (2,))]
    items = [MediaItem("audio", mels(n, n), (n,), label) for n, label in zip((3, 4, 2), labels)]
    encoder = model.encoders()["audio"]
    loss = encoder(batch_items(items)["audio"], with_loss=True).loss
    wanted, states = torch.zeros(()), []
    hook = encoder.norm.register_forward_hook(lambda _, __, out: states.append(out))
    for item, text in ((items[0], b"ab"), (items[2], b"")):
        encoder(batch_items([item])["audio"])
        scores = encoder.ctc(states.pop()[0]).log_softmax(-1)
        target = torch.tensor([[byte + 1 for byte in text]], dtype=torch.long)
        wanted = wanted + torch.nn.functional.ctc_loss(
            scores[:, None], target, [len(scores)], [len(text)], reduction="sum"
        )
    hook.remove()
    assert torch.allclose(loss, wanted / 2, rtol=1e-4)
    assert AUDIO.label("aab", (2,)) is not None
    assert AUDIO.label("aabb", (2,)) is None
    nothing = encoder(batch_items([items[1]])["audio"], with_loss=True).loss
    assert nothing == 0 and nothing.requires_grad


def test_the_objective_has_its_share_of_ctc() -> None:
    model = model_of().train()
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=1, max_loops=1), 1)
    tokens = torch.tensor([[0, *[TOKEN] * 3, 21, 22, 0]])
    weights = torch.tensor([[0.0, 0, 0, 1, 1, 1]])

    def loss(label: torch.Tensor | None, progress: float) -> Any:
        media = batch_items([MediaItem("audio", mels(3), (3,), label)])
        return loop_loss(
            model, tokens, schedule, 0, torch.tensor([0]), weights=weights, media=media,
            progress=progress,
        )  # fmt: skip

    label = AUDIO.label("ab", (3,))
    without, first, last = loss(None, 0.0), loss(label, 0.0), loss(label, 1.0)
    ctc = first.by_labels["audio"]
    assert without.by_labels["audio"] == 0 and ctc > 0
    assert torch.allclose(first.loss - without.loss, 0.3 * ctc, atol=1e-5)
    assert torch.allclose(last.loss - without.loss, 0.1 * ctc, atol=1e-5)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def examples(recordings: Path, bundled_tokenizer: Any) -> list[Example]:
    found = read_examples([str(recordings)], bundled_tokenizer, seq_len=64, config=_sized())
    assert found.media == {"audio": 24}
    return found.kept


@pytest.fixture(scope="module")
def bundled_tokenizer() -> Any:
    from looptx_core.checkpoint.registry import bundled_model
    from looptx_core.data.tokenizer import load_tokenizer

    return load_tokenizer(bundled_model() / "tokenizer.json")


def _sized() -> ModelConfig:
    return replace(HEARING, vocab_size=4096)


def test_augmented_recordings_are_a_function_of_seed_epoch_and_number(
    examples: list[Example],
) -> None:
    """Their length changes with their speed, and their places in the sequence with it."""
    how = (64, 1, _sized())
    packed = PackedExamples(examples, *how, seed=5, augment=True)
    again = PackedExamples(examples, *how, seed=5, augment=True)
    plain = PackedExamples(examples, *how)
    lengths, blanks = set(), 0
    for index in range(4 * len(packed)):
        sample, same = packed[index], again[index]
        assert all(torch.equal(sample[key], same[key]) for key in sample)
        grids = sample["media.audio.grids"][:, 0]
        assert int((sample["tokens"] == TOKEN).sum()) == int(grids.sum())
        assert len(sample["media.audio.features"]) == int(grids.sum())
        lengths |= set(grids.tolist())
        texts = sample["media.audio.label_lengths"]
        blanks += int((texts == 0).sum())
        assert int(texts.clamp(min=0).sum()) == len(sample["media.audio.labels"])
    assert len(lengths) > 2 and 0 < blanks < 20
    assert {int(g) for i in range(len(plain)) for g in plain[i]["media.audio.grids"][:, 0]} == {11}


def test_a_blank_recording_has_an_empty_text(examples: list[Example]) -> None:
    example = examples[0].without_text()
    assert example.ids.tolist() == [0, *[TOKEN] * 11, 0]
    assert example.counted.tolist() == [False] * 12 + [True]


def test_texts_that_are_too_long_for_ctc_are_counted(
    recordings: Path, bundled_tokenizer: Any
) -> None:
    line = {"audio": "0.wav", "text": "far too many letters for less than a second"}
    file = recordings.with_name("long.jsonl")
    file.write_text("\n".join([json.dumps(line), json.dumps(line | {"text": "few"})]))
    found = read_examples([str(file)], bundled_tokenizer, seq_len=64, config=_sized())
    assert unlabelled(found.kept) == {"audio": 1}
    packed = PackedExamples(found.kept, 64, 1, _sized())
    assert sorted(packed[0]["media.audio.label_lengths"].tolist()) == [-1, 3]


def test_a_configuration_that_fits_no_model() -> None:
    bad: dict[str, dict[str, Any]] = {
        "audio.width": {"width": 50},
        "audio.layers": {"layers": -1},
        "attention: expected causal or both": {"attention": "x"},
        "unknown": {"size": 3},
    }
    for says, wrong in bad.items():
        with pytest.raises(UsageError, match=says):
            ModelConfig(audio={"layers": 1, **wrong})  # type: ignore[arg-type]

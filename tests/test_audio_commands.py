"""A run on recordings: trained, resumed, heard, looked into, taken apart over time, exported."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio_cases import HEARING, RATE, WORDS, spoken, write_recordings

from looptx_cli.main import main
from looptx_core.api import load
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import abilities
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.media import AudioConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.shards import Manifest
from looptx_core.errors import DataError, UsageError
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.generation.engine import MediaPrompt
from looptx_core.generation.transcribe import _repeated
from looptx_core.media.audio.read import item_of
from looptx_core.media.registry import MEDIA
from looptx_core.training.run import fit_vocabulary, train

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"), 36)


@pytest.fixture(scope="module")
def run(recordings: Path, colour_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(
        steps=90, seq_len=24, batch_size=12, mix="0:1", lr=1e-2, val_every=90, val_batches=1,
        optimizer="adamw", save_every=90, loop_schedule="fixed", loops=2, max_loops=2,
        augment=False,
    )  # fmt: skip
    shape = replace(HEARING, audio=AudioConfig(layers=1, width=48, max_seconds=2.0))
    model = fit_vocabulary(shape, Manifest.read(colour_shards).vocab_size, False)
    out = tmp_path_factory.mktemp("runs") / "a"
    lines: list[str] = []
    assert train(config, model, data=colour_shards, records=[recordings], folder=out,
                 report=lines.append)  # fmt: skip
    assert "recordings: 36 records" in lines
    return out


def test_what_is_said_is_learned(run: Path) -> None:
    """Of recordings that were not heard; the same sounds shuffled in time say something else."""
    model, draw = load(run, kernel="torch"), np.random.default_rng(0)
    prompts, wanted = [], []
    for words in itertools.product(WORDS, WORDS):
        item = item_of(spoken(list(words), seed=100 + len(wanted)))
        shuffled = item._replace(features=item.features[draw.permutation(item.length)])
        prompts += [MediaPrompt("", (item,)), MediaPrompt("", (shuffled,))]
        wanted.append(" ".join(words))
    said = [found.text.strip() for found in model.generate_all(prompts, **GREEDY)]
    right = [found == words for found, words in zip(said[::2], wanted)]
    unlike = [words.split()[0] != words.split()[1] for words in wanted]
    by_chance = [f == w for f, w, two in zip(said[1::2], wanted, unlike) if two]
    assert sum(right) >= 7 and sum(by_chance) <= 3


def test_finetuning_goes_on_with_the_encoders_own_loss(
    run: Path, recordings: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig(steps=2, seq_len=24, batch_size=4, log_every=1, max_loops=1)
    prepared = prepare(config, base=run / "final", data=[str(recordings)])
    finetune(prepared, folder=tmp_path / "b")
    lines = (tmp_path / "b/metrics.jsonl").read_text().splitlines()
    losses = [line["audio_loss"] for line in map(json.loads, lines) if "train_loss" in line]
    assert len(losses) == 2 and min(losses) > 0


def test_a_model_folder_says_that_it_hears(run: Path) -> None:
    final = run / "final"
    assert abilities(final) == {"weights", "hearing"}
    config = json.loads((final / "config.json").read_text())
    assert config["audio"] == {"layers": 1, "width": 48, "max_seconds": 2.0, "token": 6,
                               "attention": "causal", "ctc_weight": 0.3}  # fmt: skip
    prepared = json.loads((final / "preprocessor_config.json").read_text())
    assert prepared["sampling_rate"] == RATE
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["audio_loss"] for line in logged if "audio_loss" in line]
    assert losses[-1] < losses[0] / 2


def test_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _wav(tmp_path, spoken(["low", "high"], seed=200))
    shared = ["--model", str(run), "--quiet"]
    assert main(["generate", "--audio", file, "--json", "--temperature", "0", *shared]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"].split() == ["low", "high"]
    report = ["--decode-tokens", "0", "--val-batches", "2", "--seq-len", "32"]
    report += ["--out", str(tmp_path / "r")]
    assert main(["inspect-loops", "--audio", file, *report, *shared]) == 0
    assert "how far a loop moves each moment" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "r" / "report.json").read_text())["recordings"]
    assert (found["tokens"], found["seconds"]) == (11, 0.88)
    assert len(found["change_by_loop"]) == 2 and len(found["change_by_loop"][0]) == 11
    assert (tmp_path / "r" / "moments-1.png").exists()
    with_text = ["generate", "what", "--audio", file, "--timestamps", *shared]
    assert main(with_text) == 2
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert main(["generate", "--audio", str(tmp_path / "bad.wav"), *shared]) == 4


def test_a_long_recording_is_heard_in_pieces(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silence = np.zeros(int(0.5 * RATE), np.float32)
    words = [["low", "high"], ["mid", "mid"], ["high", "low"], ["low", "mid"], ["mid", "high"]]
    parts = [np.concatenate([spoken(two, seed=n), silence]) for n, two in enumerate(words)]
    file = _wav(tmp_path, np.concatenate(parts))
    model = load(run, kernel="torch")
    with pytest.raises(DataError, match=r"6\.9 long or more, and this model hears 2 s at once"):
        MEDIA["audio"].read(file, model.loaded.config)
    segments = model.transcribe(file, **GREEDY)
    assert segments[0].start == 0 and segments[-1].end == pytest.approx(6.9)
    for one, other in itertools.pairwise(segments):
        assert one.end == other.start and one.start + 0.3 < one.end <= one.start + 2
    quiet = [(n + 1) * 1.38 - 0.29 for n in range(5)]
    cuts = [segment.end for segment in segments[:-1]]
    assert all(min(abs(cut - middle) for middle in quiet) < 0.6 for cut in cuts)
    asked = ["generate", "--audio", file, "--timestamps", "--model", str(run), "--quiet",
             "--temperature", "0", "--max-new-tokens", "12", "--kernel", "torch"]  # fmt: skip
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [s["text"] for s in document["segments"]] == [s.text for s in segments]
    assert document["text"] == "".join(token["text"] for token in document["tokens"])
    assert main(asked) == 0
    assert capsys.readouterr().out.startswith("[0:00.0 - 0:0")


def test_words_that_two_pieces_both_have() -> None:
    assert _repeated(["a", "b", "c"], ["b,", "C", "d"]) == 2
    assert _repeated([], ["a"]) == _repeated(["a"], ["b"]) == _repeated(["a"], []) == 0


def test_a_command_trains_resumes_and_refuses(
    recordings: Path, colour_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The section's keys are set, stored and read again; another recording ends a resumption."""
    settings: dict[str, Any] = {
        "seq_len": 32, "batch_size": 4, "val_batches": 1,
        "model": {"d_model": 48, "head_dim": 12, "d_ff": 64, "core_layers": 1, "coda_layers": 0,
                  "max_loops": 2, "audio": {"layers": 1, "width": 24}},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--data", str(colour_shards)]
    command += ["--data", str(recordings), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "1", "--set", "model.audio.ctc_weight=0"]) == 0
    capsys.readouterr()
    final = load_model(tmp_path / "run" / "final").config
    assert final.audio == AudioConfig(layers=1, width=24, ctc_weight=0.0)
    resume = ["train", "--resume", str(tmp_path / "run"), "--steps"]
    assert main([*resume, "2"]) == 0
    assert load_model(tmp_path / "run" / "final").config == final
    (tmp_path / "c.yaml").write_text("model: {audio: {layer: 1}}")
    assert main([*command, "--overwrite"]) == 2
    assert "unknown key 'model.audio.layer', did you mean" in capsys.readouterr().err


def test_a_model_that_cannot_hear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _wav(tmp_path, spoken(["low"]))
    from looptx_core.checkpoint.registry import bundled_model

    assert main(["generate", "--audio", file, "--model", str(bundled_model())]) == 4
    assert "this model has no hearing" in capsys.readouterr().err
    with pytest.raises(UsageError, match="pictures have no length in time"):
        MEDIA["image"].pieces(file, HEARING)


def _wav(folder: Path, samples: np.ndarray) -> str:
    file = folder / "spoken.wav"
    soundfile.write(file, samples, RATE)
    return str(file)

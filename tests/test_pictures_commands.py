"""Pictures in the commands: inspected, trained on, generated from, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import CONFIG, build, letters, row

import looptx_core
from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.checkpoint.registry import abilities
from looptx_core.config.generation import ExitSettings
from looptx_core.media.batch import batch_items
from looptx_core.media.image.read import read_picture
from looptx_core.model.loop import LoopedTransformer


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("reconstruct", [False, True])
def test_inspecting_a_picture_maps_its_patches(
    cat: Path, tmp_path: Path, run, reconstruct: bool
) -> None:
    model = build(replace(CONFIG, reconstruct=reconstruct), torch.float32)
    save_model(tmp_path / "m", model, letters(), exit_settings=ExitSettings(), facts={})
    (tmp_path / "t.txt").write_text("abcd efgh " * 900)
    code, out, err = run(
        "inspect-loops", "--image", cat, "--model", tmp_path / "m", "--data", tmp_path / "t.txt",
        "--out", tmp_path / "r", "--seq-len", 32, "--val-batches", 1, "--decode-tokens", 0,
        "--batch-size", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "how far a loop moves each patch" in out
    assert "cat.png, 2 x 3 patches" in out
    (found,) = json.loads((tmp_path / "r" / "report.json").read_text())["pictures"]
    assert np.shape(found["change_by_loop"]) == (9, 2, 3)
    assert np.shape(found["shown"]) == (8, 12, 3)
    assert (tmp_path / "r" / "patches-1.png").is_file()
    assert (tmp_path / "r" / "hidden-1.png").is_file() == reconstruct
    if reconstruct:
        assert np.shape(found["confidence_by_loop"]) == (10, 2, 3)
        assert np.min(found["confidence_by_loop"]) > 0 and np.min(found["error_by_loop"]) > 0
    # The map of the second loop, again by hand.
    picture = read_picture(cat, CONFIG)
    tokens, seen = torch.tensor([row(0, (2, 3))]), batch_items([picture])
    ctx = model.context(7, layout=model.layout(tokens, seen))
    first, second = model.states(tokens, 2, ctx=ctx, media=seen)
    moved = ((second - first).norm(dim=-1) / second.norm(dim=-1))[0, 1:].view(2, 3)
    np.testing.assert_allclose(found["change_by_loop"][0], moved.detach(), atol=1e-4)


def test_train_generate_and_resume_with_pictures(
    colours: Path, colour_shards: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    """The whole way: a model that names six colours from pictures it has not seen."""
    monkeypatch.chdir(colours)
    settings = {
        "seq_len": 48, "batch_size": 8, "mix": "1:3", "lr": 5e-3, "val_every": 50, "workers": 0,
        "optimizer": "adamw", "mask_patches": 0.2,
        "model": {
            "d_model": 64, "d_ff": 96, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2,
            "vision_layers": 1, "vision_width": 32, "patch_size": 4, "max_patches": 4,
            "prelude_layers": 1, "core_layers": 1, "coda_layers": 0, "max_loops": 3,
        },
    }  # fmt: skip
    (colours / "c.yaml").write_text(json.dumps(settings))
    for file in (colours / "pairs").glob("*.txt"):
        file.write_text(file.read_text().split()[0])
    command = ("train", "--config", "c.yaml", "--data", colour_shards, "--data", "pairs",
               "--steps", 60)  # fmt: skip
    code, out, err = run(*command, "--out", "runs/a")
    assert code == 0, err
    assert "Texts beside pictures" in out and "pictures: 12 records" in err
    folder_ = Path("runs/a/final")
    assert json.loads((folder_ / "preprocessor_config.json").read_text())["max_patches"] == 4
    assert "vision" in abilities(folder_)
    code, out, err = run("generate", "--image", "pairs/00.png", "--temperature", 0, "--json")
    assert code == 0, err
    assert json.loads(out)["text"].strip() == "red"
    code, out, err = run("generate", "--image", "pairs/01.png", "--image", "pairs/00.png",
                         "--show-iterations", "--max-new-tokens", 3)  # fmt: skip
    assert code == 0 and "loops a token" in out

    # Half of it, then the rest: the same weights, with augmented pictures and workers.
    code, _, err = run(*command, "--out", "runs/b", "--max-minutes", 0.0001)
    assert code == 0, err
    code, _, err = run("train", "--resume", "runs/b")
    assert code == 0, err
    one, two = (load_model(f"runs/{name}/final").model.state_dict() for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_missing_file_of_a_samples_name(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample is taken and named; a file of that name is not replaced by it."""
    command = ["generate", "--max-new-tokens", "1", "--temperature", "0", "--json", "--image"]
    assert main([*command, "pictures/cat.png"]) == 0
    shown = capsys.readouterr()
    assert "pictures/cat.png: no such file; this is the sample that looptx ships" in shown.err
    sample = Path(looptx_core.__file__).parent / "assets/samples/cat.png"
    assert main([*command, str(sample)]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == json.loads(shown.out)["text"]
    Path("cat.png").write_bytes(b"mine")
    assert main([*command, "cat.png"]) == 4
    assert "cat.png: not a picture" in capsys.readouterr().err
    assert main([*command, "dog.png"]) == 4


def test_bad_use_of_pictures(cat: Path, tmp_path: Path, run) -> None:
    text = LoopedTransformer(replace(CONFIG, vision_layers=0))
    save_model(tmp_path / "text", text, letters(), exit_settings=ExitSettings(), facts={})
    save_model(tmp_path / "both", build(), letters(), exit_settings=ExitSettings(), facts={})
    code, _, err = run("generate", "--image", cat, "--model", tmp_path / "text")
    assert code == 4 and "no vision" in err
    code, _, err = run("generate", "--image", tmp_path / "no.png", "--model", tmp_path / "both")
    assert code == 4 and "no such picture" in err
    two = ("generate", "<|image|> and <|image|>", "--image", cat, "--model", tmp_path / "both")
    code, _, err = run(*two)
    assert code == 2 and "2 <|image|> in a text for 1 pictures" in err
    code, _, err = run("tokenize", cat.parent / "cat.png", "--out", tmp_path / "out")
    assert code == 4 and "looptx train --data" in err

"""Finetuning on pictures: where they stand, what is learned, bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetuning_cases import SHAPE, write
from PIL import Image
from safetensors.torch import load_file

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.data.examples import read_examples
from looptx_core.generation.engine import ChatPrompt, Engine, MediaPrompt
from looptx_core.media.image.read import read_picture
from looptx_core.model.loop import LoopedTransformer


@pytest.fixture(scope="module")
def seeing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads pictures, beside a red one and a blue one."""
    place = tmp_path_factory.mktemp("seeing")
    shape = ModelConfig(**(SHAPE.to_dict() | {"vision_layers": 1, "vision_width": 32,
                                              "max_patches": 4}))  # fmt: skip
    torch.manual_seed(0)
    save_model(place / "model", LoopedTransformer(shape), load_model(tiny).tokenizer,
               exit_settings=ExitSettings(), facts={})  # fmt: skip
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(place / f"{colour}.png")
    return place


def test_pictures_stand_where_generation_puts_them(seeing: Path) -> None:
    loaded = load_model(seeing / "model")
    red = read_picture(seeing / "red.png", loaded.config)
    engine = Engine(loaded.model, loaded.tokenizer)
    data = write(
        seeing / "forms.jsonl",
        {"image": "red.png", "prompt": "ab", "response": "c"},
        {"image": ["red.png"], "prompt": "a<|image|>b", "response": "c"},
        {"image": "red.png", "messages": [{"role": "user", "content": "ab"},
                                          {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a<|image|>b", "image": "red.png"},
                      {"role": "assistant", "content": "c"}]},
        {"parts": [{"text": "ab"}, {"image": "red.png"}, {"text": "c"}]},
    )  # fmt: skip
    found = read_examples([data], loaded.tokenizer, seq_len=64, config=loaded.config)
    assert found.media == {"image": 5} and found.chat
    asked = [MediaPrompt("ab", (red,)), MediaPrompt("a<|image|>b", (red,))]
    asked += [ChatPrompt(({"role": "user", "content": text},), (red,))
              for text in ("ab", "a<|image|>b")]  # fmt: skip
    for example, prompt in zip(found.kept, asked):
        ids = engine.encode(prompt)
        assert example.ids[: len(ids)].tolist() == ids
        assert not example.counted[: len(ids)].any() and example.counted[len(ids) :].all()
    joined = engine.encode(MediaPrompt("ab<|image|>c", (red,)))
    assert found.kept[4].ids.tolist() == [*joined, engine.end]
    assert (found.kept[4].ids[found.kept[4].counted] != loaded.config.image_token).all()


def test_a_model_learns_from_pictures(seeing: Path, workplace, capsys) -> None:
    """Question and length are the same; only the picture tells the answer."""
    record = {"red": " warm", "blue": " cold"}
    data = write(seeing / "colours.jsonl",
                 *[{"image": f"{colour}.png", "prompt": "It is", "response": answer}
                   for colour, answer in record.items()] * 12)  # fmt: skip
    command = ["finetune", "--model", str(seeing / "model"), "--data", data, "--steps", "40"]
    flags = ["--seq-len", "32", "--batch-size", "8", "--precision", "float32", "--lr", "1e-2"]
    assert main([*command, *flags]) == 0
    assert "24 pictures" in capsys.readouterr().err
    for colour, answer in record.items():
        ask = ["generate", "It is", "--image", str(seeing / f"{colour}.png"), "--temperature", "0"]
        assert main([*ask, "--max-new-tokens", "8", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == answer
    # An adapter leaves the encoder of pictures as it is.
    assert main([*command, *flags, "--lora", "--steps", "2"]) == 0
    weights = load_file("runs/finetune-2/final/adapter_model.safetensors")
    assert weights and not any("vision" in name for name in weights)


def test_bad_pictures(seeing: Path, tiny: Path, workplace, capsys) -> None:
    good = {"image": "red.png", "prompt": "a", "response": "b"}
    bad = {
        "no picture none.png": good | {"image": "none.png"},
        "2 <|image|> in a text for 1 pictures": good | {"prompt": "<|image|><|image|>"},
        "image must be a path": good | {"image": 3},
        "not a picture": good | {"image": "bad.png"},
    }
    (seeing / "bad.png").write_bytes((seeing / "red.png").read_bytes()[:40])
    command = ["finetune", "--steps", "1", "--precision", "float32", "--model"]
    for word, record in bad.items():
        data = write(seeing / "bad.jsonl", good, good, record)
        assert main([*command, str(seeing / "model"), "--data", data]) == 4
        assert word in capsys.readouterr().err
    data = write(seeing / "bad.jsonl", good, good, *bad.values())
    assert main([*command, str(seeing / "model"), "--data", data, "--skip-bad"]) == 0
    assert "left out 4" in capsys.readouterr().err
    assert main([*command, str(tiny), "--data", data]) == 4
    assert "this model has no vision" in capsys.readouterr().err
    late = write(seeing / "late.jsonl", {"text": "ab"}, good)
    assert main([*command, str(tiny), "--data", late]) == 4
    assert "this model reads none" in capsys.readouterr().err


def test_a_picture_is_not_cut(seeing: Path) -> None:
    loaded = load_model(seeing / "model")
    long = {"image": "red.png", "prompt": "ab" * 4, "response": "cd" * 20}
    data = write(seeing / "long.jsonl", long, long, long | {"prompt": "ab" * 20 + "<|image|>"})
    found = read_examples([data], loaded.tokenizer, seq_len=40, too_long="truncate",
                          config=loaded.config)  # fmt: skip
    assert (found.truncated, found.dropped, found.media["image"]) == (2, 1, 2)

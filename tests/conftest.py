"""What tests share: their own cache, small data and a small model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from looptx_core.checkpoint.folder import LoadedModel
    from looptx_core.config.model import ModelConfig
    from looptx_core.generation.engine import Engine
    from looptx_core.serving.service import Service

# Before anything of ours is imported: no test reads or writes the user's cache or settings.
for _name in [name for name in os.environ if name.startswith("LOOPTX_")]:
    del os.environ[_name]
os.environ["LOOPTX_CACHE"] = str(Path(tempfile.gettempdir()) / f"looptx-tests-{os.getuid()}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, don't even import the files that are not: imports take most of the time."""
    if config.getoption("markexpr") != "fast" or not collection_path.name.startswith("test_"):
        return None
    return "pytest.mark.fast" not in collection_path.read_text("utf-8") or None


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little tokenised text."""
    from looptx_core.data.corpus import bundled_text
    from looptx_core.data.shard_writer import tokenize_corpus

    folder = tmp_path_factory.mktemp("data")
    text = bundled_text().read_text("utf-8")
    for number in range(8):
        part = text[number * 12_000 : (number + 1) * 12_000]
        (folder / f"{number}.txt").write_text(part, "utf-8")
    tokenize_corpus([str(folder)], folder / "shards", vocab_size=400, val_fraction=0.2)
    return folder / "shards"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small one, of the beginning of the bundled text."""
    from data_cases import MOBY, VOCAB

    from looptx_core.data.tokenizer import train_tokenizer

    return train_tokenizer([MOBY[:200_000]], VOCAB)


@pytest.fixture
def fused_kernels() -> Iterator[None]:
    """The fused kernels of training, switched on."""
    from looptx_core.machine.compiler import compiler
    from looptx_core.model import fused

    if obstacle := compiler().obstacle:
        pytest.skip(obstacle)
    uses = fused.enable_fused()
    assert uses.startswith("fused"), f"kernels that don't build: {uses}"
    yield
    fused.enable_fused(False)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve short documents in files of three kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from data_cases import text_of

    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for i in range(4):
        (root / "deep" / f"{i}.txt").write_text(text_of(i), "utf-8")
    lines = [json.dumps({"text": text_of(i), "n": i}) for i in range(4, 8)]
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    pq.write_table(
        pa.table({"n": [1] * 4, "text": [text_of(i) for i in range(8, 12)]}),
        root / "table.parquet",
        row_group_size=3,
    )
    (root / ".hidden").write_bytes(b"\xff")
    return root


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A picture of 30 x 20 pixels with some structure."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Twelve pictures in one colour each, with its name, as a folder and as JSON lines."""
    from PIL import Image

    names = ("red", "green", "blue", "white", "black", "orange")
    lines = []
    (tmp_path / "pairs").mkdir()
    for number in range(12):
        name = names[number % 6]
        file = tmp_path / "pairs" / f"{number:02}.png"
        Image.new("RGB", (16, 16 + number), name).save(file)
        file.with_suffix(".txt").write_text(f"{name} {number}\n")
        lines.append(json.dumps({"image": f"pairs/{number:02}.png", "text": f"{name} {number}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture(scope="module")
def colour_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little tokenised text, with the names of colours."""
    from looptx_core.data.corpus import bundled_text
    from looptx_core.data.shard_writer import tokenize_corpus

    out = tmp_path_factory.mktemp("data") / "shards"
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(bundled_text().read_text("utf-8")[:60_000] + " red green blue white black" * 9)
    tokenize_corpus([text], out, 300)
    return out


@pytest.fixture(scope="module")
def codec_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codec that the module's `codec` makes, saved."""
    from looptx_core.checkpoint.codec_folder import save_codec

    folder = tmp_path_factory.mktemp("codecs") / "c"
    save_codec(folder, request.module.codec(), {"steps": 0})
    return folder


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest, codec_folder: Path, colour_shards: Path) -> ModelConfig:
    """The module's `SHAPE`, with this codec and a vocabulary."""
    from looptx_core.checkpoint.codec_folder import with_codec
    from looptx_core.data.shards import Manifest
    from looptx_core.training.run import fit_vocabulary

    known = Manifest.read(colour_shards).vocab_size
    return fit_vocabulary(with_codec(request.module.SHAPE, codec_folder), known, False)


@pytest.fixture(scope="module")
def writing(model_folder: Path) -> LoadedModel:
    """The model of the module's `model_folder`, which writes a medium."""
    from looptx_core.checkpoint.folder import load_model

    return load_model(model_folder)


@pytest.fixture(scope="module")
def writing_engine(writing: LoadedModel) -> Engine:
    from looptx_core.generation.engine import Engine

    return Engine(writing.model, writing.tokenizer, writing.exit)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A small one of random weights, as the tests of serving take it."""
    from serving_cases import small_engine

    return small_engine()


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Service]:
    """It, as a service at work."""
    from serving_cases import service_of

    with service_of(engine) as service:
        yield service


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to finetune, which has learned nothing."""
    import torch
    from finetuning_cases import SHAPE

    from looptx_core.checkpoint.folder import save_model
    from looptx_core.config.generation import ExitSettings
    from looptx_core.data.hops import hop_questions
    from looptx_core.data.tokenizer import train_tokenizer
    from looptx_core.model.loop import LoopedTransformer

    torch.manual_seed(0)
    text = "".join(f"{q['prompt']}{q['response']} " for q in hop_questions(7, 40))
    tokenizer = train_tokenizer([text], 300)
    place = tmp_path_factory.mktemp("base") / "tiny"
    save_model(place, LoopedTransformer(SHAPE), tokenizer, exit_settings=ExitSettings(), facts={})
    return place


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What to finetune it on."""
    from looptx_core.data.hops import hop_questions

    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in hop_questions(1, 60)))
    return file


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to type commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    return tmp_path

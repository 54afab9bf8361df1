"""Graphs that are recorded and replayed: the same tokens, loops and figures as torch without them.

Without a GPU nothing is recorded, and the same bodies run on the same buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import looptx_core
from looptx_core.backends import cuda_graphs
from looptx_core.backends.cuda_graphs import CudaGraphBackend
from looptx_core.backends.select import select_backend
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.local_attention import LocalAttention
from looptx_core.config.model import ModelConfig
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import MissingError
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import MediaPrompt, Prompt, Step
from looptx_core.media.image.read import read_picture
from looptx_core.model.loop import LoopedTransformer

BUNDLED_VISION = Path(looptx_core.__file__).parent / "assets" / "picture-model"
CAT = Path(__file__).parent.parent / "examples" / "cat.png"
SHAPE = ModelConfig(vocab_size=279, d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=100,
                    prelude_layers=1, core_layers=2, coda_layers=1, max_loops=5)  # fmt: skip


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


def engines(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, shape: ModelConfig = SHAPE
) -> tuple[Engine, Engine]:
    """By recorded moves, whose graphs begin with eight columns, and by torch's as they are."""
    monkeypatch.setattr(cuda_graphs, "_FIRST_BUCKET", 8)
    torch.manual_seed(0)
    model = LoopedTransformer(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = train_tokenizer(["some words to write with, and some more of them"], 279)
    settings = ExitSettings(confidence=0.05, gain=0.5, gain_slope=(1.0, 0.9),
                            gain_power=(0.5, 1.0), gain_offset=(0, 0.1))  # fmt: skip
    both = [Engine(model.to(device), tokenizer, settings, kernel="torch") for _ in range(2)]
    both[0].backend = CudaGraphBackend(model)
    return both[0], both[1]


def written(
    engine: Engine, prompts: Sequence[Prompt], options: GenerationOptions
) -> list[list[Step]]:
    return [found.tokens for found in engine.complete(prompts, options)]


@pytest.mark.parametrize(
    "options",
    [
        {"exit": "auto"},
        {"exit": "auto", "injection": "streams"},
        {"exit": "auto", "local_attention": LocalAttention(6, 2, 500.0)},
        {"exit": "gain", "min_loops": 2},
        {"exit": "kl", "threshold": 0.05},
        {"exit": "auto", "kv_policy": "last"},
        {"exit": "auto", "kv_type": "int8"},
        {"loops": 4},
        {"loops": 5, "speculate": 3, "draft_loops": 2},
        {"exit": "auto", "temperature": 0.8, "seed": 3},
    ],
)
def test_the_same_tokens(
    options: dict, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"temperature": 0.0, "max_new_tokens": 40, "ignore_eos": True, **options}
    shape = replace(SHAPE, **{key: given.pop(key) for key in ("injection", "local_attention")
                              if key in given})  # fmt: skip
    recorded, plain = engines(device, monkeypatch, shape)
    for prompt in ("some", "some words to write with and more"):
        ours, theirs = (
            written(e, [prompt], GenerationOptions(**given))[0] for e in (recorded, plain)
        )
        assert [step.id for step in ours] == [step.id for step in theirs]
        assert [step.loops for step in ours] == [step.loops for step in theirs]
        for mine, other in zip(ours, theirs):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert mine.confidence == pytest.approx(other.confidence, abs=1e-3)
    assert recorded.counters == plain.counters
    if options.get("exit") == "auto":
        assert len({step.loops for step in ours}) > 1
    assert isinstance(recorded.backend, CudaGraphBackend)
    assert len(recorded.backend._passes) > 1, "the text outgrew the first graphs"


def test_the_next_prompt_finds_the_graphs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, _ = engines(device, monkeypatch)
    assert isinstance(recorded.backend, CudaGraphBackend)
    found, options = [], GenerationOptions(max_new_tokens=4, ignore_eos=True, temperature=0.0)
    for prompt in ("some", "some words to write with and more", "some"):
        found.append((written(recorded, [prompt], options), recorded.backend._cache))
    assert found[0][1] is found[1][1] is found[2][1]
    ids = [[step.id for step in tokens[0]] for tokens, _ in found]
    assert ids[0] == ids[2]
    unfinished = recorded.generate(["some"], options)
    next(unfinished)
    other = written(recorded, ["some"], options)[0]  # while the cache is in use
    assert [step.id for step in other] == ids[0]
    assert [step.id for step in unfinished] == ids[0][1:]


def test_pictures_between_texts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture moves positions: a prompt that ends where the last one did starts anew."""
    monkeypatch.setattr(cuda_graphs, "_FIRST_BUCKET", 8)
    loaded = load_model(BUNDLED_VISION, dtype=torch.float32)
    picture = read_picture(CAT, loaded.config)
    options = GenerationOptions(loops=3, temperature=0.0, max_new_tokens=6, ignore_eos=True)
    both = []
    for kind in (CudaGraphBackend, TorchBackend):
        engine = Engine(loaded.model.to(device), loaded.tokenizer, loaded.exit, kernel="torch")
        engine.backend = kind(loaded.model)
        asked = MediaPrompt("", (picture,))
        length = engine.length(asked)
        before = [5] * (
            length - 4
        )  # its last token but one stands where the picture's first new one does
        found = [written(engine, [p], options)[0] for p in (before, asked, before)]
        both.append([[(step.id, round(step.logprob, 3)) for step in one] for one in found])
    assert both[0] == both[1]


def test_a_second_engine_leaves_the_weights_where_they_are() -> None:
    model = LoopedTransformer(SHAPE).eval()
    model.fuse_projections()
    where = [p.data_ptr() for p in model.parameters()]
    model.to("cpu")
    model.fuse_projections()
    assert where == [p.data_ptr() for p in model.parameters()]
    attention = model.core[0].attention
    x = torch.randn(1, 2, SHAPE.d_model)
    with torch.no_grad():
        _, _, v = attention.project(x)
        assert torch.allclose(v, attention.v_proj(x), atol=1e-6)
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
    model.fuse_projections()
    with torch.no_grad():
        assert torch.allclose(attention.project(x)[1], attention.k_proj(x), atol=1e-6)


def test_batches_go_as_they_are(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, plain = engines(device, monkeypatch)
    options = GenerationOptions(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    prompts = ["some", "words to write", "them"]
    ours, theirs = (written(engine, prompts, options) for engine in (recorded, plain))
    assert [[s.id for s in one] for one in ours] == [[s.id for s in one] for one in theirs]
    assert isinstance(recorded.backend, CudaGraphBackend) and not recorded.backend._passes


def test_the_choice_is_explained() -> None:
    model = LoopedTransformer(SHAPE)
    with pytest.raises(MissingError, match="the model is on cpu"):
        select_backend(model, "graph")
    if torch.cuda.is_available():
        backend, reason = select_backend(model.to("cuda"))
        assert isinstance(backend, CudaGraphBackend) and "CUDA graphs" in reason
        assert select_backend(model, "torch")[1] == "torch, asked for"

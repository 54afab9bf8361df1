"""Finetuned models: what is learned and what stays, adapters as PEFT sees them, merging."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from finetuning_cases import QUICK, SHAPE, logits
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from looptx_core.checkpoint.folder import LoadedModel, load_model, save_model
from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.checkpoint.weights import fingerprint
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError
from looptx_core.finetuning.adapters import attach, load_adapter, targets
from looptx_core.finetuning.merge import merge, merge_adapter
from looptx_core.finetuning.quantise import quantise, stored_bytes
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

METHODS = {
    "full": {},
    "lora": {"lora": True, "lora_dropout": 0.1},
    "dora": {"dora": True},
    "rslora": {"lora": True, "rslora": True},
    "nf4": {"qlora": True},
    "int8": {"qlora": True, "quantization": "int8"},
    "dora nf4": {"dora": True, "qlora": True},
    "per loop": {"lora_per_loop": True},
    "per loop nf4": {"lora_per_loop": True, "qlora": True},
}


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny, questions, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A finished run of each method; the second half of the adapters' tests read it."""
    folder = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "-")
    folder.mkdir()
    config = FinetuneConfig(**QUICK, **METHODS[request.param])
    finetune(prepare(config, base=tiny, data=[str(questions)]), folder=folder)
    yield request.param, folder


with_adapter = pytest.mark.parametrize(
    "run", [method for method in METHODS if method != "full"], indirect=True, scope="module"
)


def tokens(loaded: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, loaded.config.vocab_size, (2, 12), generator=generator)


def test_a_run_learns_and_leaves_the_rest(run, tiny: Path) -> None:
    method, folder = run
    final, base = folder / "final", load_model(tiny)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in metrics if "train_loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    if method == "full":
        assert not torch.equal(
            load_model(final).model.core[0].mlp.up_proj.weight,
            base.model.core[0].mlp.up_proj.weight,
        )
        return
    stored = load_file(final / "adapter_model.safetensors")
    assert any(".confidence." in name for name in stored)
    assert not any("embedding" in name for name in stored)
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == str(tiny.resolve())
    found = load_adapter(load_model(tiny), final, merge=False).model
    for name, weight in base.model.named_parameters():
        if not name.startswith("confidence"):
            there = {**dict(found.named_parameters())}
            inside = name.replace("_proj.weight", "_proj.base_layer.weight")
            assert torch.equal(there.get(name, there.get(inside)), weight), name
    ids = tokens(base)
    assert not torch.allclose(logits(found, ids), logits(base.model, ids), atol=1e-3)


@with_adapter
def test_peft_opens_the_folder(run, tiny: Path) -> None:
    """Onto our model, by PEFT alone; with a part for each loop, one loop at a time."""
    method, folder = run
    final, ids = folder / "final", tokens(load_model(tiny))
    ours = load_adapter(load_model(tiny), final, merge=False).model
    theirs = load_model(tiny).model
    peft = PeftModel.from_pretrained(theirs, str(final))
    if not method.startswith("per loop"):
        assert torch.allclose(logits(theirs, ids), logits(ours, ids), atol=1e-6)
        return
    for loop in (1, 2, 3):
        peft.load_adapter(str(final / f"loop_{loop}"), f"loop_{loop}")
    ctx = theirs.context(ids.shape[1])
    with torch.no_grad():
        peft.set_adapter("default")
        state = embedding = theirs.embed(ids, ctx)
        for loop in (1, 2, 3):
            peft.base_model.set_adapter(f"loop_{loop}")
            state = theirs.step(state, embedding, loop, ctx)
        peft.base_model.set_adapter("default")
        explicit = theirs.head(theirs.coda_hidden(state, ctx))
    assert torch.allclose(explicit, logits(ours, ids), atol=1e-6)


@with_adapter
def test_a_shared_adapter_merges(run, tiny: Path) -> None:
    method, folder = run
    final, ids = folder / "final", tokens(load_model(tiny))
    if method.startswith("per loop"):
        with pytest.raises(UsageError, match="an adapter for each of 3 loops"):
            merge_adapter(tiny, final)
        return
    apart = logits(load_adapter(load_model(tiny), final, merge=False).model, ids)
    merged = merge_adapter(tiny, final)
    assert torch.allclose(logits(merged, ids), apart, atol=1e-5)
    assert merged.head.weight is merged.embedding.weight
    names = dict(load_model(tiny).model.named_parameters()).keys()
    assert dict(merged.named_parameters()).keys() == names
    whole = merge(tiny, final)
    save_model(folder / "merged", whole.model, whole.tokenizer, exit_settings=whole.exit, facts={},
               overwrite=True)  # fmt: skip
    assert torch.equal(logits(load_model(folder / "merged").model, ids), logits(merged, ids))


@pytest.mark.parametrize("recompute", [False, True])
def test_every_loop_trains_its_own_adapter(recompute: bool, tiny: Path) -> None:
    model = load_model(tiny).model
    attach(model, FinetuneConfig(lora_per_loop=True))
    loops = {name: p for name, p in model.named_parameters() if ".lora_B.loop_" in name}
    assert len(loops) == 3 * 7
    ids = torch.arange(2)
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=3), 3)
    batch = tokens(load_model(tiny))
    found = loop_loss(model.train(), batch, schedule, 0, ids, loss_at="last", recompute=recompute)
    found.loss.backward()
    for name, weight in loops.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    by_loop = [loops[f"core.0.mlp.down_proj.lora_B.loop_{n}.weight"].grad for n in (1, 2, 3)]
    assert not torch.allclose(by_loop[0], by_loop[1]) and not torch.allclose(*by_loop[1:])
    # Against the gradient of one adapter that all share: the sum over the loops.
    shared = load_model(tiny).model
    attach(shared, FinetuneConfig(lora=True))
    for name, p in model.named_parameters():
        if ".lora_A.loop_" in name:
            p.data = torch.full_like(p, 0.1)
    for name, p in shared.named_parameters():
        if ".lora_A." in name:
            p.data = torch.full_like(p, 0.1)
    model.zero_grad()
    for net in (model, shared):
        loop_loss(net, batch, schedule, 0, ids, loss_at="last", recompute=recompute).loss.backward()
    one = dict(shared.named_parameters())["core.0.mlp.down_proj.lora_B.default.weight"].grad
    total = sum(loops[f"core.0.mlp.down_proj.lora_B.loop_{n}.weight"].grad for n in (1, 2, 3))
    assert torch.allclose(total, one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.4), ("int8", 0.55)])
def test_a_quantised_base_is_small_and_near(kind: str, share: float, tiny: Path) -> None:
    base, model = load_model(tiny).model, load_model(tiny).model
    blocks = [model.prelude, model.core, model.coda]
    quantise(model, kind)
    bf16 = 2 * sum(p.numel() for p in [*base.prelude.parameters(), *base.core.parameters(),
                                       *base.coda.parameters()])  # fmt: skip
    assert sum(stored_bytes(stack) for stack in blocks) < share * bf16
    ids = torch.arange(12)[None]
    exact = logits(base, ids)
    error = (logits(model, ids) - exact).norm() / exact.norm()
    assert 0 < error < (0.3 if kind == "nf4" else 0.03)
    # Evaluation must leave training as it was.
    model.train()
    first = model(ids, 2).logits.detach()
    logits(model, ids)
    assert torch.equal(model.train()(ids, 2).logits, first)


def test_a_small_base_in_nf4_takes_a_third_of_its_bf16_memory() -> None:
    model = LoopedTransformer(ModelConfig(**PRESETS["small"]["model"]))
    parameters = sum(p.numel() for p in model.trunk_parameters())
    quantise(model, "nf4")
    assert stored_bytes(model) < 0.35 * 2 * parameters
    assert model.head.weight is model.embedding.weight


class StopAt(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("pulled the plug")


def test_adapters_leave_the_gates_of_streams_alone() -> None:
    model = LoopedTransformer(replace(SHAPE, injection="streams"))
    for gate in ("read", "write"):
        others = "there are (?!.*(read|write))"
        with pytest.raises(UsageError, match=f"{gate}: matches no layer; {others}"):
            targets(model, ["q_proj", gate])


def test_a_copied_model_enters_its_own_loops(tiny: Path) -> None:
    loaded = load_model(tiny)
    attach(loaded.model, FinetuneConfig(lora_per_loop=True))
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = tokens(loaded)
    expected = logits(loaded.model, ids)
    loaded.model.enter_loop(2)
    other = copy.deepcopy(loaded.model)
    assert torch.equal(logits(other, ids), expected)
    layers = [m for m in loaded.model.core.modules() if isinstance(m, BaseTunerLayer)]
    assert layers and all(layer.active_adapters == ["loop_2"] for layer in layers)


@pytest.mark.parametrize("method", ["full", "lora", "per loop nf4"])
def test_a_resumed_run_is_the_same_run(method, tiny, questions, tmp_path) -> None:
    """Tasks that are measured on the way change nothing."""
    plain = FinetuneConfig(**QUICK, **METHODS[method])
    tasks = {"eval_every": 4, "eval_tasks": ("text",), "eval_limit": 1}

    def go(name: str, **how) -> Path:
        config = plain if name == "whole" else replace(plain, **tasks)
        (tmp_path / name).mkdir(exist_ok=True)
        ready = prepare(config, base=tiny, data=[str(questions)])
        return finetune(ready, folder=tmp_path / name, **how).model_folder

    whole = go("whole")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        go("broken", callbacks=[StopAt()])
    again = go("broken", resume=True)
    name = "eval_text_bits_per_byte"
    figures = [r[name] for r in read_metrics(tmp_path / "broken/metrics.jsonl") if name in r]
    assert len(figures) == 2 and figures[0] != figures[1]
    files = sorted(whole.rglob("*.safetensors"))
    assert len(files) == (4 if "loop" in method else 1)
    for file in files:
        left, right = load_file(file), load_file(again / file.relative_to(whole))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    saved = next((tmp_path / "whole/checkpoints").glob("*.ckpt"))
    stored = torch.load(saved, weights_only=True)["state_dict"]
    assert any("embedding" in name for name in stored) == (method == "full")


@with_adapter
def test_full_precision_adapters_are_not_read_from_pickles(monkeypatch, tiny, run) -> None:
    _, folder = run
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    adapted = load_adapter(load_model(tiny), folder / "final", merge=False).model
    assert any("lora_" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("size", [2**24 - 1, 2**24 + 3, 17_280_000])
def test_a_fingerprint_of_a_large_tensor(size: int, tmp_path: Path) -> None:
    """float32 can't count to the last value of every tensor."""
    values = torch.zeros(size, dtype=torch.bfloat16)
    save_file({"w": values}, tmp_path / "model.safetensors")
    zeros = fingerprint(tmp_path)
    values[-1] = 1
    save_file({"w": values}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != zeros, "the last value counts"


def test_the_fingerprint_of_a_small_model_is_what_it_was(tmp_path: Path) -> None:
    save_file({"b": torch.arange(300.0), "a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == (
        "c53fd0d111b9f7f0cf1b8b381ca18046ca2e0840be09520c1c6077d1e96cc377"
    )

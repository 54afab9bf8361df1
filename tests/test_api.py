"""The front door: `import looptx`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import looptx
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> looptx.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("no-runs"))
        return looptx.load()


def test_the_module_itself_imports_no_torch() -> None:
    code = "import looptx, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_chooses_as_the_command_line_does(model: looptx.Model) -> None:
    said = {line.split(":")[0] for line in model.choices}
    assert {"model", "attention", "decoding"} <= said
    assert "bundled model" in model.choices[0]
    assert model.engine.model.attend is not None


def test_generate_and_stream_say_the_same(model: looptx.Model) -> None:
    asked = dict(temperature=0.0, max_new_tokens=8)
    found = model.generate("Call me", **asked)
    steps = list(model.stream("Call me", **asked))
    assert [step.id for step in steps] == [step.id for step in found.tokens]
    assert found.text == "".join(step.text for step in steps)
    assert all(1 <= step.loops <= 10 and 0 <= step.confidence <= 1 for step in steps)
    both = model.generate_all(["Call me", "The whale"], **asked)
    assert [step.id for step in both[0].tokens] == [step.id for step in found.tokens]


def test_evaluate_tells_of_each_loop(model: looptx.Model) -> None:
    text = "Call me Ishmael. Some years ago, never mind how long precisely"
    found = model.evaluate(text, loops=3)
    ids = torch.tensor([model.loaded.tokenizer.encode(text).ids])
    with torch.no_grad():
        logits = model.loaded.model(ids[:, :-1], 3).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert found.loss_by_loop[2] == pytest.approx(float(loss), abs=1e-4)
    assert len(found.loss_by_loop) == 3
    with pytest.raises(looptx.LooptxError, match="two tokens"):
        model.evaluate("")


@pytest.mark.parametrize("loops", [0, -1])
def test_evaluate_refuses_a_depth_below_one(loops: int, model: looptx.Model) -> None:
    with pytest.raises(UsageError, match=f"`loops` {loops}: at least 1"):
        model.evaluate("Call me Ishmael.", loops=loops)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_prompts_is_refused(batch_size: int) -> None:
    with pytest.raises(UsageError, match=f"`batch_size` {batch_size}: at least 1"):
        looptx.load(batch_size=batch_size)


def test_bad_names_are_one_line(model: looptx.Model) -> None:
    with pytest.raises(looptx.LooptxError, match="temprature"):
        model.generate("Call me", temprature=1)
    with pytest.raises(looptx.LooptxError, match="not finetuned on chats"):
        model.chat("Hello")
    with pytest.raises(looptx.LooptxError, match="nowhere"):
        looptx.load("nowhere")


def test_an_engine_leaves_its_model_in_place(model: looptx.Model) -> None:
    before = {name: p.clone() for name, p in model.loaded.model.named_parameters()}
    Engine(model.loaded.model, model.loaded.tokenizer, kernel="torch")
    assert all(torch.equal(before[n], p) for n, p in model.loaded.model.named_parameters())


def test_a_plain_call_runs_the_stored_depth(model: looptx.Model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain, deep = model.loaded.model(ids), model.loaded.model(ids, 10)
    assert model.loaded.config.loops == 10
    assert torch.equal(plain.logits, deep.logits)


def test_an_engine_gives_the_model_back_in_its_mode(tiny: Path) -> None:
    from looptx_core.checkpoint.folder import load_model
    from looptx_core.generation.engine import Engine

    loaded = load_model(tiny)
    model = loaded.model.train()
    model.confidence.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = Engine(model, loaded.tokenizer, kernel="torch").generate(["map"])
    assert [module.training for module in model.modules()] == modes
    next(steps)
    assert not any(module.training for module in model.modules())
    list(steps)
    assert [module.training for module in model.modules()] == modes
    assert all(weights[name].equal(tensor) for name, tensor in model.state_dict().items())

"""Loops that are trained into a model that knows one: adapters, a teacher, and the control."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetuning_cases import QUICK, SHAPE

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError
from looptx_core.finetuning.adapters import attach, load_adapter
from looptx_core.finetuning.merge import merge_adapter
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss, training_flops
from looptx_core.training.teacher import FIRST_LOOP, Teacher

TOKENS = torch.randint(0, 300, (2, 13), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bridged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny` as one that was converted: its later loops begin with a bridge of 0."""
    loaded = load_model(tiny)
    torch.manual_seed(0)
    model = LoopedTransformer(replace(SHAPE, injection="bridge"))
    place = tmp_path_factory.mktemp("base") / "bridged"
    save_model(place, model, loaded.tokenizer, exit_settings=loaded.exit, facts={})
    return place


def logits(model: LoopedTransformer, loops: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, loops).logits


@pytest.mark.parametrize("layers", ["core", "later"])
def test_adapters_in_the_loop(layers: str, bridged: Path, questions: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(**QUICK, lora=True, lora_layers=layers, loop_schedule="sampled")
    prepared = prepare(config, base=bridged, data=[str(questions)])
    assert prepared.config.loops == (2 if layers == "later" else None)
    finetune(prepared, folder=tmp_path)
    base, final = load_model(bridged), tmp_path / "final"
    found = load_adapter(load_model(bridged), final).model
    bridge = found.injection.bridge.weight
    assert bridge.abs().max() > 0, "the bridge is trained beside the adapters"
    one, two = logits(base.model, 1), logits(base.model, 2)
    assert torch.equal(one, two)
    assert torch.equal(logits(found, 1), one) is (layers == "later")
    assert not torch.allclose(logits(found, 2), one, atol=1e-3)
    assert not torch.allclose(logits(found, 3), logits(found, 2), atol=1e-5)
    for name, weight in base.model.named_parameters():  # outside of the loop nothing changes
        if name.startswith(("prelude", "coda", "embedding")):
            assert torch.equal(dict(found.named_parameters())[name], weight)
    if layers == "later":
        with pytest.raises(UsageError, match="from the second loop on"):
            merge_adapter(bridged, final)
    else:
        merged = merge_adapter(bridged, final)
        assert torch.equal(logits(merged, 3), logits(found, 3))


def test_every_part_of_the_loop_has_a_gradient(bridged: Path) -> None:
    """From the first step on, as W = 0 stops none that reaches W or the adapters."""
    model = load_model(bridged).model
    attach(model, FinetuneConfig(lora=True, lora_layers="later"))
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), 3)
    loop_loss(model.train(), TOKENS, schedule, 0, torch.arange(2), loss_at="last").loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if "lora_B" in name or name.endswith("bridge.weight"):
            assert p.grad is not None and p.grad.abs().max() > 0, name
    assert all(name.startswith(("core.", "injection.", "confidence.")) for name in trained)


def test_a_teacher_is_learned_from(bridged: Path, tiny: Path) -> None:
    """The loss is the mixture, against its formula; its own first loop teaches a model nothing
    that it does not know at one loop."""
    model = load_model(bridged).model.double()
    torch.nn.init.normal_(model.injection.bridge.weight, std=0.3)
    for name, weight in ((str(tiny), 0.25), (FIRST_LOOP, 0.5)):
        teacher = Teacher(name)
        if teacher.model is not None:
            teacher.model.double()
            teacher.loops = 3
        schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), 3)
        found = loop_loss(model, TOKENS, schedule, 0, torch.arange(2), loss_at="last",
                          teacher=teacher, teacher_weight=weight)  # fmt: skip
        ours = model(TOKENS[:, :-1], 2).logits.log_softmax(-1)
        theirs = (teacher.model or model)(TOKENS[:, :-1], teacher.loops).logits.log_softmax(-1)
        apart = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        plain = -ours.gather(-1, TOKENS[:, 1:, None]).mean()
        expected = (1 - weight) * plain + weight * apart
        assert torch.allclose(found.loss.double(), expected, rtol=1e-5) and apart > 1e-3
        assert torch.allclose(found.deepest.double(), plain, rtol=1e-5)
    one = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=1), 3)
    found = loop_loss(model, TOKENS, one, 0, torch.arange(2), teacher=Teacher(FIRST_LOOP),
                      teacher_weight=1.0)  # fmt: skip
    assert found.loss.detach().abs() < 1e-6


def test_a_control_has_the_same_flops(
    bridged: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--data", questions, "--model", bridged, "--lora", "--lora-layers",
                 "later", "--control", "--teacher", FIRST_LOOP, "--loop-schedule", "fixed",
                 "--loops", 3, "--out", tmp_path / "run", "--json", "--quiet"]  # fmt: skip
    for name, value in {**QUICK, "batch_size": 8, "steps": 8, "val_every": 8}.items():
        arguments += ["--" + name.replace("_", "-"), value]
    assert main([str(argument) for argument in arguments]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    control = summary["control"]
    shape = load_model(bridged).config
    step = 8 * 64 * training_flops(shape, 64, 1, 1, 1)
    assert control["steps"] > 8
    assert abs(control["flops"] - summary["flops"]) < step
    assert control["text_loss_by_loop"][0] == pytest.approx(control["text_loss_before"][0])
    assert control["text_loss"] != control["text_loss_before"][0]
    settings = (tmp_path / "run" / "control" / "config.yaml").read_text("utf-8")
    assert "lora_layers: core" in settings and "loop_schedule: fixed" in settings
    assert len(json.loads(json.dumps(control["text_loss_by_loop"]))) == 3
    assert control["exact_match"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora-layers", "core"), "--lora-layers core is of adapters; add --lora"),
        (("--lora-per-loop", "--lora-layers", "later"), "leave one out"),
        (("--lora", "--lora-layers", "later", "--loops", 1), "trains nothing in one loop"),
        (("--lora", "--lora-layers", "core", "--target-modules", "head"), "head"),
        (("--teacher-weight", 2), "--teacher-weight must lie between 0 and 1"),
        (("--teacher", FIRST_LOOP, "--devices", 2), "with several processes"),
        (("--control", "--devices", 2), "with several processes"),
    ],
)
def test_bad_settings_are_refused(
    arguments: tuple, message: str, bridged: Path, questions: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = main([str(part) for part in ("finetune", "--data", questions, "--model", bridged,
                                        "--out", tmp_path / "run", *arguments)])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2 and message in error.splitlines()[-1], error
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(
    bridged: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from looptx_core.data.tokenizer import train_tokenizer

    other = tmp_path / "other"
    config = replace(SHAPE, vocab_size=280)
    loaded = load_model(bridged)
    save_model(other, LoopedTransformer(config), train_tokenizer(["abcd efgh " * 50], 280),
               exit_settings=loaded.exit, facts={})  # fmt: skip
    for teacher, code in ((other, 2), (tmp_path / "none", 4)):
        given = ("finetune", "--data", questions, "--model", bridged, "--teacher", teacher,
                 "--out", tmp_path / "run")  # fmt: skip
        assert main([str(part) for part in given]) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(teacher) in error and ("same tokenizer" in error or code == 4)
    assert not (tmp_path / "run").exists()

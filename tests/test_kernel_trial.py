"""A run takes the fused kernels that a trial finds faster, and a resumed run the same ones."""

from __future__ import annotations

import json

import pytest
import torch

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.model import fused, products
from looptx_core.training import kernel_trial
from looptx_core.training.kernel_trial import FILE, KernelChoice, choose, enable_kernels, measure

MODEL = ModelConfig(vocab_size=64, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64)
RUN = TrainConfig(batch_size=4, seq_len=16)


pytestmark = pytest.mark.usefixtures("fused_kernels")


@pytest.fixture
def times(monkeypatch, tmp_path) -> dict[str, tuple[float, float]]:
    """What a trial is made to find, and no cache from other runs."""
    found = dict.fromkeys(fused.OPERATIONS, (2.0, 1.0)) | {"attention": (1.0, 2.0)}
    monkeypatch.setattr(kernel_trial, "measure", lambda *_: dict(found))
    monkeypatch.setattr(kernel_trial, "library_path", lambda source: tmp_path / "cache/fused.so")
    return found


def test_the_trial_measures_every_operation_and_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    found = measure(MODEL, 4, 16)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert set(found) == set(fused.OPERATIONS)
    assert all(0 < time < 1e4 for pair in found.values() for time in pair)
    x = torch.ones(2, 3, requires_grad=True)
    assert all(fused.can_use_fused(x, operation=name) for name in fused.OPERATIONS)


def test_each_side_of_the_trial_runs_its_own_arithmetic(monkeypatch):
    """Fused kernels are called on the fused side alone: for each, forward and backward."""
    called: dict[frozenset[str], set[str]] = {}
    call = fused._call

    def counted(name, *arguments):
        called.setdefault(fused._taken, set()).add(name)
        call(name, *arguments)

    monkeypatch.setattr(fused, "_call", counted)
    measure(MODEL, 4, 16)
    assert frozenset() not in called
    for name in {*fused.OPERATIONS} - {"products"}:  # which torch multiplies
        kernels = called[frozenset([name])]
        assert len(kernels) == 2 and any(kernel.endswith("_backward") for kernel in kernels)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_trial_of_products_compares_two_ways(monkeypatch, precision):
    taken = []
    apply = products._Products.apply
    monkeypatch.setattr(
        products._Products, "apply", lambda *a: taken.append(fused._taken) or apply(*a)
    )
    measure(MODEL, 4, 16, precision)
    assert {*taken} == {frozenset(["products"])}


def test_what_loses_is_left_to_torch_and_the_run_says_so(times, tmp_path):
    said = enable_kernels(MODEL, RUN, tmp_path)
    assert "plain torch, which is faster here: attention" in said
    x = torch.ones(2, 3, requires_grad=True)
    assert fused.can_use_fused(x, operation="norm") and not fused.can_use_fused(
        x, operation="attention"
    )
    record = json.loads((tmp_path / FILE).read_text())
    assert "attention" not in record["taken"] and record["milliseconds"]["attention"] == [1, 2]


def test_runs_of_one_shape_choose_alike_though_a_later_trial_differs(times):
    first = choose(MODEL, 4, 16)
    times["attention"], times["norm"] = (2.0, 1.0), (1.0, 2.0)
    assert choose(MODEL, 4, 16) == first
    assert "norm" not in choose(MODEL, 8, 16).taken  # another shape has its own trial
    assert "norm" not in choose(MODEL, 4, 16, again=True).taken
    assert "norm" not in choose(MODEL, 4, 16).taken


def test_a_resumed_run_takes_its_own_choice(times, tmp_path):
    run = tmp_path / "run"
    enable_kernels(MODEL, RUN, run)
    times["norm"] = (1.0, 2.0)
    choose(MODEL, 4, 16, again=True)
    enable_kernels(MODEL, RUN, run, resume=True)
    x = torch.ones(2, 3, requires_grad=True)
    assert fused.can_use_fused(x, operation="norm") and not fused.can_use_fused(
        x, operation="attention"
    )
    enable_kernels(MODEL, RUN, tmp_path / "new")
    assert not fused.can_use_fused(x, operation="norm")


def test_a_run_without_a_record_resumes_with_all_kernels(times, tmp_path):
    enable_kernels(MODEL, RUN, tmp_path, resume=True)
    assert fused.can_use_fused(torch.ones(2, 3, requires_grad=True), operation="attention")


@pytest.mark.parametrize("text", ["", "[]", '{"taken": ["sorcery"], "milliseconds": {}}'])
def test_a_broken_record_is_named(times, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=FILE):
        enable_kernels(MODEL, RUN, tmp_path, resume=True)


def test_all_kernels_can_be_asked_for(times, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPTX_KERNELS", "all")
    enable_kernels(MODEL, RUN, tmp_path)
    assert fused.can_use_fused(torch.ones(2, 3, requires_grad=True), operation="attention")
    monkeypatch.setenv("LOOPTX_KERNELS", "some")
    with pytest.raises(UsageError, match="'some'"):
        enable_kernels(MODEL, RUN, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(times, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LooptxError, match=f"cannot write .*{FILE}"):
        enable_kernels(MODEL, RUN, tmp_path / "file")


def test_without_kernels_nothing_is_tried(times, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_trial, "measure", lambda *_: pytest.fail("tried"))
    assert enable_kernels(MODEL, RUN, tmp_path, wanted=False).startswith("plain torch")
    assert not (tmp_path / FILE).exists()


def test_a_choice_names_both_sides():
    assert str(KernelChoice(("norm",), {})).startswith("fused: norm; plain torch, which is faster")
    assert str(KernelChoice((), {})).startswith("plain torch")
    assert "plain" not in str(KernelChoice(fused.OPERATIONS, {}))


def test_losses_do_not_depend_on_the_choice_beyond_rounding():
    from looptx_core.model.loop import LoopedTransformer
    from looptx_core.training.loop_schedule import LoopSchedule
    from looptx_core.training.objective import loop_loss

    torch.manual_seed(0)
    model, schedule = LoopedTransformer(MODEL), LoopSchedule(RUN, MODEL.max_loops)
    tokens = torch.randint(0, 64, (4, 17))
    losses = []
    for taken in (True, [], ["attention", "loss"]):
        fused.enable_fused(taken)
        loss = loop_loss(model, tokens, schedule, 0, torch.arange(4)).loss
        losses.append(float(loss.detach()))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_doctor_says_which_kernels_win(times, monkeypatch):
    from looptx_core.doctor import _kernels

    use = _kernels()
    assert use.ready and "plain torch, which is faster here: attention" in use.uses
    assert "attention 1 and 2" in use.why
    assert not fused.is_prepared()
    monkeypatch.setattr(fused, "enable_fused", lambda on=True: "plain torch: no C++ compiler")
    assert _kernels().uses == "plain torch" and _kernels().why == "no C++ compiler"

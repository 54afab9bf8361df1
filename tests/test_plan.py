"""What a run will take: counted against autograd, and offloaded on machines that are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from looptx_cli.main import main
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.machine.facts import Machine
from looptx_core.model import fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.deepspeed.offload import plan_offload
from looptx_core.parallel.memory import (
    ParallelLayout,
    count,
    count_activations,
    deepest_rows,
    rank_need,
)
from looptx_core.parallel.plan import plan
from looptx_core.training import step_time
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import LoopLoss, loop_loss
from looptx_core.training.optimizer import build_optimizer

pytestmark = pytest.mark.fast

GB = 10**9
# A workstation: a GPU of 24 GB, 64 GB of RAM, a terabyte of NVMe.
WORKSTATION = Machine(
    ram=64 * GB, gpu_memory=(24 * GB,), gpu_names=("a GPU",), disk=1000 * GB,
    disk_path="/mnt/nvme", filesystem="ext4",
)  # fmt: skip
ZERO3 = ParallelLayout("zero3", 1, 1)


def preset(name: str, **train: object) -> tuple[ModelConfig, TrainConfig]:
    given = PRESETS[name]
    return ModelConfig(**given["model"]), TrainConfig(**{**given["train"], "preset": name, **train})


def offload(name: str, machine: Machine = WORKSTATION, spread: ParallelLayout = ZERO3,
            asked: str = "auto", **train: object):  # fmt: skip
    model, config = preset(name, **{"micro_batch": 1, **train})
    return plan_offload(model, config, machine, spread=spread, rows=1, bf16=True, asked=asked)


def test_what_fits_is_not_offloaded() -> None:
    found = offload("small")
    assert (found.optimizer, found.parameters, found.fits) == ("none", "none", True)
    assert found.reasons == ("nothing offloaded: fits",)
    assert [hold.place for hold in found.arithmetic] == ["gpu"]


def test_the_smallest_set_goes_first_to_ram_then_to_disk() -> None:
    one = offload("1b")
    assert (one.optimizer, one.parameters, one.fits) == ("cpu", "none", True)
    assert [line.split(":")[0] for line in one.reasons] == ["nothing offloaded", "optimizer to cpu"]
    # The optimizer of 7B parameters exceeds 64 GB of RAM, its weights the GPU.
    seven = offload("7b", seq_len=512)
    assert seven.optimizer == "nvme" and seven.fits
    assert len(seven.reasons) >= 3 and seven.reasons[-1].endswith("fits")
    assert {hold.place for hold in seven.arithmetic} >= {"gpu", "disk"}
    richer = offload("7b", replace(WORKSTATION, ram=512 * GB), seq_len=512)
    assert "nvme" not in (richer.optimizer, richer.parameters) and richer.fits


@pytest.mark.parametrize("name", ["small", "1b", "7b"])
@pytest.mark.parametrize("gpu", [8, 24])
def test_the_choice_is_the_first_that_fits(name: str, gpu: int) -> None:
    machine = replace(WORKSTATION, gpu_memory=(gpu * GB,))
    found = offload(name, machine, seq_len=512)
    assert found.fits == all(hold.fits for hold in found.arithmetic)
    assert all(not line.endswith("fits") for line in found.reasons[:-1])
    for hold in found.arithmetic:
        assert hold.total == sum(hold.bytes.values())
    moved = offload(name, machine, seq_len=512, asked="nvme")
    on_gpu = {h.place: h.total for h in moved.arithmetic}["gpu"]
    nothing = offload(name, machine, seq_len=512, asked="none")
    assert on_gpu <= {h.place: h.total for h in nothing.arithmetic}["gpu"]


def test_a_machine_without_a_gpu_never_offloads_to_ram() -> None:
    laptop = replace(WORKSTATION, gpu_memory=(), gpu_names=(), ram=24 * GB)
    found = offload("1b", laptop, seq_len=128)
    assert (found.optimizer, found.fits) == ("nvme", True)
    assert not any("to cpu" in line for line in found.reasons)
    assert [hold.place for hold in found.arithmetic] == ["ram", "disk"]


def test_a_disk_in_memory_is_none() -> None:
    found = offload("7b", replace(WORKSTATION, filesystem="tmpfs"), seq_len=512)
    assert "nvme" not in (found.optimizer, found.parameters) and not found.fits


def test_what_each_strategy_may_move() -> None:
    assert offload("7b", spread=ParallelLayout("zero2", 8, 8)).parameters == "none"
    plain = offload("7b", spread=ParallelLayout("ddp", 8, 8))
    assert (plain.optimizer, plain.fits) == ("none", False)
    asked = offload("small", asked="cpu")
    assert (asked.optimizer, asked.parameters) == ("cpu", "cpu")


def test_zero_divides_by_the_processes() -> None:
    model, config = preset("1b", micro_batch=1)
    one = rank_need(model, config, ParallelLayout("zero3", 1, 1), 1, bf16=True)
    many = rank_need(model, config, ParallelLayout("zero3", 8, 8), 1, bf16=True)
    for name in ("weights", "masters", "moments", "gradients"):
        assert getattr(many, name) == pytest.approx(getattr(one, name) / 8, rel=1e-6)
    assert many.activations == one.activations
    two = rank_need(model, config, ParallelLayout("zero2", 8, 8), 1, bf16=True)
    assert two.weights == one.weights and two.moments == many.moments
    # RAM and disk serve all processes of one machine.
    both = offload("1b", spread=ParallelLayout("zero3", 2, 2), asked="cpu")
    alone = offload("1b", spread=ParallelLayout("zero3", 2, 1), asked="cpu")
    ram = [{h.place: h.total for h in found.arithmetic}["ram"] for found in (both, alone)]
    assert ram[0] == 2 * ram[1]


def test_parameters_by_part_are_the_models() -> None:
    for shape in (
        ModelConfig(norm_position="both"),
        ModelConfig(tie_embeddings=False, qk_norm=False, coda_layers=2),
    ):
        model, counts = LoopedTransformer(shape), count(shape)
        assert counts.all == sum(p.numel() for p in model.parameters())
        for part in ("prelude", "core", "coda"):
            real = sum(p.numel() for p in getattr(model, part).parameters())
            assert getattr(counts, part) == real
        assert counts.matrices == sum(
            p.numel() for part in (model.prelude, model.core, model.coda)
            for p in part.parameters() if p.dim() == 2
        )  # fmt: skip


def kept_by_autograd(
    model: LoopedTransformer, config: TrainConfig, bf16: bool = False, documents: bool = False
) -> tuple[int, LoopLoss]:
    """Bytes, parameters aside, and the loss that they are kept for."""
    halves = torch.arange(config.seq_len).expand(4, -1) // (config.seq_len // 2)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        found = loop_loss(
            model, torch.zeros(4, config.seq_len + 1, dtype=torch.long), LoopSchedule(config, 10),
            0, torch.arange(4), documents=halves if documents else None, loss_at=config.loss_at,
        )  # fmt: skip
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), found


@pytest.mark.parametrize(("bf16", "documents"), [(False, True), (True, False), (True, True)])
def test_masks_and_bf16_are_counted(bf16: bool, documents: bool) -> None:
    shape = ModelConfig(vocab_size=256, d_model=64, d_ff=192, n_heads=2, n_kv_heads=1)
    config = TrainConfig(
        batch_size=4, seq_len=64, loop_schedule="fixed", loops=3, document_mask=documents
    )
    real, _ = kept_by_autograd(LoopedTransformer(shape), config, bf16, documents)
    counted = count_activations(shape, config, 4, bf16).total
    if bf16:
        counted += 2 * count(shape).matrices  # autocast's copies, counted as buffers
    assert 0.85 * real <= counted <= 1.35 * real


@pytest.mark.parametrize("loss_at", ["last", "pair", "all"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_plan_counts_what_autograd_keeps(loss_at: str, qk_norm: bool) -> None:
    fused.enable_fused(False)
    shape = ModelConfig(vocab_size=256, d_model=128, d_ff=384, qk_norm=qk_norm)
    config = TrainConfig(
        batch_size=4, loop_schedule="fixed", loops=3, loss_at=loss_at, optimizer="muon"
    )
    model = LoopedTransformer(shape)
    saved, found = kept_by_autograd(model, config)
    counted = plan(shape, config).bytes
    assert saved <= counted["activations"] <= 1.3 * saved  # the gradients' peak is counted too

    (found.loss + found.confidence_loss).backward()
    optimizer = build_optimizer(model, config)
    optimizer.step()
    states = [state for part in optimizer.parts for state in part.state.values()]
    real = sum(x.numel() * 4 for state in states for x in state.values() if x.numel() > 1)
    assert counted["optimizer"] == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"loops": 2, "batch_size": 2}, 2_533_130_240),
        ({"loops": 4, "batch_size": 4, "grad_checkpointing": True}, 2_733_641_728),
    ],
)
def test_the_plan_is_near_peaks_that_were_measured(changes: dict, measured: int) -> None:
    """By benchmarks/memory_plan.py, on a CPU; too little would let a run die."""
    model = ModelConfig(**PRESETS["medium"]["model"])
    config = TrainConfig(
        loop_schedule="fixed", optimizer="adamw", precision="float32", seq_len=128, **changes
    )
    need = rank_need(model, config, ParallelLayout(), config.micro_batch_size, heap=True)
    assert measured < need.total < 1.1 * measured


def test_what_makes_a_run_larger_and_smaller() -> None:
    model, config = preset("medium", grad_checkpointing=False)
    spread = ParallelLayout()

    def total(rows: int = 8, **changes: object) -> int:
        return rank_need(model, replace(config, **changes), spread, rows).total

    assert total(grad_checkpointing=True) < total()
    assert total(rows=4) < total()
    assert total(seq_len=2048) > total()
    assert total(loop_schedule="fixed", loops=6) > total(loop_schedule="fixed", loops=2)
    assert total(optimizer="muon") < total(optimizer="adamw")
    assert total(document_mask=False) < total()
    on_cpu = rank_need(model, config, spread, 8, heap=True)
    assert on_cpu.gaps > 0 and on_cpu.total > total()


@pytest.mark.parametrize("tied", [True, False])
def test_the_peak_by_hand(tied: bool) -> None:
    """With a vocabulary that dwarfs the rest, in a pass that is long and in one that is short."""
    model = ModelConfig(
        vocab_size=100_000, d_model=64, d_ff=64, n_heads=2, n_kv_heads=1, head_dim=32,
        tie_embeddings=tied,
    )  # fmt: skip
    counts = count(model)
    # Weights and AdamW's two numbers each, then what the backward pass holds beside them.
    for length, rows in (256, 4), (1, 1):
        config = TrainConfig(
            loop_schedule="fixed", loops=2, optimizer="adamw", batch_size=rows, seq_len=length
        )
        kept = count_activations(model, config, rows)
        logits = kept.total + kept.logits  # when their gradients come, and no others are there
        # When the embedding's own gradient comes, beside the blocks' and the head's.
        last = 4 * (counts.prelude + counts.core + counts.coda + 2 * counts.embedding)
        assert (logits > last) == (length > 1)
        need = rank_need(model, config, ParallelLayout(), rows)
        assert need.total == 12 * counts.all + max(logits, last)


@pytest.mark.parametrize(("loops", "readouts"), [(1, (1, 1, 1)), (2, (1, 2, 2)), (3, (1, 2, 3))])
def test_readouts_by_hand(loops: int, readouts: tuple[int, ...]) -> None:
    model = ModelConfig()
    for loss_at, times in zip(("last", "pair", "all"), readouts, strict=True):
        config = TrainConfig(loop_schedule="fixed", loops=loops, loss_at=loss_at, seq_len=32)
        found = count_activations(model, config, 5).logits
        assert found == 4 * 32 * 5 * model.vocab_size * times  # bytes


def test_the_deepest_batch_of_a_thousand() -> None:
    model = ModelConfig()
    assert deepest_rows(model, TrainConfig(loop_schedule="fixed", loops=3), 5) == [5, 5, 5]
    drawn = deepest_rows(model, TrainConfig(loop_schedule="sampled"), 16)
    assert drawn[0] == 16 and drawn == sorted(drawn, reverse=True) and len(drawn) <= 10
    deep = deepest_rows(model, TrainConfig(loop_schedule="sampled", loops=4), 16)
    assert deep[:4] == [16] * 4 and sum(deep) > sum(drawn)
    ruled = deepest_rows(model, TrainConfig(loop_schedule="loss"), 16)
    assert ruled[:2] == [16, 16] and sum(ruled) > sum(drawn) > 3 * 16
    assert drawn == deepest_rows(model, TrainConfig(loop_schedule="sampled"), 16)
    one = deepest_rows(model, TrainConfig(loop_schedule="loss", max_loops=1), 4)
    assert one == [4]


def test_advice_is_followed_by_a_fit() -> None:
    model, config = preset("1b", grad_checkpointing=False)
    tight = plan(model, config, WORKSTATION)
    assert tight.advice == "Pass `grad_checkpointing` `micro_batch` 1."
    followed = replace(config, grad_checkpointing=True, micro_batch=1)
    assert not tight.fits and plan(model, followed, WORKSTATION).fits
    tighter = plan(model, config, replace(WORKSTATION, gpu_memory=(16 * GB,)))
    assert "`zero3`" in tighter.advice and "`grad_checkpointing`" in tighter.advice
    tiny = plan(*preset("7b"), replace(WORKSTATION, gpu_memory=(2 * GB,), ram=2 * GB, disk=GB))
    assert "smaller `preset`" in tiny.advice


def test_the_dry_run_shows_the_arithmetic(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "_LONGEST", 0.0)  # so that none is tried
    assert main(["train", "--dry-run", "--preset", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == 2000 * found["seconds_per_step"] > 0
    assert found["schema_version"] == 1 and found["fits"] in (True, False)
    assert found["total"] == sum(found["bytes"].values())
    assert found["offload"]["optimizer"] == "none" and found["spread"]["kind"] == "none"
    assert main(["train", "--dry-run", "--preset", "small"]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "at the peak", "nothing",
                 "2,000 steps, an estimate: by its FLOPs"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize(
    "ram, gpus, flags, code",
    [
        (24, (), ["--preset", "7b"], 3),  # where nothing helps
        (64, (16,), ["--preset", "1b"], 2),  # where --zero3 does
        (24, (), ["--preset", "7b", "--force"], None),
        (24, (), ["--preset", "small"], None),
        (13, (), ["--preset", "medium"], None),  # by an estimate that may be wrong
    ],
)
def test_what_memory_can_not_hold_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ram: int, gpus: tuple[int, ...], flags: list[str], code: int | None,
) -> None:  # fmt: skip
    machine = replace(WORKSTATION, ram=ram * GB, gpu_memory=tuple(size * GB for size in gpus))
    monkeypatch.setattr("looptx_core.parallel.plan.this_machine", lambda *_: machine)
    monkeypatch.chdir(tmp_path)
    # The data, which are read next, are missing.
    command = ["train", *flags, "--batch-size", "8", "--data", "none.txt", "--out", "run"]
    assert main(command) == (4 if code is None else code)
    error = capsys.readouterr().err
    assert ("It does not fit" in error) == ("--force tries" in error) == (code is not None)
    assert ("--zero3" in error) == (code == 2) and not any(tmp_path.iterdir())


def test_only_what_is_far_too_large_is_hopeless() -> None:
    model, config = preset("medium", micro_batch=1)
    needed = plan(model, config, replace(WORKSTATION, gpu_memory=())).total
    for share, fits, hopeless in ((1.0, True, False), (1.2, False, False), (1.7, False, True)):
        ram = int(needed / share / 0.85) + 1
        found = plan(model, config, replace(WORKSTATION, gpu_memory=(), ram=ram))
        assert (found.fits, found.is_hopeless) == (fits, hopeless)

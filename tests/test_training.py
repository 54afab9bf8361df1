"""Training: what is learned, what is drawn, and that a resumed run is the same run."""

from __future__ import annotations

import json
import math
import operator
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from looptx_core.checkpoint.folder import read_exit
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.datamodule import SeededBatches
from looptx_core.generation.exits import calibrated, stated
from looptx_core.machine.device import on_best_device
from looptx_core.model import fused
from looptx_core.model.confidence import sharpness
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.calibration import calibrate, fit_gain, fit_stated, fit_temperature
from looptx_core.training.callbacks import read_metrics
from looptx_core.training.curves import verdict
from looptx_core.training.evaluate import LoopEvaluation, evaluate_loops
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.metrics import auroc
from looptx_core.training.muon import Muon, orthogonal
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import (
    build_optimizer,
    clip_by_part,
    learning_rate_factor,
)
from looptx_core.training.plan import plan

MODEL = ModelConfig(
    vocab_size=400, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, core_layers=1
)
SETTINGS = {
    "steps": 12, "seq_len": 32, "batch_size": 8, "micro_batch": 4, "save_every": 4, "val_every": 6,
    "val_batches": 1, "log_every": 1, "lr": 0.003, "precision": "float32",
    "model": {**MODEL.to_dict(), "dropout": 0.1},
}  # fmt: skip


def model(seed: int = 0) -> LoopedTransformer:
    torch.manual_seed(seed)
    return LoopedTransformer(MODEL)


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 400, (rows, 17), generator=generator), torch.arange(rows)


def schedule(**settings) -> LoopSchedule:
    return LoopSchedule(TrainConfig(**settings), MODEL.max_loops)


def unasked(by: str) -> torch.Tensor:
    raise AssertionError(f"nothing to measure the {by} for")


def test_depths_are_functions_of_seed_step_and_sample() -> None:
    drawn = schedule(loop_schedule="sampled", mean_loops=4)
    together = drawn.depths(7, torch.arange(64), unasked)
    alone = [int(drawn.depths(7, torch.tensor([i]), unasked)) for i in range(64)]
    assert together.tolist() == alone
    assert together.tolist() != drawn.depths(8, torch.arange(64), unasked).tolist()
    many = drawn.depths(0, torch.arange(4000), unasked)
    assert set(many.tolist()) == set(range(1, 11))
    assert 3.4 < float(many.double().mean()) < 4  # the truncation at 10 costs some of the 4
    deep = schedule(loop_schedule="sampled", mean_loops=4, loops=3)
    assert set(deep.depths(8, torch.arange(2000), unasked).tolist()) == set(range(3, 11))
    assert [deep.first_read(at) for at in ("last", "pair", "all")] == [3, 2, 1]


@pytest.mark.parametrize(("loss_at", "prior"), [("pair", 0), ("all", 0), ("all", 1.5), ("last", 2)])
def test_the_objective_is_the_mean_of_the_readouts(loss_at: str, prior: float) -> None:
    """Against one plain pass for each sequence."""
    net, (tokens, ids) = model(), batch()
    drawn = schedule(loop_schedule="sampled")
    depths = drawn.depths(3, ids, unasked).tolist()
    found = loop_loss(net, tokens, drawn, 3, ids, loss_at=loss_at, loss_prior=prior)
    rows = []
    for row, depth in enumerate(depths):
        losses = evaluate_loops(net, tokens[row : row + 1], depth).loss_by_loop
        first = {"pair": max(0, depth - 2), "all": 0, "last": depth - 1}[loss_at]
        counts = [loop**prior for loop in range(first + 1, depth + 1)]
        rows.append(sum(map(operator.mul, counts, losses[first:])) / sum(counts))
    assert float(found.loss.detach()) == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    assert found.mean_loops == sum(depths) / len(depths)


def test_loss_sends_the_hard_sequences_deeper() -> None:
    net, (tokens, ids) = model(), batch()
    losses = [evaluate_loops(net, tokens[i : i + 1], 1).loss_by_loop[0] for i in range(6)]
    middle = sorted(losses)[3] - 1e-6
    rule = schedule(loop_schedule="loss", deeper_by="loss", loss_threshold=middle, explore=0.0)
    depths = rule.depths(0, ids, lambda by: torch.tensor(losses))
    assert [depth >= 2 for depth in depths.tolist()] == [loss > middle for loss in losses]
    assert loop_loss(net, tokens, rule, 0, ids).mean_loops == float(depths.double().mean())


def test_loss_sends_deeper_what_has_most_to_gain() -> None:
    """By the confidence head's forecast, made here to be what a token's own bias says."""
    net, (tokens, ids) = model(), batch()
    with torch.no_grad():
        gains = net.confidence(next(net.states(tokens[:, :-1], 1)), 1).gain.mean(1)
    rule = schedule(loop_schedule="loss", deeper_share=0.5, explore=0.0)
    deeper = rule.depths(0, ids, lambda by: gains) >= 2
    assert deeper.tolist() == (gains > gains.median()).tolist()
    fresh = schedule(loop_schedule="loss", deeper_share=0.5, explore=0.0)
    assert loop_loss(net, tokens, fresh, 0, ids).mean_loops == float(
        rule.depths(0, ids, lambda by: gains).double().mean()
    )


def test_a_share_of_the_sequences_draws_its_depth_regardless() -> None:
    rule = schedule(loop_schedule="loss", explore=0.5, loss_threshold=1e9)
    depths = rule.depths(0, torch.arange(2000), lambda by: torch.zeros(2000))
    free = schedule(loop_schedule="sampled").depths(0, torch.arange(2000), unasked)
    expected = 0.5 * float((free >= 2).double().mean())
    assert float((depths >= 2).double().mean()) == pytest.approx(expected, abs=0.05)


def test_the_adaptive_threshold_is_in_the_state() -> None:
    rule = schedule(loop_schedule="loss", explore=0.0, deeper_share=0.5)
    rule.depths(0, torch.arange(3), lambda by: torch.tensor([1.0, 2.0, 3.0]))
    assert float(rule.state_dict()["threshold"]) == 2.0


@pytest.mark.parametrize("rule", ["sampled", "loss"])
def test_a_masked_document_learns_what_it_would_alone(rule: str) -> None:
    """The loss of a window of two documents is that of the documents, each by itself."""
    net, (tokens, ids) = model(), batch()
    documents = torch.zeros(6, 16, dtype=torch.long)
    documents[:, 7:] = 1
    drawn = schedule(loop_schedule=rule, explore=0.0, loss_threshold=-1e9)
    together = loop_loss(net, tokens, drawn, 0, ids, documents=documents)
    first = loop_loss(net, tokens[:, :8], drawn, 0, ids)
    second = loop_loss(net, tokens[:, 7:], drawn, 0, ids)
    alone = (7 * first.loss + 9 * second.loss) / 16
    assert float(together.loss.detach()) == pytest.approx(float(alone.detach()), abs=1e-5)
    assert net.surroundings(16, documents=documents).mask is not None
    assert net.surroundings(16, documents=documents * 0 + 3).mask is None
    unmasked = loop_loss(net, tokens, drawn, 0, ids)
    assert abs(float(unmasked.loss.detach()) - float(alone.detach())) > 1e-5


def test_muon_for_the_blocks_and_adamw_for_the_rest() -> None:
    """Every weight is stepped by one of the two, and their state comes back."""
    tokens, ids = batch()
    config = TrainConfig(lr=0.01)
    runs = []
    for interrupted in (False, True):
        net = model()
        optimizer = build_optimizer(net, config)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
            list(net.parameters())
        )
        for step in range(4):
            if interrupted and step == 2:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(net, config)
                optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            found = loop_loss(net, tokens, schedule(), step, ids)
            (found.loss + found.confidence_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*runs)


def test_targets_of_weight_zero_cost_no_product_and_change_nothing() -> None:
    tokens, ids = batch()
    weights = torch.ones(6, 16)
    weights[:, :9] = 0
    found = []
    for other in (False, True):
        net = model()
        if other:  # what does not count may be any token
            targets = tokens[:, 1:].clone()
            targets[:, :9] = 5
        else:
            targets = tokens[:, 1:]
        result = loop_loss(
            net, tokens[:, :-1], schedule(), 0, ids, targets=targets, weights=weights
        )
        found.append(result)
    assert torch.equal(found[0].loss, found[1].loss)
    whole = loop_loss(model(), tokens, schedule(), 0, ids)
    assert found[0].flops < whole.flops


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (48, 64)])
def test_matrices_become_orthogonal_as_torch_makes_them(shape: tuple[int, int]) -> None:
    """In float32 against the plain iteration in float64; in bf16 against torch's own step."""
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, *shape, generator=generator)
    start *= torch.logspace(0, -4, shape[1])  # singular values of many sizes
    for one, found in zip(start, orthogonal(start, coefficients, 5, 1e-7)):
        x = (one if shape[0] <= shape[1] else one.T).double()
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x if shape[0] <= shape[1] else x.T
        assert torch.allclose(found.double(), x, atol=1e-3)

    weights = [torch.nn.Parameter(one.clone()) for one in start]
    alike = [torch.nn.Parameter(one.clone()) for one in start]
    ours = Muon(weights, 0.02, 0.1, torch.bfloat16)
    theirs = torch.optim.Muon(alike, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, two in zip(weights, alike):
            one.grad = torch.randn(shape, generator=generator)
            two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, two in zip(weights, alike):
        assert torch.allclose(one, two, atol=3e-3)
        assert torch.equal(ours.state[one]["momentum_buffer"], theirs.state[two]["momentum_buffer"])


def test_the_type_of_muons_products_is_in_its_state() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    saved = Muon([weight], 0.1, 0.0, torch.float32).state_dict()
    other = Muon([weight], 0.1, 0.0, torch.bfloat16)
    other.load_state_dict(saved)
    assert other.param_groups[0]["products"] == "float32"


def test_recomputing_gives_the_same_gradients() -> None:
    tokens, ids = batch()
    grads = []
    for recompute in (False, True):
        net = model()
        rule = schedule(loop_schedule="sampled")
        loop_loss(net, tokens, rule, 0, ids, recompute=recompute).loss.backward()
        grads.append([p.grad for p in net.trunk_parameters()])
    for one, two in zip(*grads):
        assert torch.allclose(one, two, atol=1e-7)


def test_the_confidence_head_does_not_move_the_trunk() -> None:
    tokens, ids = batch()
    trunks = []
    for weight in (0.0, 1.0):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(3):
            found = loop_loss(net, tokens, schedule(loop_schedule="sampled"), step, ids)
            (found.loss + weight * 100 * found.confidence_loss).backward()
            clip_by_part(net, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        trunks.append(torch.cat([p.detach().flatten() for p in net.trunk_parameters()]))
    assert torch.equal(*trunks)


def test_learning_rate() -> None:
    factor = learning_rate_factor(TrainConfig(steps=100, warmup=0.1, min_lr=0.1))
    assert factor(0) == 0.1 and factor(9) == 1.0 and factor(55) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)


def test_temperature() -> None:
    """Logits that are three times too sure of a Bernoulli are divided by about three."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, generator=generator)
    hit = (torch.rand(20_000, generator=generator) < true.sigmoid()).float()
    assert fit_temperature(3 * true, hit) == pytest.approx(3, rel=0.05)


def test_what_may_not_stop_is_not_calibrated_on() -> None:
    generator = torch.Generator().manual_seed(0)
    logit, sharp, gain, each = torch.randn(4, 3, 500, generator=generator)
    change = torch.rand(3, 500, generator=generator) + 0.1
    hit = (torch.rand(3, 500, generator=generator) < 0.5).float()
    hit[0] = 0  # by a head that was never asked there

    def some(loops: slice) -> LoopEvaluation:
        sums = [part[loops].double().sum(1) for part in (each, hit, sharp)]
        parts = [part[loops] for part in (logit, hit, gain, change, each, sharp)]
        return LoopEvaluation(500, *sums, *parts)

    late = calibrate(ExitSettings(min_loops=2), some(slice(3)))
    read = calibrate(ExitSettings(), some(slice(1, 3)))
    assert (late.temperature, late.stated) == (read.temperature, read.stated)
    # Where fewer loops are looked at, by the last of them.
    alone = calibrate(ExitSettings(min_loops=3), some(slice(1, 2)))
    assert all(map(math.isfinite, (alone.temperature, *alone.stated)))


def test_the_stated_confidence_weighs_head_and_readout() -> None:
    """Both tell a part of the truth, the read-out twice as much."""
    generator = torch.Generator().manual_seed(0)
    logit, sharp = torch.randn(2, 40_000, generator=generator)
    true = torch.sigmoid(0.3 + 0.5 * logit + sharp)
    hit = (torch.rand(40_000, generator=generator) < true).float()
    assert fit_stated(logit, sharp, hit) == pytest.approx((0.3, 0.5, 1.0), abs=0.04)
    told = stated(logit, sharp, ExitSettings(stated=(0.3, 0.5, 1.0)))
    assert torch.allclose(told, true)
    best, worst = auroc(told, hit), max(auroc(logit, hit), auroc(sharp, hit))
    assert best > worst + 0.01
    # Where no answer is wrong, nothing runs away.
    assert max(map(abs, fit_stated(logit, sharp, torch.ones(40_000)))) < 20


def test_the_log_odds_of_the_best_by_hand() -> None:
    logs = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]).log()
    odds = sharpness(logs)
    assert odds[:2].tolist() == pytest.approx([math.log(3), 0.0], abs=1e-6)
    assert 15 < odds[2] < 17


def test_predicted_gains_become_true_ones() -> None:
    """A loop whose gain goes with the prediction, one whose goes with the change, one of noise
    alone, and one that takes back."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(5, 40_000, generator=generator)
    change = torch.randn(5, 40_000, generator=generator).exp()
    gains = [0.2 * (0.5 * predicted[0]).exp(), 0.1 * change[1] ** 0.7]
    gains += [torch.full((40_000,), 0.01), torch.full((40_000,), -0.05)]
    drops = torch.stack(gains) + 0.2 * torch.randn(4, 40_000, generator=generator)
    loss = torch.cat([torch.full((1, 40_000), 9.0), 9.0 - drops.cumsum(0)])
    slope, power, offset = fit_gain(predicted, change, loss)
    assert slope[:2] == pytest.approx((0.5, 0.0), abs=0.05)
    assert power[:2] == pytest.approx((0.0, 0.7), abs=0.05)
    assert max(map(abs, (slope[2], power[2]))) < 0.3  # whose standard errors are 0.1
    assert (slope[3], power[3]) == (0.0, 0.0)
    assert offset[:2] == pytest.approx((math.log(0.2), math.log(0.1)), abs=0.06)
    assert offset[3] == pytest.approx(math.log(1e-6))
    told = ExitSettings(gain_slope=slope, gain_power=power, gain_offset=offset)
    for loop in (1, 2):
        logit = torch.zeros(40_000)
        words = (logit, predicted[loop - 1], change[loop - 1])
        nats = calibrated(*words, loop, told)[1]
        assert (nats / gains[loop - 1]).log().abs().mean() < 0.05
        single = calibrated(*(float(part[0]) for part in words), loop, told)[1]
        assert single == pytest.approx(float(nats[0]), rel=1e-5)


def test_batches_are_functions_of_the_seed() -> None:
    whole = list(SeededBatches(10, 4, 7, seed=1))
    later = SeededBatches(10, 4, 7, seed=1)
    later.start = 3
    assert list(later) == whole[3:] and len(later) == 7
    assert sorted([i for batch in whole for i in batch][:10]) == list(range(10))
    ranks = [list(SeededBatches(10, 2, 7, 1, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == whole


def test_the_verdict_follows_the_figures() -> None:
    assert "nothing" in verdict([2.0, 2.0, 2.001])
    assert "10.0%" in verdict([2.0, 1.8, 1.85])


def run(folder: Path, shards: Path, settings: dict, *flags: str, wait: bool = True):
    """looptx train in a process of its own."""
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "looptx_cli.main", "train"]
    if "--resume" not in flags:
        command += ["--config", str(file), "--data", str(shards), "--out", str(folder)]
    process = subprocess.Popen(
        [*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(folder: Path) -> list[dict]:
    """The metrics, but for the clock's."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(
    scope="module",
    params=[(0, "float32"), (4, "float32"), (0, "bf16")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def uninterrupted(request, tmp_path_factory, shards) -> tuple[Path, dict]:
    workers, precision = request.param
    settings = SETTINGS | {"workers": workers, "precision": precision}
    folder = tmp_path_factory.mktemp("run") / "whole"
    code, _, err = run(folder, shards, settings)
    assert code == 0, err
    return folder, settings


def test_a_run_leaves_what_it_should(uninterrupted) -> None:
    folder, _ = uninterrupted
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "final/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    lines = records(folder)
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 13))
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [6, 12]
    assert len(validations[0]["val_loss_by_loop"]) == 10
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["origins"]["seed"] == "default"


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, shards) -> None:
    whole, settings = uninterrupted
    folder = tmp_path / "killed"
    process = run(folder, shards, settings, wait=False)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "final").exists()
    code, _, err = run(folder, shards, settings, "--resume", str(folder))
    assert code == 0, err
    assert records(folder) == records(whole)
    ours, theirs = (load_file(f / "final/model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, shards) -> None:
    folder = tmp_path / "stopped"
    settings = SETTINGS | {"steps": 4000, "save_every": 1000, "val_every": 1000}
    process = run(folder, shards, settings, wait=False)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--resume {folder}" in err.splitlines()[-1] and "minutes left" in err
    assert len(list(folder.glob("checkpoints/*.ckpt"))) == 1


def test_a_loss_of_nan_stops_and_keeps_the_checkpoint(tmp_path, shards) -> None:
    folder = tmp_path / "nan"
    settings = SETTINGS | {"lr": 1e30, "clip": 1e30, "save_every": 1}
    code, _, err = run(folder, shards, settings)
    assert code == 1, err
    assert "not finite at step" in err.splitlines()[-1]
    assert list((folder / "checkpoints").glob("*.ckpt"))


def test_a_full_disk_at_a_checkpoint(tmp_path, shards) -> None:
    """The system refuses more than so many bytes a file: one line, nothing half-written."""
    folder = tmp_path / "full"
    settings = SETTINGS | {"save_every": 4}
    process = run(folder, shards, settings, wait=False)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "cannot save to" in (last := err.splitlines()[-1]) and f"--resume {folder}" in last
    assert not list((folder / "checkpoints").iterdir())
    code, _, err = run(folder, shards, settings, "--resume", str(folder))
    assert code == 0 and (folder / "final").exists(), err


def test_a_short_run_has_its_records(tmp_path, shards) -> None:
    settings = SETTINGS | {"steps": 2, "log_every": 10, "val_every": 200, "save_every": 100}
    code, _, err = run(tmp_path / "short", shards, settings)
    assert code == 0, err
    keys = [set(record) & {"train_loss", "val_loss"} for record in records(tmp_path / "short")]
    assert sorted(map(sorted, keys)) == [["train_loss"], ["val_loss"]]


def test_accumulation_logs_the_whole_batch(tmp_path, shards) -> None:
    settings = SETTINGS | {"steps": 1, "loop_schedule": "fixed", "loops": 2}
    settings["model"] = settings["model"] | {"dropout": 0.0}
    first = []
    for micro in (2, 8):
        code, _, err = run(tmp_path / f"by{micro}", shards, settings | {"micro_batch": micro})
        assert code == 0, err
        first.append(records(tmp_path / f"by{micro}")[0])
    assert first[0]["train_loss"] == pytest.approx(first[1]["train_loss"], abs=1e-5)
    assert first[0]["mean_loops"] == first[1]["mean_loops"] == 2
    # Read at its last two loops by default, here the first and the second.
    assert read_exit(tmp_path / "by8" / "final").min_loops == 1
    code, _, err = run(tmp_path / "last", shards, settings | {"loss_at": "last"})
    assert code == 0, err
    assert read_exit(tmp_path / "last" / "final").min_loops == 2


def test_json_lines_end_with_a_summary(tmp_path, shards) -> None:
    code, out, _ = run(tmp_path / "json", shards, SETTINGS | {"steps": 2}, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["step"] == 1
    assert len(lines[-1]["summary"]["loss_by_loop"]) == 10


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--preset", "nanno"], 2, "did you mean 'nano'"),
        (["--seq-len", "100000"], 2, "--seq-len"),
        (["--data", "no/such/file.txt"], 4, "no/such/file.txt"),
        (["--resume", "no/such/run"], 4, "not a run"),
        (["--batch-size", "10", "--micro-batch", "3"], 2, "--micro-batch"),
    ],
)
def test_bad_input(flags, code, word, tmp_path, shards) -> None:
    extra = [] if "--data" in flags or "--resume" in flags else ["--data", str(shards)]
    done = subprocess.run(
        [sys.executable, "-m", "looptx_cli.main", "train", *flags, *extra, "--out",
         str(tmp_path / "out"), "--quiet"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("looptx: error: ") and done.stderr.count("\n") == 1
    assert word in done.stderr


def test_dry_run(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "looptx_cli.main", "train", "--preset", "7b", "--dry-run"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7,1" in done.stdout and "does not fit" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss_at", ["last", "pair", "all"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_plan_counts_what_autograd_keeps(loss_at: str, qk_norm: bool) -> None:
    fused.prepare(False)
    shape = ModelConfig(vocab_size=256, d_model=128, d_ff=384, qk_norm=qk_norm)
    config = TrainConfig(
        batch_size=4, loop_schedule="fixed", loops=3, loss_at=loss_at, optimizer="muon"
    )
    model, ids = LoopedTransformer(shape), torch.arange(4)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loop_loss(model, torch.zeros(4, 129, dtype=torch.long),
                          LoopSchedule(config, 10), 0, ids, loss_at=loss_at)  # fmt: skip
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = plan(shape, config).bytes
    assert saved <= counted["activations"] <= 1.3 * saved  # the gradients' peak is counted too

    (found.loss + found.confidence_loss).backward()
    optimizer = build_optimizer(model, config)
    optimizer.step()
    states = [state for part in optimizer.parts for state in part.state.values()]
    real = sum(x.numel() * 4 for state in states for x in state.values() if x.numel() > 1)
    assert counted["optimizer"] == pytest.approx(real, rel=0.02)


def test_a_measurement_too_large_for_the_gpu_is_made_beside_it() -> None:
    model, seen = torch.nn.Linear(2, 2), []

    def work() -> str:
        seen.append(model.weight.device)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert on_best_device(model, work) == "done" and len(seen) == 2
    assert model.weight.device == seen[1] == torch.device("cpu")
    with pytest.raises(ZeroDivisionError):
        on_best_device(model, lambda: 1 // 0)

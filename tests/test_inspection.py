"""Inspection: each measure against a case by hand, exits, traces, the report and its command."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import looptx_core
from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.data.hops import hop_lines
from looptx_core.generation.engine import Engine
from looptx_core.inspection.charts import Chart, Series, charts
from looptx_core.inspection.decoding import as_good, better_policy
from looptx_core.inspection.influence import deletion_test, influence, relevance, without
from looptx_core.inspection.page import headline, page, sentences
from looptx_core.inspection.stops import stops
from looptx_core.inspection.survey import survey_lines, two_surveys
from looptx_core.inspection.svg import svg
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import exit_depths
from looptx_core.training import evaluate
from looptx_core.training.metrics import (
    auroc,
    calibration_error,
    reliability,
    spearman,
)

BUNDLED = Path(looptx_core.__file__).parent / "assets" / "model"


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.9, 0.1, 0.3, 0.7])
    hit = torch.tensor([1.0, 0.0, 1.0, 0.0])
    low, high = reliability(confidence, hit, bins=2)
    assert low == pytest.approx((0.2, 0.5, 2)) and high == pytest.approx((0.8, 0.5, 2))
    assert calibration_error(confidence, hit, bins=2) == pytest.approx(0.3)
    assert calibration_error(torch.full((4,), 0.5), hit, bins=1) == pytest.approx(0)
    assert calibration_error(confidence, hit) == pytest.approx((0.1 + 0.1 + 0.7 + 0.7) / 4)


def test_auroc_by_hand():
    # Of the four pairs of a hit and a miss three are in order and one is tied.
    score, hit = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1, 1, 0, 0])
    assert auroc(score, hit) == pytest.approx(3.5 / 4)
    assert auroc(-score, hit) == pytest.approx(0.5 / 4)
    assert auroc(score, torch.ones(4)) is None


def test_spearman_by_hand():
    a = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert spearman(a, a.log()) == pytest.approx(1)
    assert spearman(a, torch.tensor([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 1.5 1.5 3 4: 4.5 / sqrt(5 * 4.5).
    assert spearman(a, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(math.sqrt(0.9))
    assert spearman(a, torch.zeros(4)) is None


def test_depths_by_hand():
    stops = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    assert exit_depths(stops).tolist() == [1, 2, 3]


def test_the_cache_policy_by_hand():
    def found(fill, last):
        rows = ("fill", None, fill), ("fill", 3, 1.0), ("last", None, last)
        return better_policy([dict(zip(("policy", "fixed", "loss"), row)) for row in rows])

    assert found(fill=1.3, last=1.28) == "last"
    assert found(fill=1.3, last=1.301) == "last"  # it takes a part of the memory
    assert found(fill=1.3, last=1.302) == "fill"


def test_a_fixed_depth_as_good_as_the_exit_by_hand():
    def found(loops, deeper, tasks=()):
        rows = ("last", None, 2.0, loops), ("last", 1, 2.1, 1), ("last", 2, deeper, 2)
        keys = "policy", "fixed", "loss", "mean_loops"
        return as_good(
            [dict(zip(keys, row)) for row in (*rows, ("fill", 2, 1.0, 2))], "last", tasks
        )

    assert found(loops=2.3, deeper=2.001)["fixed"] == 2
    assert found(loops=1.95, deeper=2.001)["fixed"] == 2  # looking costs as much
    assert found(loops=2.3, deeper=2.01) is None
    assert found(loops=1.8, deeper=1.9) is None  # better, and dearer
    lines = dict(accuracy=0.9, accuracy_by_loop=[0.5, 0.8, 0.9])
    assert found(loops=2.3, deeper=2.0, tasks=[lines]) is None


def test_relevance_by_hand():
    # One layer, one head: position 1 looks at 0 by 0.25; the answer gains 2 for each unit of it.
    weight = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    gradient = torch.tensor([[[[0.0, 0.0], [2.0, -4.0]]]])
    start = torch.tensor([[0.0, 1.0]])
    once = relevance(start, [weight], [gradient])
    assert once.tolist() == [[0.5, 1.0]]
    assert relevance(start, [weight] * 2, [gradient] * 2).tolist() == [[1.0, 1.0]]


def test_influential_tokens_matter_more_than_random_ones(bundled):
    model, before = bundled.model, bundled.model.attend
    for line in hop_lines(seed=11, count=2):
        tokens = torch.tensor(bundled.tokenizer.encode(line).ids)
        at = torch.full((len(tokens),), 4)
        shares = influence(model, tokens, at)
        assert shares.triu().abs().max() == 0
        assert torch.allclose(shares[1:].sum(1), torch.ones(len(tokens) - 1), atol=1e-5)
        test = deletion_test(model, tokens, shares, at)
        assert test.influential > test.random + 0.5
    assert model.attend is before and not any(p.grad is not None for p in model.parameters())


def test_nothing_removed_changes_nothing(bundled):
    tokens = torch.tensor(bundled.tokenizer.encode("Call me Ishmael. Some years ago").ids)
    kept = without(bundled.model, tokens, torch.zeros(1, len(tokens), dtype=torch.bool), 3)
    plain = bundled.model(tokens[None], loops=3).logits.log_softmax(-1)
    assert torch.allclose(kept, plain, atol=1e-4)


@pytest.mark.parametrize("policy", ["fill", "last"])
@pytest.mark.parametrize("loops", ["auto", 3])
def test_following_a_text_is_what_generating_it_does(bundled, policy, loops):
    engine = Engine(bundled.model, bundled.tokenizer, bundled.exit)
    options = GenerationOptions(temperature=0, max_new_tokens=12, loops=loops, kv_policy=policy)
    prompt = bundled.tokenizer.encode("map bf da ee fe cd hh gh aa:").ids
    (made,) = engine.complete([prompt], options)
    tokens = torch.tensor([prompt + [step.id for step in made.tokens]])
    walked = engine.score_forced(tokens, len(prompt), options)
    assert walked.loops[0].tolist() == [step.loops for step in made.tokens]
    logprobs = torch.tensor([step.logprob for step in made.tokens])
    assert torch.allclose(-walked.loss[0], logprobs, atol=1e-4)
    assert walked.hit.tolist() == [[1.0] * len(made.tokens)]  # each was taken as the likeliest
    tokens[0, -1] += 1
    assert engine.score_forced(tokens, len(prompt), options).hit.sum() == len(made.tokens) - 1


def test_tokens_read_out_in_pieces_are_those_of_the_whole(bundled, monkeypatch):
    tokens = torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(0))
    counted = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = survey_lines(bundled.model, tokens, 3, counted)
    monkeypatch.setattr(evaluate, "_READ_OUT", 5 * bundled.model.config.vocab_size)
    parts = survey_lines(bundled.model, tokens, 3, counted)
    assert whole.evaluation.tokens == int(counted.sum()) > 5
    for name, values in {**vars(whole.evaluation), **whole.logit_signals}.items():
        found = {**vars(parts.evaluation), **parts.logit_signals}[name]
        assert torch.as_tensor(found).shape == torch.as_tensor(values).shape
        torch.testing.assert_close(found, values, msg=name)


def test_surveys_do_not_share_sequences():
    torch.manual_seed(0)
    model = LoopedTransformer(ModelConfig(vocab_size=64, max_loops=2)).eval()
    tokens = torch.randint(0, 64, (4, 9))
    fit, shown = two_surveys(model, [{"tokens": tokens}, {"tokens": tokens[:1]}], loops=2)
    assert fit.loss.shape == (2, 24) and shown.loss.shape == (2, 16)
    alone = survey_lines(model, tokens[1::2], loops=2)
    assert torch.allclose(shown.loss, alone.loss, atol=1e-5)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """The command on a copy of the bundled model, with all that it writes."""
    folder = tmp_path_factory.mktemp("inspected")
    shutil.copytree(BUNDLED, folder / "model")
    code = main(
        ["inspect-loops", "--model", str(folder / "model"), "--out", str(folder / "report"),
         "--val-batches", "3", "--decode-tokens", "96", "--target-loss-increase", "1%",
         "--prompt", "map bf da ee fe cd hh gh aa:", "--max-new-tokens", "6", "--quiet"]
    )  # fmt: skip
    assert code == 0
    return folder


def test_the_report(inspected):
    document = json.loads((inspected / "report/report.json").read_text())
    assert len(document["bits_per_byte_by_loop"]) == len(document["accuracy_by_loop"]) == 10
    assert {"rule", "threshold", "mean_loops", "loss"} <= set(document["frontier"][0])
    rules = {p["rule"] for p in document["frontier"]}
    assert rules == {"auto", "fixed", "confidence", "gain", "kl", "entropy", "maxprob", "change",
                     "oracle"}  # fmt: skip
    assert {row["policy"] for row in document["kv_policies"]} == {"fill", "last"}
    assert 0 <= document["ece"] < 0.1 and 0.7 < document["auroc"] <= 1
    hops = {task["name"]: task for task in document["tasks"]}
    assert hops["4 hops"]["mean_loops"] > hops["1 hop"]["mean_loops"] + 1
    test = document["trace"]["deletion"]
    assert test["influential"] > test["random"]
    stored = json.loads((inspected / "model/generation_config.json").read_text())["exit"]
    assert stored["rule"] == document["choice"]["rule"]
    assert stored["temperature"] == document["temperature"]


def test_the_page_stands_alone(inspected):
    text = (inspected / "report/report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in text
    pictures = {file.stem for file in (inspected / "report").glob("*.png")}
    assert pictures == {"loops", "confidence", "frontier", "tasks"}
    for name in pictures:  # the same figures, as SVG
        assert re.search(rf'<section id="{name}">.*?<svg class="chart"', text)
    document = json.loads((inspected / "report/report.json").read_text())
    foreign = "</script><b>"
    document["trace"]["tokens"][0]["text"] = foreign
    document["facts"] |= {"name": foreign, "data": [foreign], "steps": foreign}
    document["model"] = document["tasks"][0]["name"] = foreign
    assert foreign not in page(document, {})


def test_the_page_opens_with_the_answer_and_the_model(inspected):
    document = json.loads((inspected / "report/report.json").read_text())
    text = re.sub(r"<[^>]*>", "", (inspected / "report/report.html").read_text().split("<h2>")[0])
    assert headline(document) in text
    choice = document["choice"]
    assert f"{choice['mean_loops']:.1f} loops a token instead of 10" in text
    assert "526,210" in text and "0 + 1 x 10 loops + 0" in text and "moby-dick" in text
    never = {**document, "choice": {**choice, "rule": None}}
    assert "no exit keeps the loss within 1\u00a0%" in headline(never)
    over = {**document, "choice": {**choice, "loss_increase": 0.02}}
    assert "raises the loss by 2.00\u00a0%, more than 1\u00a0%" in headline(over)


def test_too_few_tokens_are_told(inspected):
    document = json.loads((inspected / "report/report.json").read_text())
    point = {**document["frontier"][0], "rule": "gain", "threshold": 0.5, "mean_loops": 1.5}
    choice = {**document["choice"], "undecided": {**point, "tokens": 123_456}}
    told = " ".join(sentences({**document, "choice": choice}))
    few = f"{document['tokens_to_calibrate']:,} tokens are too few"
    assert "gain at 0.5, 1.50 loops, may" in told and few in told and "123,456 would" in told
    one = " ".join(sentences({**document, "loops": 1, "choice": {**choice, "rule": None}}))
    assert "nothing to save" in one and "sure to stay" not in one


def test_the_frontier_shows_the_picked_point_and_is_not_flattened(inspected):
    document = json.loads((inspected / "report/report.json").read_text())
    choice = document["choice"]
    document["frontier"] += [
        {**document["frontier"][0], "rule": "oracle", "loss": 1e-3 * choice["full_depth_loss"]},
        {**document["frontier"][0], "rule": "gain", "loss": 9 * choice["full_depth_loss"]},
    ]
    _, (by_loops, by_flops) = charts(document)["When to stop"]
    for chart, key in ((by_loops, "mean_loops"), (by_flops, "flops")):
        low, high = chart.y_range
        assert -1 < low < 0 and 2 <= high < 10  # percent
        assert "oracle" not in [series.name for series in chart.series]
        oracle, picked = chart.marks
        assert oracle.y is None and oracle.x == choice["oracle"][key]
        assert (picked.x, picked.label) == (choice[key], "picked")
        assert picked.y == pytest.approx(100 * choice["loss_increase"])
    drawn = svg(by_loops, "a")
    assert 'class="picked"' in drawn and "oracle" in drawn and "nan" not in drawn


def test_charts_of_missing_and_equal_numbers():
    chart = Chart(
        "<t>", "x", "y", [Series("<s>", [(1, None), (2, 0.5), (3, 0.5)]), Series("b", [])]
    )
    drawn = svg(chart, "a")
    assert drawn.count("data-tip") == 2 and "<t>" not in drawn and "<s>" not in drawn
    assert "nan" not in drawn and "inf" not in drawn
    assert "nan" not in svg(Chart("t", "x", "y", [Series("s", [(2, 0.0)])], log_y=True), "a")


def test_the_sliders_depths_are_the_stop_rules(inspected, bundled):
    document = json.loads((inspected / "report/report.json").read_text())
    trace, choice = document["trace"], document["choice"]
    found = stops(document, trace)
    assert set(found) == {"auto", "confidence", "gain", "kl", "entropy", "maxprob", "fixed"}
    for rule, points in found.items():
        means = [point["mean_loops"] for point in points]
        assert means == sorted(means) and len(means) > 1
        frontier_means = [p["mean_loops"] for p in document["frontier"] if p["rule"] == rule]
        assert {m for m, p in zip(means, points) if not p["picked"]} <= set(frontier_means)
    # The picked exit was stored and traced: its depths are the trace's own.
    (picked,) = [point for point in found[choice["rule"]] if point["picked"]]
    assert [ord(c) - 48 for c in picked["depths"]] == [t["loops"] for t in trace["tokens"]]
    assert picked["increase"] == pytest.approx(100 * choice["loss_increase"])
    # By hand for the gain: the first loop after which less is expected than the threshold.
    gains = sorted((p for p in document["frontier"] if p["rule"] == "gain"),
                   key=lambda p: (p["mean_loops"], -p["loss"]))  # fmt: skip
    middle = gains[len(gains) // 2]
    by_hand = [
        next((n for n, v in enumerate(t["signals"]["gain"][:9], 1) if v < middle["threshold"]), 10)
        for t in trace["tokens"]
    ]
    depths = [p["depths"] for p in found["gain"] if f" {middle['threshold']:.4g}" in p["says"]]
    assert [ord(c) - 48 for c in depths[0]] == by_hand
    assert all(len(v) == 10 for v in trace["tokens"][0]["signals"].values())
    assert trace["tokens"][0]["signals"]["kl"][0] is None  # nothing to compare with


def test_short_documents_are_not_decoded(tmp_path):
    lines = (json.dumps({"text": f"{n} and {n}"}) for n in range(400))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    line = ["--data", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["inspect-loops", *line, "--seq-len", "16", "--val-batches", "2", "--quiet"]) == 0
    document = json.loads((tmp_path / "out/report.json").read_text())
    assert document["kv_policies"] == [] and document["as_good"] is None
    assert document["trace"] is None and document["sample"] is None
    assert "Token by token" not in (tmp_path / "out/report.html").read_text()


def test_a_model_of_one_loop_has_a_page(bundled, tmp_path):
    lines = (json.dumps({"text": f"{n} and {n} " * 30}) for n in range(60))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    line = ["--data", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path / "out"), "--quiet"]
    line += ["--max-loops", "1", "--seq-len", "32", "--val-batches", "2", "--decode-tokens", "0"]
    assert main(["inspect-loops", *line]) == 0
    document = json.loads((tmp_path / "out/report.json").read_text())
    assert set(stops(document, document["sample"])) == {"fixed"}
    text = (tmp_path / "out/report.html").read_text()
    assert "one loop a token" in text and "Token by token" in text

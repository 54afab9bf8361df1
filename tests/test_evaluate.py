"""looptx evaluate: tasks by depth, their errors, and three ways to the same log-likelihoods."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_conversion import exported, model  # noqa: F401, fixtures

from looptx_cli.main import main
from looptx_core.evaluation.tally import Tally


@pytest.fixture(scope="module")
def engine():
    from looptx_core.api import load
    from looptx_core.checkpoint.registry import bundled_model

    return load(bundled_model(), kernel="torch").engine


def measured(engine, *tasks: str, loops: str, limit: int | None = 12) -> dict:
    from looptx_core.config.evaluation import EvaluateConfig
    from looptx_core.evaluation.run import evaluate

    return evaluate(engine, EvaluateConfig(tasks=tasks, loops=(loops,), limit=limit))


def test_a_plain_error_is_the_samples() -> None:
    tally = Tally()
    for hit in (1, 0, 1, 1, 0):
        tally.add(("", hit, 1))
    assert tally.value == pytest.approx(0.6)
    assert tally.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_groups_weigh_alike_and_a_lines_answers_are_one_sample() -> None:
    few, twice = Tally(), Tally()
    for hit in (1, 0, 1, 0):
        few.add(("a", hit, 1), ("b", 1, 1), ("b", 1, 1))
        twice.add(("a", hit, 1), ("a", hit, 1))
    assert few.value == pytest.approx((0.5 + 1) / 2)
    assert few.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 3) / 2)
    assert twice.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 3)), "no new samples"


def test_hops_need_depth_and_exits_save_some(engine) -> None:
    found = measured(engine, "hops", loops="1,4,auto", limit=60)
    rows = {row["loops"]: row for row in found["results"]}
    assert set(rows) == {1, 4, "auto"}
    keys = {"task", "loops", "mean_loops", "metric", "value", "stderr", "flops_per_token"}
    assert all(
        set(row) == keys | {"seconds"} and row["metric"] == "accuracy" for row in rows.values()
    )
    assert rows[4]["value"] > rows[1]["value"] + 0.2 and rows[4]["stderr"] < 0.1
    assert rows["auto"]["value"] > rows[1]["value"] + 0.2
    assert 1 < rows["auto"]["mean_loops"] < 4
    assert rows[1]["flops_per_token"] < rows["auto"]["flops_per_token"]
    assert found["enough"][0]["loops"] == 4


def test_sentences_on_depth() -> None:
    """What is right already gains nothing more, and one loop is a loop."""
    from looptx_core.evaluation.run import sentences

    def told(*values: float, metric: str = "accuracy") -> str:
        rows = [{"task": "t", "metric": metric, "loops": loops, "value": value, "stderr": 0.0,
                 "mean_loops": loops} for loops, value in enumerate(values, 1)]  # fmt: skip
        best = values.index(max(values)) + 1
        enough = [{"task": "t", "metric": metric, "loops": best}]
        return sentences({"tasks": {}, "results": rows, "enough": enough})[0]

    assert told(0.5, 0.9) == "t: still gains at 2 loops (0.900 ± 0.000), the deepest."
    assert told(0.5, 1.0) == "t: all right at 2 loops (1.000 ± 0.000), and no sooner."
    assert told(0.9, 1.0, metric="bits_per_byte").startswith("t: still gains")
    assert told(0.9, 0.5) == "t: nothing is gained beyond one loop (0.900 ± 0.000)."


def test_depth_that_is_enough() -> None:
    from looptx_core.evaluation.measure import Result
    from looptx_core.evaluation.run import enough

    def row(loops, value: float, stderr: float | None = 0.02) -> Result:
        return Result("t", loops, 1.0, "m", value, stderr, 1.0, 1.0)

    rows = [row(1, 0.5), row(2, 0.79), row(4, 0.8), row("auto", 0.99)]
    assert enough(rows, True) == 2
    assert enough(rows, False) == 1
    assert enough(rows[:1], True) is None
    assert enough([row(1, 0.5, None), row(2, 0.6, None)], True) == 2


def test_fixed_depths_by_passes_and_by_decoding_agree(engine) -> None:
    """The score of a pass over a line is what decoding it token by token gives."""
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.evaluation.scoring import Scorer

    scorer = Scorer(engine, 3, GenerationOptions(), 8)
    lines = [
        scorer.line(*scorer.pair("Call me", " Ishmael, said he.")),
        scorer.line(*scorer.pair("", "The whale")),
        scorer.line(*scorer.pair("map bf da ee fe cd hh gh aa: c ", "A b E")),
    ]
    passes, decoded = scorer.score(lines), scorer._decoded(lines)
    for line, one, other in zip(lines, passes, decoded):
        assert len(one.logprobs) == len(line.counted) == len(other.logprobs)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.hits == other.hits and set(other.loops) == {3}


def test_long_texts_count_each_token_once(engine) -> None:
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.evaluation.scoring import Scorer

    scorer = Scorer(engine, 1, GenerationOptions(), 8)
    text = "the whale and the sea " * 500
    ids, windows = scorer.encode(text), scorer.windows(text)
    counted = [window.tokens[place] for window in windows for place in window.counted]
    assert counted == ids and len(windows) > 1
    assert all(len(w.tokens) <= engine.model.config.max_seq_len for w in windows)
    assert len(windows[-1].tokens) == engine.model.config.max_seq_len, "the last has its context"


def test_shipped_lines_are_what_the_generators_make() -> None:
    from looptx_core.evaluation.generators import LINES, lines_of
    from looptx_core.evaluation.task import own_tasks, read_task

    files = own_tasks()
    assert set(files) == set(LINES)
    for name, file in files.items():
        task = read_task(file)
        assert task.data.read_text("utf-8") == lines_of(name) and task.lines()
    assert sum(f.stat().st_size for f in next(iter(files.values())).parent.iterdir()) < 300_000


def test_the_command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "evaluate --tasks hops,text,continuation,arithmetic,p_hop --limit 3 --loops 1,auto"
    assert main([*words.split(), "--out", "depths.svg", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema_version"] == 1 and len(document["results"]) == 10
    assert {row["metric"] for row in document["results"]} == {
        "accuracy", "bits_per_byte", "exact_match",
    }  # fmt: skip
    assert b"<svg" in (workplace / "depths.svg").read_bytes() and "try next" in err
    assert main(["evaluate", "--tasks", "hops", "--limit", "3", "--loops", "1,2"]) == 0
    out, err = capsys.readouterr()
    assert "hops" in out and max(map(len, out.splitlines()[:4])) <= 80
    assert main(["evaluate", "--tasks", "hops", "--out", "depths.svg"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--loops 0", 2, "--loops 0: give depths such as"),
        ("--loops deep", 2, "--loops deep"),
        ("--limit 0", 2, "--limit"),
        ("--tasks hop", 2, "did you mean hops?"),
        ("--tasks arc_easy", 3, "looptx's own are arithmetic, "),
        ("--include-path nowhere", 4, "--include-path"),
        ("--out depths.txt", 2, "ends in .png"),
        ("--model nowhere", 4, "nowhere"),
    ],
)
def test_bad_input(
    words: str,
    code: int,
    said: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from looptx_core.evaluation import run

    monkeypatch.setattr(run, "has_harness", lambda: False)  # reading its names takes seconds
    assert main(["evaluate", *words.split()]) == code
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_missing_extra(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from looptx_core.evaluation import run

    monkeypatch.setattr(run, "has_harness", lambda: False)
    for task in ("winogrande", "mmlu_anatomy"):
        assert main(["evaluate", "--tasks", task]) == 3
        assert "pip install 'looptx[eval]'" in capsys.readouterr().err


OWN = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: %s
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a task of one's own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.yaml").write_text(OWN % "q")
    line = {"q": "Call me", "choices": ["Ishmael", "zzzz qqq"], "gold": 0}
    (tmp_path / "mine/mine.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    return tmp_path / "mine"


def test_a_task_of_ones_own(
    mine: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--tasks", "mine", "--include-path", "mine", "--loops", "2", "--json"]
    assert main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["value"] == 1.0 and row["stderr"] == 0.0
    (mine / "mine.jsonl").write_text('{"q": "Call me", "choices": ["a"], "gold": 1}\n')
    assert main(words) == 4
    assert "mine.jsonl, line 1: gold 1 is none of the choices" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_agrees(engine, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's scores of a template's task are those of the same task read by looptx."""
    pytest.importorskip("lm_eval")
    from looptx_core.config.evaluation import EvaluateConfig
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.evaluation.harness import LooptxLM
    from looptx_core.evaluation.run import evaluate
    from looptx_core.evaluation.scoring import Scorer

    monkeypatch.chdir(mine)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(mine / "cache"))
    (mine / "other.yaml").write_text((OWN % '"{{q}}"').replace("task: mine", "task: other"))
    config = EvaluateConfig(("mine", "other"), ("2", "auto"), include_path=str(mine))
    rows = evaluate(engine, config)["results"]
    own, others = rows[:2], rows[2:]
    for one, other in zip(own, others, strict=True):
        assert other["metric"] == "acc" and other["value"] == one["value"] == 1.0
        assert other["mean_loops"] == one["mean_loops"]
    scorer = Scorer(engine, 2, GenerationOptions(), 8)
    lm = LooptxLM(scorer=scorer)
    (found,) = lm._loglikelihood_tokens([("", *scorer.pair("Call me", " Ishmael"))])
    (line,) = scorer.score([scorer.line(*scorer.pair("Call me", " Ishmael"))])
    assert found[0] == pytest.approx(sum(line.logprobs))


def test_an_export_agrees_and_takes_its_depth(model: Path, exported: Path) -> None:  # noqa: F811
    """`loops` among a harness's model arguments counts, and an unknown argument is an error."""
    transformers = pytest.importorskip("transformers")
    import torch

    from looptx_core.api import load
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.evaluation.scoring import Scorer

    def opened(**how: int) -> torch.nn.Module:
        read = transformers.AutoModelForCausalLM.from_pretrained
        return read(exported, trust_remote_code=True, **how).eval()

    engine, found = load(model, kernel="torch").engine, []
    for loops in (1, 3):
        scorer = Scorer(engine, loops, GenerationOptions(), 8)
        line = scorer.line(*scorer.pair("Call me", " Ishmael, said he."))
        ids = torch.tensor([list(line.tokens)])
        with torch.inference_mode():
            logs = opened(loops=loops)(ids).logits[0, :-1].log_softmax(-1)
        places = [place - 1 for place in line.counted]
        found.append(logs[places, ids[0, list(line.counted)]].tolist())
        assert scorer.score([line])[0].logprobs == pytest.approx(found[-1], abs=1e-4)
    assert found[0] != pytest.approx(found[1], abs=1e-3), "the depth makes no difference"
    with pytest.raises(TypeError, match="loopz"):
        opened(loopz=1)

"""A second loop in half steps: its equation, and a conversion that takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_conversion_gguf import data, made_tokenizer, plain, run
from test_model import CONFIG, build, tokens

from looptx_core.checkpoint.folder import load_model
from looptx_core.model.loop import LoopedTransformer

__all__ = ["data"]


@pytest.mark.fast
def test_half_steps_are_nothing_but_means() -> None:
    """Against the weights of the paper's two steps, written out; one loop is the plain model's."""
    plain = build(replace(CONFIG, injection="none"))
    halves = LoopedTransformer(replace(CONFIG, injection="half_steps")).double().eval()
    halves.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(halves(tokens(), 1).logits, plain(tokens(), 1).logits)
        ctx = halves.context(21)
        e = halves.embed(tokens(), ctx)
        once = plain.step(e, e, 1, ctx)
        again = plain.step((e + once) / 2, e, 1, ctx)
        two = halves.step(once, e, 2, ctx)
        assert torch.allclose(two, 0.125 * e + 0.625 * once + 0.25 * again)
        each = halves.step(once, e, torch.tensor([1, 2]), ctx)  # a loop of its own for each row
        assert torch.allclose(each, torch.stack([halves.step(once, e, 1, ctx)[0], two[1]]))


def test_a_conversion_measures_and_takes_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain("Llama").save_pretrained(tmp_path / "hf")
    made_tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    common = ("--from-hf", tmp_path / "hf", "--data", data, "--quiet")
    code, shown, _ = run(capsys, *common, "--core", "2:3", "--injection", "half_steps", "--json",
                         "--out", tmp_path / "m")  # fmt: skip
    found, loaded = json.loads(shown), load_model(tmp_path / "m")
    assert code == 0 and found["injection"] == "half_steps" and found["logit_difference"] < 1e-5
    config = loaded.config
    assert (config.loops, config.max_loops, loaded.exit.min_loops) == (2, 2, 2)
    one, two = loaded.facts["loss_by_loop"]
    assert found["half_steps"]["cost"] == pytest.approx(two - one, abs=1e-4)
    assert found["half_steps"]["error"] > 0 and abs(two - one) > 1e-4
    assert not any("injection" in name for name in loaded.model.state_dict())
    for flags in (("--core", "2:3", "--max-loops", 1), ("--injection", "bridge")):
        code, _, error = run(capsys, *common, *flags, "--out", tmp_path / "n")
        assert code == 2 and flags[-2] in error and len(error.splitlines()) == 1

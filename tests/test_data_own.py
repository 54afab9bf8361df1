"""What a model was trained on, as its run's folder tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looptx_core.data.own import own_data, own_text


@pytest.fixture
def final(tmp_path: Path) -> Path:
    (tmp_path / "run" / "final").mkdir(parents=True)
    return tmp_path / "run" / "final"


def _run(final: Path, **settings: object) -> None:
    (final.parent / "config.yaml").write_text(json.dumps(settings))


def test_a_training_run_tells_its_data(final: Path) -> None:
    _run(final, preset="nano", data=["a.txt", "b.txt"])
    assert own_data(final) == own_text(final) == ("a.txt", "b.txt")
    _run(final, preset="nano", data=[])
    assert own_data(final) == own_text(final) == ()  # the bundled text


def test_nothing_is_known_elsewhere(final: Path) -> None:
    assert own_data(final) is None  # no run
    _run(final, lora_rank=8, data=["questions.jsonl"])
    assert own_data(final) is None and own_text(final) is None  # a finetuning's examples
    _run(final, preset="nano", data=["a.txt"])
    assert own_data(final.parent) is None


def test_records_of_media_are_no_text(final: Path, colours: Path) -> None:
    text = colours / "a.txt"
    text.write_text("words")
    _run(
        final, preset="nano", data=[str(text), str(colours / "pairs"), str(colours / "pairs.jsonl")]
    )
    assert own_text(final) == (str(text),)
    assert len(own_data(final) or ()) == 3

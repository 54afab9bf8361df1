"""What a model was trained on, as the note in its folder tells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from looptx_core.data.bundled import bundled_corpus
from looptx_core.data.own import FILE, OwnData, given_data, own_data, text_shards
from looptx_core.data.shards import open_shards
from looptx_core.errors import DataError


def noted(folder: Path, data: OwnData) -> OwnData | None:
    (folder / FILE).write_text(json.dumps(data.to_dict()))
    return own_data(folder, {})


def test_a_note_tells_the_data_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    for names in (["a.txt"], ["*.txt"]):
        own = noted(
            tmp_path, OwnData.of("text", names, {"seed": 3, "direction": "read", "lr": 1.0})
        )
        kept = {"seed": 3, "direction": "read"}
        assert own == OwnData("text", (str(tmp_path / "a.txt"),), settings=kept)
    assert noted(tmp_path, OwnData.of("text", ["gone.txt"], {})).missing == ["gone.txt"]
    assert noted(tmp_path, OwnData.of("text", ["hf:name"], {})).missing == []


def test_nothing_is_known_elsewhere(tmp_path: Path) -> None:
    assert own_data(tmp_path, {}) is None
    assert own_data(tmp_path, {"data": ["a.txt"]}) is None
    assert own_data(tmp_path, {"data": [bundled_corpus().name]}) == OwnData("text")


def test_records_of_media_are_no_text(colours: Path, shards: Path) -> None:
    text = colours / "a.txt"
    text.write_text("words")
    media = (str(colours / "pairs"), str(colours / "pairs.jsonl"))
    own = given_data([str(text), *media])
    assert (own.kind, own.inputs, own.media) == ("text", (str(text),), media)
    assert own.name == "a.txt, pairs, pairs.jsonl" and own.missing == []

    text.unlink()
    assert own.missing == [str(text)]
    with pytest.raises(DataError, match="no such file"):
        text_shards(own, open_shards(shards).tokenizer)
    # The text as it was tokenised is as good, and the media are wanted all the same.
    kept = OwnData("text", own.inputs, own.media, str(shards))
    assert kept.missing == [] and text_shards(kept, open_shards(shards).tokenizer) == shards
    (colours / "pairs.jsonl").unlink()
    assert kept.missing == [media[1]]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"seq_len": "abc"}, "seq_len: expected a whole number"),
        ({"val_fraction": 7}, "`val_fraction` must lie between 0 and 1"),
        ({"batch_size": -3}, "`batch_size` must be at least 1"),
        ({"too_long": "shrink"}, "too_long: expected error or drop or truncate"),
        ({"mix": "much"}, "`mix` much"),
        ({"depth": 3}, "unknown depth"),
        ([3], "expected keys and values"),
    ],
)
def test_damaged_settings_of_a_note_are_one_line(settings, says: str, tmp_path: Path) -> None:
    note = OwnData("text").to_dict() | {"settings": settings}
    (tmp_path / FILE).write_text(json.dumps(note))
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        own_data(tmp_path, {})
    assert str(caught.value).startswith(f"{tmp_path / FILE}, settings: ")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "of another format"),
        ('{"format_version": 1, "kind": "text"}', "inputs, media is missing"),
        ('{"format_version": 1, "kind": "sound", "inputs": [], "media": []}', "kind: expected"),
    ],
)
def test_a_damaged_note_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=says):
        own_data(tmp_path, {})


def test_a_folder_in_place_of_a_note(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        own_data(tmp_path, {})

"""What a conversion trains on and judges by: the data that the model was made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from finetuning_cases import SHAPE

from looptx_cli.main import main
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.data.own import FILE, OwnData, given_data, own_data

QUICK = ["--precision", "float32", "--steps", "2", "--seq-len", "64", "--batch-size", "4",
         "--val-batches", "1", "--quiet"]  # fmt: skip
BITNET = ["convert", "--to-bitnet", "--finetune-steps", "2", "--overwrite"]


@pytest.fixture
def kinds(workplace: Path, tiny: Path, questions: Path, colours: Path, shards: Path) -> Path:
    """Runs of three kinds of data, and what they were made of."""
    Path("base").symlink_to(tiny)
    shutil.copy(questions, "qa.jsonl")
    chats = [
        {"messages": [{"role": "user", "content": f"g{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(20)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    Path("text.txt").write_text("the whale and the sea " * 900)
    shape = SHAPE.to_dict() | {"vision_layers": 1, "patch_size": 8, "vocab_size": 400}
    Path("seeing.yaml").write_text(json.dumps({"model": shape}))
    return workplace


def made(command: list[str], capsys) -> str:
    code = main(command)
    err = capsys.readouterr().err
    assert code == 0, err
    return err


@pytest.mark.parametrize("kind", ["questions", "chats", "adapter", "pictures", "text"])
def test_the_models_own_data_of_every_kind(kind: str, kinds: Path, shards: Path, capsys) -> None:
    finetune = ["finetune", "--model", "base", *QUICK, "--out", "run", "--data"]
    train = ["train", "--config", "seeing.yaml", *QUICK, "--out", "run"]
    source, name = ["--model", "run"], {"questions": "qa.jsonl", "chats": "chats.jsonl"}.get(kind)
    if kind == "adapter":
        made([*finetune, "qa.jsonl", "--lora"], capsys)
        source, name = ["--adapter", "run", "--merge-adapter"], "qa.jsonl"
    elif kind == "pictures":
        name = "pairs.jsonl"
        made([*train, "--data", str(shards), "--data", "pairs.jsonl", "--seq-len", "128"], capsys)
    elif kind == "text":
        name = shards.name
        made([*train, "--data", str(shards)], capsys)
    else:
        made([*finetune, str(name)], capsys)
    err = made([*BITNET, *source, "--out", "small"], capsys)
    assert f"data: the model's own data, {name}" in err or f", {name}" in err
    assert "the bundled text" not in err
    assert load_model("small").facts["ternary"] == "trained 2 steps"
    # A conversion hands the note on, so a copy of it knows too, from any folder.
    note = json.loads(Path("small", FILE).read_text())
    assert note["kind"] == ("text" if kind in ("text", "pictures") else "records")
    Path("elsewhere").mkdir()
    again = ["convert", "--dtype", "bf16", "--model", "small", "--out", "elsewhere/half"]
    assert "the model's own data" in made(again, capsys)

    if kind in ("questions", "chats"):  # gone: nothing else takes its place
        Path(str(name)).unlink()
        assert main([*BITNET, *source, "--out", "other"]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert f"{name}, is gone" in err and "--data" in err and "--direct" in err
        assert not Path("other").exists()


def test_a_model_of_unknown_data(kinds: Path, capsys) -> None:
    assert own_data(Path("base"), {}) is None
    assert main([*BITNET, "--model", "base", "--out", "x"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "is not known" in err and "--data" in err and "--direct" in err
    assert not Path("x").exists()
    Path("base-copy").mkdir()

    # Judged by a text that is not its own, a lower loss is no improvement.
    code = main(["convert", "--to-bitnet", "--direct", "--model", "base", "--out", "x"])
    out, err = capsys.readouterr()
    assert code == 0 and "not this model's own" in err
    line = next(line for line in out.splitlines() if line.startswith("loss on the bundled text"))
    assert "(-" not in line
    # Nor does it say when the model may stop.
    before, after = (
        json.loads(Path(name, "generation_config.json").read_text())["exit"]
        for name in ("base", "x")
    )
    assert before == after
    # Nor is it recorded; and what the source records is of the source's weights alone.
    assert not {"loss_by_loop", "loss_by_loop_before"} & load_model("x").facts.keys()
    base, losses = load_model("base"), {"loss_by_loop": [3, 2, 1], "loss_by_loop_before": [4, 3, 2]}
    save_model("known", base.model, base.tokenizer, exit_settings=base.exit, facts=losses)
    convert = ["convert", "--model", "known", "--out", "y", "--overwrite", "--json"]
    for flags in (["--dtype", "float32"], ["--memory", "delta"], ["--dtype", "int8"]):
        assert main([*convert, *flags]) == 0
        assert json.loads(capsys.readouterr().out)["loss_after"] > 1
        found = load_model("y").facts
        kept = {key: found[key] for key in losses if key in found}
        assert kept == (losses if "float32" in flags else {}), flags


@pytest.mark.parametrize("given", ["qa.jsonl", "chats.jsonl", "text.txt"])
def test_data_of_every_kind_can_be_given(given: str, kinds: Path, capsys) -> None:
    assert given_data([given]).kind == ("text" if given == "text.txt" else "records")
    err = made([*BITNET, "--model", "base", "--data", given, "--out", "x"], capsys)
    assert f"data: {given}" in err
    assert json.loads(Path("x", FILE).read_text())["inputs"] == [str(Path(given).resolve())]


def test_pictures_can_be_given(kinds: Path, shards: Path, capsys) -> None:
    made(["train", "--config", "seeing.yaml", *QUICK, "--out", "run", "--data", str(shards)],
         capsys)  # fmt: skip
    for given in ("pairs.jsonl", "pairs"):
        err = made([*BITNET, "--model", "run", "--data", given, "--out", "x"], capsys)
        assert f"data: {given}" in err


BAD = {
    "no such file": ["--data", "none.jsonl"],
    "no answers": ["--data", "bad.jsonl"],
    "too few": ["--data", "one.jsonl"],
    "no pictures": ["--data", "lost.jsonl"],
    "pictures for a model of text": ["--data", "pairs.jsonl"],
}


@pytest.mark.parametrize("case", BAD)
def test_advice_names_flags_that_there_are(case: str, kinds: Path, capsys) -> None:
    import re

    from looptx_cli.main import load_command

    long = {"prompt": "far " * 900, "response": "away"}
    Path("bad.jsonl").write_text(json.dumps({"prompt": "a", "answer": 1}) + "\n" + json.dumps(long))
    Path("one.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    Path("lost.jsonl").write_text(json.dumps({"image": "lost.png", "text": "b"}))
    assert main([*BITNET, "--model", "base", "--out", "x", *BAD[case]]) == 4
    err = capsys.readouterr().err.splitlines()[-1]
    known = {flag for p in load_command("convert").params for flag in p.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", err)) <= known and "`" not in err, err


def test_a_damaged_note(kinds: Path, tmp_path: Path, capsys) -> None:
    loaded = load_model("base")
    note = {FILE: OwnData("text").to_dict()}
    save_model("noted", loaded.model, loaded.tokenizer, exit_settings=loaded.exit, facts={},
               files=note)  # fmt: skip
    assert own_data(Path("noted"), {}) == OwnData("text")
    for text in ("{", "[]", '{"format_version": 1}', '{"format_version": 1, "kind": "x"}',
                 '{"format_version": 1, "kind": "text", "inputs": 3}'):  # fmt: skip
        Path("noted", FILE).write_text(text)
        assert main([*BITNET, "--model", "noted", "--out", "x"]) == 4
        assert FILE in capsys.readouterr().err

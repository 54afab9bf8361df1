"""What people type from habit: one line with the right spelling, and settings by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looptx_cli import synonyms
from looptx_cli.main import COMMANDS, load_command, main
from looptx_core.config.model import ModelConfig

pytestmark = pytest.mark.fast


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command line gives."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("looptx: error: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ("train --learning-rate 1e-3", "use --lr "),
        ("train --learning_rate 1e-3", "use --lr "),
        ("train --num-epochs 3", "use --epochs "),
        ("train --d-model 64", "use --set model.d_model=VALUE"),
        ("train --d_model 64", "use --set model.d_model=VALUE"),
        ("train --width 64", "use --set model.d_model=VALUE"),
        ("train --layers 2", "use --set model.core_layers=VALUE"),
        ("train --lora-r 8", "--lora-rank is a flag of looptx finetune"),
        ("finetune --lora-r 8", "use --lora-rank "),
        ("finetune --layers 2", "set by looptx train, with --set model.core_layers=VALUE"),
        ("finetune --init-from x", "use --model "),
        ("generate --preset small", "--preset is a flag of looptx train"),
        ("tokenize --output x", "use --out "),
        ("--lr 1", "looptx has no --lr; --lr is a flag of looptx tokenize, train"),
        ("train --stepz 3", "--steps"),
        ("merge a", "looptx convert --merge-adapter --adapter ADAPTER"),
        ("quantize", "looptx convert --to-bitnet"),
        ("export", "looptx convert --to-hf"),
        ("eval", "looptx "),
        ("trian", "'train'"),
    ],
)
def test_the_right_spelling(arguments: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert right in error(capsys, *arguments.split())


def test_hints_name_what_exists() -> None:
    flags = {
        name: {flag for p in load_command(name).params for flag in (*p.opts, *p.secondary_opts)}
        for name in COMMANDS
    }
    for word in synonyms.COMMANDS.keys() - COMMANDS.keys():
        hint = synonyms.command_hint(word, COMMANDS)
        assert hint, f"looptx {word} leads nowhere"
        command, *rest = hint.split()[1:]
        used = {part for part in rest if part.startswith("--")}
        assert command == "--help" or used <= flags[command], hint
    known = set().union(*flags.values())
    for word, names in synonyms.FLAGS.items():
        assert known & set(names), f"--{word} leads nowhere"
    assert set(synonyms.SHAPE.values()) <= ModelConfig.__dataclass_fields__.keys()
    assert synonyms.NOTES.keys() <= synonyms.FLAGS.keys()


def test_any_key_can_be_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("looptx_core.training.step_time._LONGEST", 0.0)  # no step is tried
    (tmp_path / "c.yaml").write_text("model: {d_model: 32, d_ff: 48}\nlr: 0.5\n")

    def parameters(*more: str) -> int:
        capsys.readouterr()
        config = ["--config", str(tmp_path / "c.yaml")]
        assert main(["train", "--dry-run", "--json", *config, *more]) == 0
        return int(json.loads(capsys.readouterr().out)["parameters"])

    plain = parameters()
    wider = parameters("--set", "model.d_model=64")  # wins over the file, as a flag does
    assert wider > plain == parameters("--set", "model.d_model = 32", "--set", "lr=0.1")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["model.d_modle=5"], ["unknown key 'model.d_modle'", "'model.d_model'"]),
        (["d_model=5"], ["did you mean 'model.d_model'?"]),
        (["stepz=5"], ["did you mean 'steps'?"]),
        (["qqqq=5"], ["unknown key 'qqqq'"]),
        (["model.d_model=wide"], ["--set model.d_model: expected a whole number, not 'wide'"]),
        (["optimizer=sgd"], ["--optimizer: expected muon or adamw"]),
        (["steps"], ["model.d_model=256"]),
        (["steps=5", "steps=6"], ["steps is given twice"]),
    ],
)
def test_wrong_keys(pairs: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error(capsys, "train", *(part for pair in pairs for part in ("--set", pair)))
    assert all(word in line for word in words)


def test_a_key_and_its_flag_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    assert "given twice" in error(capsys, "train", "--steps", "4", "--set", "steps=5")


def test_a_resumed_run_keeps_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("steps: 4\n")
    wrong = ["--resume", str(tmp_path), "--set", "model.d_model=64"]
    assert "--set model.d_model can't change on --resume" in error(capsys, "train", *wrong)


def test_a_resumed_run_takes_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "c.yaml"):
        (tmp_path / name).write_text("steps: 4\n")
    wrong = ["--resume", str(tmp_path), "--config", str(tmp_path / "c.yaml")]
    for command in ("train", "finetune"):
        assert "--config has no effect on --resume" in error(capsys, command, *wrong)

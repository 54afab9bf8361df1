"""Presets, and the merging of settings with their origins."""

from __future__ import annotations

from pathlib import Path

import pytest

from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS, get_preset
from looptx_core.config.resolve import Resolved, field_help, read_resolved, resolve, write_resolved
from looptx_core.config.run import TrainConfig
from looptx_core.errors import LooptxError, UsageError
from looptx_core.model.flops import parameter_count

pytestmark = pytest.mark.fast

SECTIONS = {"model": ModelConfig}


def merge(flags: dict | None = None, config: Path | None = None, **env: str) -> Resolved:
    return resolve(TrainConfig, SECTIONS, flags=flags, config=config, env=env)


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name, low, high, depth_at",
    [
        ("nano", 0.7e6, 1.2e6, {}),
        ("small", 2e7, 3e7, {2: 12}),
        ("medium", 1.0e8, 1.3e8, {3: 16}),
        ("1b", 0.95e9, 1.05e9, {}),
        ("7b", 6.8e9, 7.3e9, {}),
    ],
)
def test_presets_have_their_size(name: str, low: float, high: float, depth_at: dict) -> None:
    resolved = merge({"preset": name} | ({"model.vocab_size": 4096} if name == "nano" else {}))
    model = resolved.build(ModelConfig, "model")
    train = resolved.build(TrainConfig)
    assert low < parameter_count(model) < high
    assert model.loops == 1 and train.seq_len <= model.max_seq_len
    for loops, depth in depth_at.items():
        assert model.effective_layers(loops) == depth
    if name != "nano":  # packed formats want whole groups of 256
        assert model.d_model % 256 == model.d_ff % 256 == model.vocab_size % 256 == 0
        assert model.n_heads * model.head_dim % 256 == model.n_kv_heads * model.head_dim % 256 == 0


def test_preset_keys_are_keys() -> None:
    for preset in PRESETS.values():
        assert preset["model"].keys() <= set(ModelConfig.keys())
        TrainConfig(**preset["train"])


def test_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"'smal', did you mean 'small'.*nano, portable, small"):
        get_preset("smal")


def test_precedence_and_origins(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "lr: 1e-3\nsteps: 7\nseed: 5\npreset: small\nmodel: {d_ff: 768}\n")
    resolved = merge({"lr": 3e-4, "out": None}, file, LOOPTX_LR="1", LOOPTX_STEPS="9")
    expected = {
        "lr": (3e-4, "flag --lr"),
        "steps": (9, "LOOPTX_STEPS"),
        "seed": (5, str(file)),
        "model.d_ff": (768, str(file)),
        "model.d_model": (512, "preset small"),
        "seq_len": (512, "preset small"),
        "clip": (1.0, "default"),
    }
    for key, (value, origin) in expected.items():
        assert (resolved.values[key], resolved.origins[key]) == (value, origin)
    assert resolved.given("seed") and not resolved.given("seq_len") and not resolved.given("clip")
    assert resolved.build(ModelConfig, "model").d_ff == 768


def test_the_preset_has_the_same_precedence(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "preset: small\n")
    assert merge({"preset": "nano"}, file, LOOPTX_PRESET="medium").values["model.d_model"] == 128
    assert merge(None, file, LOOPTX_PRESET="medium").values["model.d_model"] == 1024


def test_nested_environment_and_dotted_flags() -> None:
    resolved = merge({"model.d_ff": 512}, LOOPTX_MODEL_D_MODEL="64", LOOPTX_DATA="a.txt,b.txt")
    assert resolved.values["model.d_model"] == 64
    assert resolved.origins["model.d_model"] == "LOOPTX_MODEL_D_MODEL"
    assert resolved.origins["model.d_ff"] == "flag --set model.d_ff"
    assert resolved.values["data"] == ("a.txt", "b.txt")


def test_configuration_file_from_the_environment(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "steps: 3")
    assert merge(None, None, LOOPTX_CONFIG=str(file)).values["steps"] == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("step: 3", "unknown key 'step', did you mean 'steps'"),
        ("d_model: 3", "unknown key 'd_model', did you mean 'model.d_model'"),
        ("model: {d_modle: 3}", "unknown key 'model.d_modle', did you mean 'model.d_model'"),
        ("qqqqqq: 3", "unknown key 'qqqqqq'; remove it"),
        ("lr: 3\nsteps: 1\nlr: 4", "my.yaml, line 3: not valid YAML (the key 'lr' stands twice)"),
        ("model: {d_model: 3}\nmodel.d_model: 4", "my.yaml, line 2: model.d_model stands twice"),
        (
            "model.audio.layers: 3\nmodel:\n  audio: {layers: 3}",
            "line 3: model.audio.layers",
        ),
        ("lr: fast", "lr: expected a number, not 'fast'"),
        ("steps: 1.5", "steps: expected a whole number, not 1.5"),
        ("steps: true", "steps: expected a whole number, not True"),
        ("lr: .nan", "lr: expected a number"),
        ("compile: maybe", "compile: expected true or false"),
        ("precision: fp8", "precision: expected auto or bf16 or float32, not 'fp8'"),
        ("micro_batch: x", "micro_batch: expected a whole number or none"),
        ("model: 3", "model must hold keys of its own"),
        ("a: [1\nb: 2", "my.yaml, line 2: not valid YAML"),
        ("just words", "expected keys and values"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        merge(None, yaml_file(tmp_path, text))
    assert message in str(caught.value) and "my.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_environment() -> None:
    with pytest.raises(UsageError, match=r"^LOOPTX_LR: expected a number, not 'abc'$"):
        merge(LOOPTX_LR="abc")
    with pytest.raises(UsageError, match="LOOPTX_STESP, did you mean 'LOOPTX_STEPS'"):
        merge(LOOPTX_STESP="1")
    # Another command's variable, and one that is no setting, are no mistakes.
    merge(LOOPTX_TEMPERATURE="1", LOOPTX_VOCAB_SIZE="300", LOOPTX_CACHE="/nowhere")


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot read the configuration"):
        merge(None, Path("none.yaml"))


def test_config_yaml_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    first = merge({"data": ["ä.txt"], "lr": 1e-5, "max_loops": 4}, None, LOOPTX_MODEL_D_FF="256")
    write_resolved(path, first)
    assert read_resolved(path, TrainConfig, SECTIONS) == first
    again = merge(None, path)
    assert again.values == first.values
    assert set(again.origins.values()) == {str(path)}
    assert not list(tmp_path.glob("*.tmp"))


def test_config_yaml_without_its_own_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_resolved(path, merge({"out": "runs/a"}), omit=("out",))
    assert merge(None, path).values["out"] is None
    with pytest.raises(LooptxError, match="cannot write"):
        write_resolved(tmp_path / "no" / "config.yaml", merge())


def test_help_comes_from_the_docstrings() -> None:
    help = field_help(TrainConfig)
    assert help["seq_len"] == f"Tokens a sequence. (default {TrainConfig().seq_len})"
    assert help.keys() == {key for key in merge().values if "." not in key}

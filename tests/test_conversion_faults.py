"""What a conversion says of files with faults: by the file's own names, and at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_conversion_gguf import data, made_tokenizer, plain, run, write

from looptx_core.checkpoint.card import UNKNOWN, license_of
from looptx_core.checkpoint.folder import load_model
from looptx_core.data.chat import ChatTemplate
from looptx_core.documents import read_json, to_json

__all__ = ["data"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(llama__rope__scaling__factor="4"), "llama.rope.scaling.factor is 4;"),
        (dict(keep=lambda name, values: values[0] if name == "token_embd.weight" else values),
         "its token_embd.weight has 1 axis, not 2"),
    ],
)  # fmt: skip
def test_a_file_with_a_fault_is_named_by_its_key(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "bad.gguf", **changes)
    code, _, error = run(capsys, "--from-gguf", file, "--out", tmp_path / "m")
    assert code == 4 and f"{file}: {message}" in error and len(error.splitlines()) == 1


def test_how_rope_is_scaled_is_told_by_older_keys_too(tmp_path: Path) -> None:
    """As llama.cpp reads them: a factor without a kind is linear, a kind without a factor none."""
    from looptx_core.conversion.gguf_file import GGUF

    older, newer, kind = "rope__scale_linear", "rope__scaling__factor", "rope__scaling__type"
    for values, expected in (
        ({older: 4.0}, ("linear", 4.0)),
        ({newer: 4.0}, ("linear", 4.0)),
        ({newer: 4.0, kind: "none"}, ("default", None)),
        ({kind: "linear"}, ("default", None)),
        ({newer: 0.0, kind: "linear"}, ("default", None)),
    ):
        keys = {f"llama__{name}": value for name, value in values.items()}
        rope = GGUF(write(tmp_path / "a.gguf", **keys)).settings["rope_parameters"]
        assert (rope["rope_type"], rope.get("factor")) == expected


def test_a_tensor_that_is_missing_has_transformers_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain("Olmo2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.2.post_attention_layernorm.weight"
    save_file({name: w for name, w in weights.items() if name != lost},
              tmp_path / "model.safetensors")  # fmt: skip
    code, _, error = run(capsys, "--from-hf", tmp_path, "--core", "1:4", "--out", tmp_path / "m")
    assert code == 4 and f"the weights lack {lost}" in error


@pytest.mark.parametrize(
    ("template", "message"), [("{% for %}", "has a fault (Expected"), (["a"], "is no text")]
)
def test_a_chat_template_with_a_fault_is_left_out(
    template: Any, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.gguf", tokenizer__chat_template=template)
    code, _, error = run(capsys, "--from-gguf", file, "--data", data, "--out", tmp_path / "m")
    [said] = [line for line in error.splitlines() if "chat template" in line]
    assert code == 0 and "warning: " in said and message in said
    assert load_model(tmp_path / "m").chat_template is None


def test_faults_of_chat_templates() -> None:
    deep = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
    faults = {"": "empty", " \n": "empty", deep: "recursion", "{{ a | b }}": "filter"}
    for text, flaw in faults.items():
        assert flaw in str(ChatTemplate(text, {}).flaw())
    assert ChatTemplate("{{ a }}", {}).flaw() is None


def test_a_license_is_one_line() -> None:
    for stated in (None, 7, "", " ", "mit\n---\nlicense: other", "x" * 1000):
        assert license_of(stated) == UNKNOWN
    assert license_of("apache-2.0 ") == "apache-2.0"


def test_a_list_of_chat_templates(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain("Llama").save_pretrained(tmp_path / "hf")
    made_tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(to_json({**(read_json(file) if file.exists() else {}),
                             "chat_template": several}))  # fmt: skip
    code, _, _ = run(capsys, "--from-hf", tmp_path / "hf", "--data", data, "--out", tmp_path / "m")
    assert code == 0 and load_model(tmp_path / "m").chat_template == "b"

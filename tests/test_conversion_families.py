"""Families of pretrained models: one loop is transformers' own forward pass, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_conversion_gguf
import torch
from test_conversion_gguf import made_tokenizer, plain, write

from looptx_cli.main import main
from looptx_core.checkpoint.card import UNKNOWN, stated_license
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.local_attention import LocalAttention
from looptx_core.conversion.gemma3 import of_gguf
from looptx_core.conversion.huggingface import from_huggingface
from looptx_core.conversion.pretrained import Looping, looped_shape
from looptx_core.conversion.source_check import logit_difference
from looptx_core.errors import DataError
from looptx_core.generation.engine import Engine

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
GEMMA = {
    "num_hidden_layers": 7, "sliding_window": 16, "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 20, "pad_token_id": 0, "eos_token_id": None, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2 and its biases": ("Qwen2", {}),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
    "Llama 3's RoPE": ("Llama", {"rope_parameters": LLAMA3}),
    "SmolLM": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    "Qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "Gemma 3": ("Gemma3", GEMMA),
    "OLMo 2": ("Olmo2", {"eos_token_id": 2, "pad_token_id": 2}),
    "linear RoPE": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                                  "rope_theta": 10_000.0}}),
}  # fmt: skip


def with_drawn_vectors(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def saved(folder: Path, kind: str, **changes: Any) -> Any:
    """A folder of transformers', and its model, whose vectors are no longer 0 and 1."""
    model = with_drawn_vectors(plain(kind, **changes))
    model.save_pretrained(folder)
    made_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_is_the_source(family: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[family]
    source = saved(tmp_path, kind, **changes)
    loaded = from_huggingface(tmp_path, Looping("1:3"))
    tokens = torch.randint(0, 320, (2, 96), generator=torch.Generator().manual_seed(3))
    assert logit_difference(loaded.model, source, tokens) < 1e-5
    # In the cache too, where what is new is read token by token.
    cache = loaded.model.new_cache(2, 96, 1)
    with torch.no_grad():
        loaded.model(tokens[:, :40], 1, cache)
        stepped = [loaded.model(tokens[:, [at]], 1, cache).logits for at in range(40, 44)]
        expected = source(tokens).logits[:, 40:44]
    assert (torch.cat(stepped, 1) - expected).abs().max() < 1e-4 * expected.abs().max()
    # And in a batch of texts of different lengths.
    prompts = [tokens[0, :30].tolist(), tokens[1, :5].tolist()]
    engine = Engine(loaded.model, loaded.tokenizer)
    options = GenerationOptions(temperature=0, max_new_tokens=24, ignore_eos=True, loops=1)
    for prompt, found in zip(prompts, engine.complete(prompts, options), strict=True):
        ids = torch.tensor([prompt])
        theirs = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                                 do_sample=False, eos_token_id=None)[0]  # fmt: skip
        assert prompt + [token.id for token in found.tokens] == theirs.tolist()


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    source = saved(tmp_path, "Mistral", sliding_window=32)
    loaded = from_huggingface(tmp_path, Looping("auto"))
    assert loaded.config.max_seq_len == 32
    tokens = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(3))
    assert logit_difference(loaded.model, source, tokens) < 1e-5


def test_llama3s_frequencies_of_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    from looptx_core.config.rope import RopeScaling
    from looptx_core.conversion.gguf_file import GGUF, from_gguf
    from looptx_core.model.rope import rotary_frequencies

    scaling = RopeScaling("llama3", 32.0)
    divisors = rotary_frequencies(8, 50_000.0) / rotary_frequencies(8, 50_000.0, scaling)
    add = gguf.GGUFWriter.write_header_to_file
    for values, fits in ((divisors, True), (divisors.flip(0), False)):

        def with_divisors(writer: Any, *rest: Any, values: torch.Tensor = values) -> None:
            writer.add_tensor("rope_freqs.weight", values.numpy())
            add(writer, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
            file = write(tmp_path / "scaled.gguf")
        if not fits:
            with pytest.raises(DataError, match="not Llama 3's"):
                GGUF(file)
            continue
        found = GGUF(file)
        loaded = from_gguf(found, Looping("auto"))
        assert loaded.config.scaled_rope == scaling
        tokens = torch.randint(0, 320, (2, 96), generator=torch.Generator().manual_seed(3))
        assert logit_difference(loaded.model, found.in_transformers(), tokens) < 1e-5


def gemma_file(file: Path, **changes: Any) -> Any:
    """A Gemma 3 as llama.cpp's converter writes it, in float32; and the model in it. changes: of
    the metadata."""
    shape = {**GEMMA, "query_pre_attn_scalar": 8}
    if changes.get("gemma3__attention__sliding_window", 16) is None:
        shape["sliding_window_pattern"] = 1
    model = with_drawn_vectors(plain("Gemma3", **shape))
    described = {
        "block_count": 7, "attention__sliding_window": 16, "attention__sliding_window_pattern": 3,
        "rope__freq_base": 1e6, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_conversion_gguf, "STORED", {})
        write(file, "Gemma3", model=model,
              keep=lambda name, values: values + name.endswith("norm.weight"),
              **{f"gemma3__{k}": v for k, v in described.items()} | changes)  # fmt: skip
    return model


@pytest.mark.parametrize("changes", [
    {}, {"attention__sliding_window_pattern": [True, True, False] * 2 + [True]},
    {"attention__sliding_window": None},
], ids=str)  # fmt: skip
def test_a_gemma_3_of_a_gguf_file(changes: dict[str, Any], tmp_path: Path) -> None:
    from looptx_core.conversion.gguf_file import GGUF, from_gguf

    given = {f"gemma3__{name}": value for name, value in changes.items()}
    source = gemma_file(tmp_path / "g.gguf", **given)
    found = GGUF(tmp_path / "g.gguf")
    model = from_gguf(found, Looping("1:3")).model
    tokens = torch.randint(0, 320, (2, 60), generator=torch.Generator().manual_seed(3))
    assert logit_difference(model, source, tokens) < 1e-5
    assert logit_difference(model, found.in_transformers(), tokens) < 1e-5
    window = 0 if "attention__sliding_window" in changes else 16
    assert model.config.local_attention.window == window


def test_a_gemma_3_of_a_gguf_file_that_does_not_fit() -> None:
    shared = {"num_hidden_layers": 7, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8,
              "intermediate_size": 64, "vocab_size": 320, "num_key_value_heads": 2,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
    for key, value, said in (
        ("attention.sliding_window_pattern", [True, False], "neither a distance nor a flag"),
        ("attention.sliding_window_pattern", "a", "sliding_window_pattern is 'a'"),
        ("attention.sliding_window_pattern", [True, False, False] * 2 + [True], "no fixed distan"),
        ("attention.sliding_window", "a", "sliding_window is 'a'"),
        ("rope.freq_base_swa", "a", "rope_theta"),
        ("final_logit_softcapping", 30.0, "capped logits"),
    ):  # fmt: skip
        values = {"gemma3.attention.sliding_window": 16, f"gemma3.{key}": value}
        with pytest.raises(DataError, match=said) as error:
            looped_shape(shared | of_gguf(values, shared, "g.gguf"), "g.gguf", Looping("1:3"))
        assert len(str(error.value).splitlines()) == 1 and "g.gguf" in str(error.value)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                                           "rope_theta": 10_000.0}}, r"scaled RoPE \(yarn\)"),
    "biases": ("Llama", {"attention_bias": True}, "biases on the output of attention"),
    "feed-forward biases": ("Llama", {"mlp_bias": True}, "biases in the feed-forward layers"),
}  # fmt: skip


def test_an_older_description_of_a_gemma_3_is_the_same() -> None:
    """transformers' before 5, as the hub has them, with what its defaults leave out."""
    settings = plain("Gemma3", **GEMMA).config.to_dict()
    found = looped_shape(settings, "x", Looping("1:3"))
    older = {key: value for key, value in settings.items() if key not in (
        "rope_parameters", "layer_types", "tie_word_embeddings", "hidden_activation")}  # fmt: skip
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
              "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    assert looped_shape(older, "x", Looping("1:3")) == found
    assert found.local_attention == LocalAttention(16, 3, 1e4) and found.tie_embeddings
    for key, value, said in (
        ("layer_types", ["full_attention", "sliding_attention"] * 3 + ["sliding_attention"],
         "in an order of no fixed distance"),
        ("layer_types", 7, "in an order of no fixed distance"),
        ("final_logit_softcapping", 30.0, "capped logits"),
        ("use_bidirectional_attention", True, "attention in both directions"),
        ("query_pre_attn_scalar", "a", "query_pre_attn_scalar is a"),
        ("sliding_window_pattern", 0, "sliding_window_pattern is 0"),
        ("sliding_window", "a", "window"),
        ("rms_norm_eps", [], "norm_eps"),
        ("max_position_embeddings", "a", "max_position_embeddings is 'a'"),
        ("rope_scaling", [1], r"rope_scaling is \[1\]"),
        ("rope_parameters", {"full_attention": {}, "sliding_attention": [1]},
         r"sliding_attention is \[1\]"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said) as error:
            looped_shape({**older, key: value}, "x", Looping("1:3"))
        assert len(str(error.value).splitlines()) == 1


def test_the_license_is_the_sources(tmp_path: Path) -> None:
    assert stated_license(tmp_path) == UNKNOWN
    for text, found in (
        ("---\nlicense: gemma\ntags: [a]\n---\n# A model\n", "gemma"),
        ("# A model\n---\nlicense: mit\n---\n", UNKNOWN),
        ("---\nlicense: [a\n---\n", UNKNOWN),
        ("---\nlicense: 3\n---\n", UNKNOWN),
    ):
        (tmp_path / "README.md").write_text(text)
        assert stated_license(tmp_path) == found


@pytest.mark.parametrize(
    ("kind", "said"),
    [("gemma3", "gemma3 has an encoder of other media; "),
     ("mamba", "model_type mamba; `from_hf` reads"), (["a"], "from_hf")],
)  # fmt: skip
def test_another_family_is_refused(kind: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), "utf-8")
    with pytest.raises(DataError) as found:
        from_huggingface(tmp_path, Looping("auto"))
    assert said in str(found.value) and len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma3"])
def test_transformers_opens_the_export(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With biases, scaled RoPE, windows and a bridge, whose settings it has names of its own
    for."""
    changes = GEMMA if kind == "Gemma3" else {"rope_parameters": LLAMA3}
    source = saved(tmp_path / "hf", kind, **changes)
    text = tmp_path / "few.txt"
    text.write_text("a few words " * 400, "utf-8")
    out = tmp_path / "out"
    given = ("convert", "--from-hf", tmp_path / "hf", "--core", "1:3", "--to-hf", "--data", text,
             "--out", out, "--quiet")  # fmt: skip
    assert main([str(part) for part in given]) == 0, capsys.readouterr().err
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokens = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = source(tokens).logits
        for loops in (1, 3):
            found = opened(tokens, loops=loops).logits
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    opened.save_pretrained(tmp_path / "again")
    made_tokenizer().save(str(tmp_path / "again" / "tokenizer.json"))
    back = from_huggingface(tmp_path / "again").model.config
    assert back.scaled_rope.factor == 8.0 and back.injection == "bridge"
    assert back.qkv_bias == (kind == "Qwen2")
    assert back.local_attention.window == (16 if kind == "Gemma3" else 0)


@pytest.mark.parametrize("what", REFUSED)
def test_a_part_without_a_place_is_refused(what: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[what]
    saved(tmp_path, kind, **changes)
    with pytest.raises(DataError, match=message):
        from_huggingface(tmp_path, Looping("auto"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("factor", 0.5, "factor must be at least 1"),
        ("low_freq_factor", 9.0, "below high_freq_factor"),
        ("original_max_position_embeddings", 0, "original_max_position_embeddings"),
        ("factor", None, "factor"),
    ],
)
def test_bad_scaling_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path, "Llama", rope_parameters=LLAMA3)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["rope_parameters"][key] = value
    file.write_text(json.dumps(settings), "utf-8")
    with pytest.raises(DataError, match=message) as found:
        from_huggingface(tmp_path, Looping("auto"))
    assert len(str(found.value).splitlines()) == 1

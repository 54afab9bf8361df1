"""GGUF files, and plain models whose layers are looped: equal to their source at one loop."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import MOBY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from looptx_cli.main import main
from looptx_core.api import load
from looptx_core.backends.cpu.bindings import unsupported_reason
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.conversion import pretrained
from looptx_core.conversion.source_check import logit_difference
from looptx_core.data.chat import ChatTemplate
from looptx_core.errors import DataError, UsageError
from looptx_core.generation.engine import ChatPrompt, Engine

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS = {"q": 4, "k": 2}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
STORED = {"ffn_gate": "Q8_0", "ffn_up": "Q4_1", "ffn_down": "Q4_0", "attn_v": "F16",
          "attn_output": "BF16"}  # fmt: skip


def made_tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([MOBY[:20_000]], trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    return made


def plain(kind: str, **changes: Any) -> Any:
    """A small model by transformers, its weights far from their beginnings."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")
    config = made.config_class(**{
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "initializer_range": 0.2, **changes,
    })  # fmt: skip
    return made(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp's converter stores a Llama's."""
    width = len(weight) // heads
    half = width // 2
    places = (head * width + row for head in range(heads) for row in range(half))
    return weight[[place + offset for place in places for offset in (0, half)]]


def write(
    file: Path, kind: str = "Llama", keep: Any = None, model: Any = None, **changes: Any
) -> Path:
    """A GGUF file by the package's writer. changes: metadata without the architecture, or None to
    leave it out. keep: called with (name, values), it gives what is written in their place. model:
    another one of this kind."""
    model, tokenizer = model or plain(kind), made_tokenizer()
    names = NAMES | (GEMMA if kind == "Gemma3" else {})
    described = json.loads(tokenizer.to_str())["model"]
    arch = kind.lower()
    writer = gguf.GGUFWriter(file, changes.pop("architecture", arch))
    values = {
        f"{arch}.block_count": 5, f"{arch}.context_length": 128, f"{arch}.embedding_length": 32,
        f"{arch}.feed_forward_length": 64, f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2, f"{arch}.attention.key_length": 8,
        f"{arch}.rope.freq_base": 50_000.0, f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "general.license": "apache-2.0", "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(described["vocab"], key=described["vocab"].get),
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 317,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["merges"]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}.get(type(value))  # fmt: skip
        if add:
            add(key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        part = name.removeprefix("model.").removesuffix(".weight")
        ours = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(part)
        short = part.split(".", 2)[-1]
        ours = ours or f"blk.{part.split('.')[1]}.{names[short]}"
        array = tensor.numpy()
        if kind == "Llama" and short in ("self_attn.q_proj", "self_attn.k_proj"):
            array = interleaved(array, HEADS[short[10]])
        if keep and (array := keep(f"{ours}.weight", array)) is None:
            continue
        stored = gguf.GGMLQuantizationType[STORED.get(ours.split(".")[-1], "F32")]
        quantised = gguf.quants.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(f"{ours}.weight", quantised, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "few.txt"
    file.write_text(MOBY[:30_000], "utf-8")
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_one_loop_of_a_gguf_file_is_its_source(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from looptx_core.conversion.gguf_file import GGUF

    code, shown, _ = run(capsys, "--from-gguf", llama, "--core", "1:3", "--max-loops", 3,
                         "--data", data, "--out", tmp_path / "m", "--json", "--quiet")  # fmt: skip
    found = json.loads(shown)
    assert code == 0 and found["core"] == "1:3" and found["spans"] == []
    assert found["logit_difference"] < 1e-5
    loaded = load_model(tmp_path / "m")
    config = loaded.config
    assert (config.prelude_layers, config.core_layers, config.coda_layers) == (1, 2, 2)
    assert (config.loops, config.max_loops, config.injection) == (1, 3, "bridge")
    assert unsupported_reason(loaded.model) is None

    # The source is the model that was written, rounded as it was stored, and no other.
    source = GGUF(llama).in_transformers()
    written = plain("Llama").state_dict()
    for name, tensor in source.state_dict().items():
        exact = any(part in name for part in ("norm", "embed", "lm_head", "q_proj", "k_proj"))
        gap = (tensor - written[name]).abs().max()
        assert gap == 0 if exact else 0 < gap < 0.1
    tokens = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = loaded.model(tokens, 1).logits
        assert (one - source(tokens).logits).abs().max() < 1e-4
        assert torch.equal(loaded.model(tokens, 3).logits, one)

    # Words, ends, the template and 64 tokens.
    theirs = made_tokenizer()
    for text in ("Call me Ishmael. 1851, it's\n\n  über  naïve — 鯨!", MOBY[5_000:8_000]):
        assert loaded.tokenizer.encode(text).ids == theirs.encode(text).ids
    assert loaded.special.ends == (2, 0) and loaded.special.bos == "<|im_start|>"
    assert loaded.chat_template == TEMPLATE
    assert "license: apache-2.0" in (tmp_path / "m" / "README.md").read_text("utf-8")
    assert "Q8_0" in loaded.facts["from"]
    prompt = theirs.encode("Call me").ids
    expected = source.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
    for loops in (1, "auto"):
        ours = load(str(tmp_path / "m")).generate(
            prompt, temperature=0, max_new_tokens=64, ignore_eos=True, loops=loops
        )
        assert prompt + [token.id for token in ours.tokens] == expected[0].tolist()


def test_a_qwen3_and_texts_that_begin_with_a_token(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "q.gguf", "Qwen3", tokenizer__ggml__add_bos_token=None,
                 tokenizer__ggml__pre="llama-bpe")  # fmt: skip
    code, shown, _ = run(capsys, "--from-gguf", file, "--data", data, "--out", tmp_path / "m",
                         "--json", "--quiet")  # fmt: skip
    found = json.loads(shown)
    assert code == 0 and found["logit_difference"] < 1e-5 and found["core"] is None
    loaded = load_model(tmp_path / "m")
    assert (loaded.config.injection, loaded.config.max_loops) == ("none", 1)
    assert loaded.tokenizer.encode("a").ids[0] == 1


def test_the_middle_of_a_folder_is_looped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain("Llama", tie_word_embeddings=False).save_pretrained(tmp_path / "hf")
    made_tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    common = ("--from-hf", tmp_path / "hf", "--data", data, "--quiet")
    code, shown, _ = run(capsys, *common, "--core", "auto", "--out", tmp_path / "m")
    assert code == 0 and "core: layers 2:3" in shown and "2:3 *" in shown
    assert "logits differ by at most" in shown
    assert "half steps of the core, untrained: " in shown
    loaded = load_model(tmp_path / "m")
    assert (loaded.config.prelude_layers, loaded.config.max_loops) == (2, 4)
    for core in ("3:3", "0:5", "4:6", "2", "a:b", ""):
        code, _, error = run(capsys, *common, "--core", core, "--out", tmp_path / "n")
        assert code == 2 and "--core" in error and len(error.splitlines()) == 1
    code, _, error = run(capsys, *common, "--max-loops", 3, "--out", tmp_path / "n")
    assert code == 2 and "--max-loops" in error
    with pytest.raises(UsageError, match="a single layer"):
        pretrained.Looping("auto").span(1)


def test_another_model_is_not_the_source() -> None:
    source = plain("Llama")
    config = pretrained.looped_shape(source.config.to_dict(), "x", pretrained.Looping("auto"))
    model, rename = pretrained.empty_model(config), pretrained.looped_names(config)
    named = {rename(name): tensor for name, tensor in source.state_dict().items()}
    model.load_state_dict({k: v.clone() for k, v in named.items() if k}, strict=False, assign=True)
    model.head.weight = model.embedding.weight
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(3))
    assert logit_difference(model, source, tokens) < 1e-5
    with torch.no_grad():
        model.core[0].mlp.up_proj.weight[0, 0] += 0.1
    with pytest.raises(DataError, match="one loop is not the source"):
        logit_difference(model, source, tokens)
    for value in (0.0, math.nan):
        with torch.no_grad():
            source.lm_head.weight.fill_(value)
        with pytest.raises(DataError, match=f"the source's largest logit is {value}"):
            logit_difference(model, source, tokens)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256(kind: str, tmp_path: Path) -> None:
    """Written by hand, as the package has no quantiser of these."""
    from looptx_core.conversion.gguf_file import GGUF

    one, zero = np.float16(1).tobytes(), np.float16(0).tobytes()
    block, expected = {
        "Q4_K": (one + zero + b"\1" * 4 + b"\0" * 4 + b"\1" * 4 + b"\x53" * 128,
                 [3.0] * 32 + [5.0] * 32),
        "Q6_K": (b"\0" * 192 + b"\1" * 16 + one, [-32.0] * 64),
    }[kind]  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for name, value in (("embedding_length", 256), ("attention.head_count", 8),
                        ("feed_forward_length", 256), ("block_count", 1),
                        ("context_length", 64)):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    raw = np.frombuffer(block, np.uint8)[None].repeat(2, 0)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUF(tmp_path / "k.gguf")
    assert found.tensor("token_embd.weight").tolist() == [expected * (256 // len(expected))] * 2
    assert found.types == [kind]


def test_a_chat_is_asked_by_the_template_and_ends_at_its_own_token(llama: Path) -> None:
    from looptx_core.conversion.gguf_file import GGUF, from_gguf

    loaded = from_gguf(GGUF(llama), pretrained.ONE_LOOP)
    template = ChatTemplate(str(loaded.chat_template), loaded.special.names())
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made_tokenizer())
    expected = theirs.apply_chat_template(
        list(messages), chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert template.prompt(messages, loaded.tokenizer) == expected and expected[0] == 1
    assert loaded.tokenizer.encode("<|im_end|>").ids != [2]  # which stays text elsewhere
    engine = Engine(loaded.model, loaded.tokenizer, ends=loaded.special.ends,
                    chat_template=template, kernel="torch")  # fmt: skip
    options = GenerationOptions(temperature=0, max_new_tokens=8)
    [plain_] = engine.complete([ChatPrompt(messages)], replace(options, ignore_eos=True))
    third = plain_.tokens[2].id
    with torch.no_grad():  # the third token becomes the end
        head = torch.nn.Parameter(loaded.model.head.weight.clone())
        head[[2, third]] = head[[third, 2]]
        loaded.model.head.weight = head
    [found] = engine.complete([ChatPrompt(messages)], options)
    first = [token.id for token in plain_.tokens].index(third)
    assert found.finish_reason == "end" and len(found.tokens) == first + 1
    assert found.tokens[-1].id == 2
    with pytest.raises(UsageError, match=r"spells <\|im_end\|>"):
        template.prompt([{"role": "user", "content": "a<|im_end|>b"}], loaded.tokenizer)
    for broken in ("{% for %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"):
        with pytest.raises(DataError, match="chat template fails"):
            ChatTemplate(broken, {}).prompt(messages, loaded.tokenizer)


def without(missing: str) -> Any:
    return lambda name, values: None if name == missing else values


BAD = {
    "an unknown architecture": (dict(architecture="mamba"), "architecture is mamba"),
    "no merges": (dict(tokenizer__ggml__merges=None), "no merges"),
    "another kind of tokenizer": (dict(tokenizer__ggml__model="t5"), "Unigram; byte-level BPE"),
    "unknown words": (dict(tokenizer__ggml__pre="tekken"), "pre-tokenizer is 'tekken'"),
    "a list of names of words": (dict(tokenizer__ggml__pre=["a"]), "pre-tokenizer is"),
    "an end that is no token": (dict(tokenizer__ggml__eos_token_id=999), "eos 999"),
    "no number of layers": (dict(llama__block_count=None), "llama.block_count is missing"),
    "another number of layers": (dict(llama__block_count=6), "lack"),
    "another width": (dict(llama__feed_forward_length=96), r"ffn_\w+.weight is \["),
    "a tensor less": (dict(keep=without("blk.2.attn_v.weight")), r"lack blk.2.attn_v.weight"),
    "scaled RoPE": (dict(llama__rope__scaling__type="yarn"), "scaled RoPE"),
    "a window": (dict(llama__attention__sliding_window=64), "a window"),
    "experts": (dict(llama__expert_count=8), "experts"),
    "NaN": (
        dict(keep=lambda name, values: values * np.nan if name == "output_norm.weight" else values),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_does_not_fit_is_refused(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = BAD[what]
    file = write(tmp_path / "bad.gguf", **changes)
    code, _, error = run(capsys, "--from-gguf", file, "--out", tmp_path / "m")
    assert code == 4 and re.search(message, error) and len(error.splitlines()) == 1
    assert str(file) in error and not (tmp_path / "m").exists()


def test_a_damaged_file_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = llama.read_bytes()
    twice = whole.replace(b"blk.1.attn_v.weight", b"blk.0.attn_v.weight", 1)
    place = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    unknown, other = (
        whole[:place] + number.to_bytes(4, "little") + whole[place + 4 :] for number in (999, 16)
    )
    cut = {f"cut at {at}": whole[: int(at * len(whole))] for at in (0, 0.0001, 0.01, 0.2, 0.99)}
    damaged = {**cut, "twice": twice, "unknown": unknown, "other type": other,
               "text": b"not a model\n"}  # fmt: skip
    said = {}
    for name, content in damaged.items():
        file = tmp_path / "damaged.gguf"
        file.write_bytes(content)
        code, _, error = run(capsys, "--from-gguf", file, "--out", tmp_path / "m")
        assert code == 4 and len(error.splitlines()) == 1 and str(file) in error, name
        said[name] = error
    code, _, error = run(capsys, "--from-gguf", tmp_path, "--out", tmp_path / "m")
    assert code == 4 and f"{tmp_path}: a folder" in error
    assert "duplicated tensor" in said["twice"] and "blk.0.attn_v.weight" in said["twice"]
    assert "999" in said["unknown"] and "IQ2_XXS" in said["other type"]
    assert "cut short" in said["cut at 0.99"] and "cut short" in said["cut at 0.01"]


def test_a_model_larger_than_the_memory_is_not_read(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from looptx_core.conversion import gguf_file

    plain("Llama").save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(pretrained, "free_ram", lambda: 100_000)
    monkeypatch.setattr(gguf_file, "dequantize", None)  # which is not called
    for source in (("--from-gguf", llama), ("--from-hf", tmp_path / "hf")):
        code, _, error = run(capsys, *source, "--out", tmp_path / "m")
        assert code == 4 and "of memory are free" in error and len(error.splitlines()) == 1


def test_without_the_package(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "looptx_core.conversion.gguf_file", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, error = run(capsys, "--from-gguf", llama, "--out", tmp_path / "m")
    assert code == 3 and "pip install 'looptx[gguf]'" in error and len(error.splitlines()) == 1

"""The sound inputs that the fuzz run spoils, made once by looptx's own commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.reliability.forks import run

SETTINGS: dict[str, Any] = {
    "steps": 4, "seq_len": 16, "batch_size": 2, "save_every": 2, "val_every": 2, "val_batches": 1,
    "log_every": 1, "precision": "float32",
    "model": {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 32,
              "core_layers": 1, "max_loops": 3, "max_seq_len": 256},
}  # fmt: skip
QUESTIONS = [{"prompt": f"What is {n} and {n}?", "response": f" It is {2 * n}."} for n in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."},
                  {"role": "assistant", "content": f"{n}"}]} for n in range(12)
]  # fmt: skip
COMMANDS = (
    "tokenize text.txt --vocab-size 400 --out shards",
    "train --config train.yaml --data shards --out run",
    "train --config train.yaml --data pairs.jsonl --data shards --out seeing --seq-len 32 "
    "--set model.vision_layers=1 --set model.patch_size=8 --set model.max_patches=16",
    "finetune --model run --data questions.jsonl --lora --steps 2 --batch-size 2 "
    "--seq-len 64 --out tuned --precision float32",
    "convert --model run --to-bitnet --direct --data shards --seed 1 --out ternary",
    "convert --model run --to-hf --out hf",
    "train --config train.yaml --data sounds.jsonl --data clips.jsonl --data shards "
    "--out sensing --seq-len 48 --set model.audio.layers=1 --set model.audio.width=32 "
    "--set model.vision_layers=1 --set model.patch_size=8 --set model.max_patches=16 "
    "--set model.video.frames=4",
)


def make(folder: Path) -> None:
    """Fill a folder. Raises `RuntimeError` where one of the commands fails."""
    write_files(folder)
    for command in COMMANDS:
        done = run(command.split(), folder, seconds=120, most_bytes=4 << 30)
        if done.code and "ternary" not in command:
            raise RuntimeError(f"looptx {command}\n{done.err}")
    _llama(folder / "llama", folder / "shards/tokenizer.json")
    _gguf(folder / "llama", folder / "llama.gguf")


def write_files(folder: Path) -> None:
    """What needs no command of looptx."""
    folder.mkdir(parents=True, exist_ok=True)
    _texts(folder)
    _pictures(folder)
    _sounds(folder)
    _clips(folder)
    _tasks(folder / "tasks")
    (folder / "train.yaml").write_text(json.dumps(SETTINGS))
    (folder / "ds.json").write_text(json.dumps({
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
    }))  # fmt: skip
    (folder / "generate.yaml").write_text(json.dumps({"temperature": 0.5, "top_k": 3, "loops": 2}))


def _texts(folder: Path) -> None:
    from looptx_core.data.corpus import bundled_text

    text = bundled_text().read_text("utf-8")[30_000:70_000]
    (folder / "text.txt").write_text(text)
    parts = [text[at : at + 1000] for at in range(0, 20_000, 1000)]
    _lines(folder / "lines.jsonl", [{"text": part, "n": 1} for part in parts])
    _lines(folder / "questions.jsonl", QUESTIONS)
    _lines(folder / "chats.jsonl", CHATS)
    _lines(folder / "prompts.jsonl", [{"prompt": "Call me"}, {"prompt": "The sea"}])
    (folder / "prompts.txt").write_text("Call me\nThe sea\n")
    (folder / "array.json").write_text(json.dumps(QUESTIONS))
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "response"])
        table.writeheader()
        table.writerows(QUESTIONS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pq.write_table(pa.table({"text": parts, "n": [1] * len(parts)}), folder / "text.parquet")
    pq.write_table(pa.Table.from_pylist(QUESTIONS), folder / "questions.parquet")


def _lines(file: Path, records: list) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _pictures(folder: Path) -> None:
    from PIL import Image

    image = Image.radial_gradient("L").resize((40, 24)).convert("RGB")
    (folder / "pictures").mkdir(exist_ok=True)
    for end in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        image.save(folder / f"pictures/cat.{end}")
    image.quantize(4).save(folder / "pictures/palette.png")
    frames = [image.rotate(angle) for angle in (0, 90)]
    frames[0].save(folder / "pictures/two.webp", save_all=True, append_images=frames[1:])
    names = sorted(file.name for file in (folder / "pictures").iterdir())
    _lines(folder / "pairs.jsonl", [
        {"image": f"pictures/{names[n % len(names)]}", "text": f"cat {n}"} for n in range(24)
    ])  # fmt: skip


def _sounds(folder: Path) -> None:
    """Tones in each format that is promised."""
    import numpy as np
    import soundfile

    (folder / "sounds").mkdir(exist_ok=True)
    ends, records = ("wav", "flac", "ogg", "mp3", "aiff"), []
    for number in range(20):
        name = f"sounds/{number}.{ends[number % len(ends)]}"
        time = np.arange(8_000) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * (300 + 300 * (number % 2)) * time)
        soundfile.write(folder / name, tone.astype(np.float32), 16_000)
        records.append({"audio": name, "text": ("low", "high")[number % 2], "group": f"v{number}"})
    _lines(folder / "sounds.jsonl", records)


def _clips(folder: Path) -> None:
    """A moving square in each format that is promised."""
    from PIL import Image

    (folder / "clips").mkdir(exist_ok=True)
    ends, records = ("webp", "gif", "png"), []
    for number in range(12):
        name = f"clips/{number}.{ends[number % len(ends)]}"
        frames = [Image.new("RGB", (24, 16), (200, 90, 10 * number)) for _ in range(4)]
        for at, frame in enumerate(frames):
            frame.paste((0, 0, 200), (5 * at, 4, 5 * at + 5, 12))
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=100)
        records.append({"video": name, "text": f"square {number}"})
    _lines(folder / "clips.jsonl", records)


def _tasks(folder: Path) -> None:
    """One task of each kind, and its lines."""
    folder.mkdir(exist_ok=True)
    kinds: dict[str, dict[str, Any]] = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "choices",
                   "metric_list": [{"metric": "acc"}], "metadata": {"chance": 0.5}},
        "answer": {"output_type": "generate_until",
                   "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}},
        "passage": {"output_type": "loglikelihood_rolling"},
    }  # fmt: skip
    targets = {"choice": "gold", "answer": "answer", "passage": "question"}
    for name, keys in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "doc_to_text": "question",
            "dataset_kwargs": {"data_files": {"test": "lines.jsonl"}}, "test_split": "test",
            "doc_to_target": targets[name], **keys,
        }))  # fmt: skip
    _lines(folder / "lines.jsonl", [
        {"question": f"The whale {n}", "choices": ["dives", "sings"], "gold": n % 2, "answer": "a"}
        for n in range(6)
    ])  # fmt: skip


def _llama(folder: Path, tokenizer: Path) -> None:
    """A plain Llama of a few numbers, as transformers saves it."""
    import torch
    from safetensors.torch import save_file

    vocab = len(json.loads(tokenizer.read_text())["model"]["vocab"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": [0, 1],
    }))  # fmt: skip
    (folder / "tokenizer.json").write_text(tokenizer.read_text())
    draw = torch.Generator().manual_seed(0)
    sizes = {"model.embed_tokens": (vocab, 16), "model.norm": (16,)}
    for layer in range(2):
        parts = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16),
                 "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
                 "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
                 "input_layernorm": (16,), "post_attention_layernorm": (16,)}  # fmt: skip
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in parts.items()}
    tensors = {f"{n}.weight": torch.randn(size, generator=draw) for n, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _gguf(llama: Path, file: Path) -> None:
    """That Llama as llama.cpp stores it."""
    import gguf
    from safetensors.numpy import load_file

    made = json.loads((llama / "tokenizer.json").read_text())["model"]
    config = json.loads((llama / "config.json").read_text())
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    values = {
        "llama.block_count": 2, "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": 16, "llama.feed_forward_length": 24,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 8, "llama.rope.freq_base": 10_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "general.license": "apache-2.0",
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in made["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    add: dict[type, Any] = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in values.items():
        add[type(value)](key, value)
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in load_file(llama / "model.safetensors").items():
        part = name.removeprefix("model.").removesuffix(".weight")
        layer, inner = part.split(".", 2)[1:] if part.startswith("layers.") else ("", part)
        before = f"blk.{layer}." if layer else ""
        writer.add_tensor(f"{before}{names[inner]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

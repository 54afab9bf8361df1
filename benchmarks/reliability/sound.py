"""The sound inputs that the fuzz run spoils, made once by looptx's own commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from benchmarks.reliability.forks import run

SETTINGS = {
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


def make(folder: Path) -> None:
    """Fill a folder. Raises `RuntimeError` where one of the commands fails."""
    folder.mkdir(parents=True, exist_ok=True)
    _texts(folder)
    _pictures(folder)
    (folder / "train.yaml").write_text(json.dumps(SETTINGS))
    (folder / "ds.json").write_text(json.dumps({
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000},
        "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
    }))  # fmt: skip
    (folder / "generate.yaml").write_text(json.dumps({"temperature": 0.5, "top_k": 3, "loops": 2}))
    for command in (
        "tokenize text.txt --vocab-size 400 --out shards",
        "train --config train.yaml --data shards --out run",
        "train --config train.yaml --data pairs.jsonl --data shards --out seeing --seq-len 32 "
        "--set model.vision_layers=1 --set model.patch_size=8 --set model.max_patches=16",
        "finetune --model run --data questions.jsonl --lora --steps 2 --batch-size 2 "
        "--seq-len 64 --out tuned --precision float32",
        "convert --model run --to-bitnet --direct --data shards --seed 1 --out ternary",
        "convert --model run --to-hf --out hf",
    ):
        done = run(command.split(), folder, seconds=120, most_bytes=4 << 30)
        if done.code and "ternary" not in command:
            raise RuntimeError(f"looptx {command}\n{done.err}")
    _llama(folder / "llama", folder / "shards/tokenizer.json")


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

"""Decoding at batch 1 and full depth, beside transformers' `generate` and llama.cpp.

Equal width, equal *effective* depth, the same weight type, greedy, 32 tokens of prompt; the time is
of the tokens after the first. All sides alternate in one process, rounds apart, so that a busy
moment meets them all; read the ratios.

    pip install transformers llama-cpp-python gguf
    python -m benchmarks.decode_speed.run                       # peers, both shapes of `small`
    python -m benchmarks.decode_speed.run --shape medium
    python -m benchmarks.decode_speed.run --parts loops    # equal depth by 1, 2, 5 and 10 loops
    python -m benchmarks.decode_speed.run --device cuda         # on a GPU, by CUDA graphs

A shape that is measured anew replaces its rows in the record of this machine; others stay.
--compiled adds transformers with a static cache, which it compiles (bf16). Weights are random: what
they say is not the matter here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import nn

from benchmarks.common.decoding import Run, by_engine, by_transformers, measure, summary
from benchmarks.common.llama_file import write_llama
from benchmarks.common.record import results_file, rows_by, rows_so_far, write
from looptx_core.backends.cpu.rounding import all_blocks, block_layers
from looptx_core.config.model import ModelConfig
from looptx_core.conversion.ternary import pack_model
from looptx_core.generation.engine import Engine
from looptx_core.model.bitnet import TernaryLinear
from looptx_core.model.loop import LoopedTransformer

PROMPT, NEW = 32, 96
SMALL = dict(vocab_size=4096, d_model=512, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536)
MEDIUM = dict(vocab_size=16384, d_model=1024, n_heads=16, n_kv_heads=8, head_dim=64, d_ff=3072)
SHAPES: dict[str, dict[str, Any]] = {
    "small 2 + 4 x 2 + 2": dict(SMALL, prelude_layers=2, core_layers=4, loops=2, coda_layers=2),
    "small 1 + 1 x 10 + 1": dict(SMALL, prelude_layers=1, core_layers=1, loops=10, coda_layers=1),
    "medium 2 + 4 x 3 + 2": dict(MEDIUM, prelude_layers=2, core_layers=4, loops=3, coda_layers=2),
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def config_of(shape: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**shape, max_loops=max(shape["loops"], 2))


def engine_of(
    config: ModelConfig, weights: str, kernel: str = "auto", device: str = "cpu"
) -> Engine:
    """An engine with fresh weights of this type, and ids for words."""
    torch.manual_seed(0)
    ternary = weights == "ternary"
    model = LoopedTransformer(replace(config, linear="ternary" if ternary else "float")).eval()
    if ternary:
        model = pack_model(model)
    vocabulary = {"<|end|>": 0, **{f"t{i}": i for i in range(1, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    held = "float32" if ternary else weights
    if device != "cpu":
        model, held = model.to(device, DTYPES[weights]), "float32"
    return Engine(model, tokenizer, kernel=kernel, precision=held)


def looptx(
    config: ModelConfig,
    prompt: list[int],
    weights: str,
    kernel: str = "auto",
    device: str = "cpu",
) -> tuple[Run, int]:
    """The run, and the bytes of weights that a token reads at least once."""
    engine = engine_of(config, weights, kernel, device)
    run = by_engine(engine, prompt, config.loops, NEW)
    return run, held_bytes(engine.model, "float32" if weights == "ternary" else weights)


def held_bytes(model: LoopedTransformer, precision: str = "float32") -> int:
    """Bytes of weights that decoding a token reads, each once, as the kernel holds them."""
    width = {"float32": 4, "bf16": 2, "int8": 1}[precision]
    total = model.head.weight.numel() * width
    for block in all_blocks(model):
        for layer in block_layers(block):
            if isinstance(layer, TernaryLinear):
                total += layer.packed.nbytes
            elif isinstance(layer, nn.Linear):
                total += layer.weight.numel() * width
    return total


def llama_config(config: ModelConfig) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model,
        intermediate_size=config.d_ff, num_hidden_layers=config.effective_layers(config.loops),
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, hidden_act="gelu", tie_word_embeddings=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def hugging_face(
    config: ModelConfig,
    prompt: list[int],
    weights: str,
    device: str = "cpu",
    compiled: bool = False,
) -> Run:
    import transformers

    model = transformers.LlamaForCausalLM(llama_config(config)).to(device, DTYPES[weights]).eval()
    more = {"cache_implementation": "static"} if compiled else {}
    return by_transformers(model, prompt, NEW, **more)


def llama_cpp(config: ModelConfig, prompt: list[int], weights: str, folder: Path) -> Run:
    """llama.cpp on a Llama of this shape, written as GGUF with weights of its own type."""
    import llama_cpp
    import numpy as np

    file = write_llama(folder / f"{weights}-{config.d_model}.gguf", config, weights)
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(file), n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> float:
        model.reset()
        model.eval(prompt)
        began = time.perf_counter()
        for _ in range(NEW - 1):
            model.eval([int(np.argmax(model.eval_logits[-1]))])
        return time.perf_counter() - began

    return run


def against_peers(
    config: ModelConfig, prompt: list[int], rounds: int, device: str, compiled: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    on_cpu = device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("float32", "bf16", "int8", "ternary") if on_cpu else ("float32", "bf16"):
            ours, read = looptx(config, prompt, weights, device=device)
            runs: dict[str, Run] = {"looptx": ours}
            if weights == "float32" or not on_cpu:
                runs["looptx, torch alone"] = looptx(config, prompt, weights, "torch", device)[0]
            if weights in DTYPES:
                runs["transformers"] = hugging_face(config, prompt, weights, device)
            if compiled and weights == "bf16":
                runs["transformers, compiled"] = hugging_face(
                    config, prompt, weights, device, compiled
                )
            if on_cpu and find_spec("llama_cpp") and find_spec("gguf"):
                runs["llama.cpp"] = llama_cpp(config, prompt, weights, Path(folder))
            rates = measure(runs, rounds, NEW)
            report[weights] = {"bytes_of_weights": read, **summary(rates)}
            print(weights, json.dumps({k: report[weights][k] for k in list(report[weights])[:3]}))
            del runs, ours
            gc.collect()
    return report


def by_loops(prompt: list[int], rounds: int, device: str) -> dict[str, Any]:
    """Effective depth 12 by one layer ten times, or two five times, up to ten once."""
    report: dict[str, Any] = {}
    for weights in ("float32", "bf16", "int8", "ternary") if device == "cpu" else DTYPES:
        runs, read = {}, {}
        for loops in (1, 2, 5, 10):
            shape = dict(SMALL, prelude_layers=1, core_layers=10 // loops, coda_layers=1)
            runs[str(loops)], read[str(loops)] = looptx(
                config_of(dict(shape, loops=loops)), prompt, weights, device=device
            )
        rates = measure(runs, rounds, NEW)
        report[weights] = {
            loops: {"tokens_per_second": statistics.median(rates[loops]), "bytes": read[loops]}
            for loops in runs
        }
        print(weights, json.dumps(report[weights]))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="small", help="beginning of a shape's name")
    parser.add_argument("--parts", nargs="+", default=["peers"], choices=["peers", "loops"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compiled", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    on_gpu = flags.device == "cuda"
    report: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        if "peers" in flags.parts and name.startswith(flags.shape):
            print(name)
            config = config_of(shape)
            prompt = torch.randint(1, config.vocab_size, (PROMPT,)).tolist()
            found = against_peers(config, prompt, flags.rounds, flags.device, flags.compiled)
            report[name] = rows_by(found, "weights")
    if "loops" in flags.parts:
        prompt = torch.randint(1, SMALL["vocab_size"], (PROMPT,)).tolist()
        found = by_loops(prompt, flags.rounds, flags.device)
        report["effective depth 12, by loops"] = rows_by(found, "weights", "loops")
    earlier = rows_so_far(results_file("decode_speed.run", on_gpu=on_gpu))
    write(
        "decode_speed.run",
        f"tokens per second after the first, prompt {PROMPT}, {NEW} new, batch 1",
        [
            *(row for row in earlier if row["model"] not in report),
            *({"model": name, **row} for name, rows in report.items() for row in rows),
        ],
        settings={"rounds": flags.rounds},
        peers=[name for name in ("transformers", "llama_cpp_python") if _installed(name)],
        on_gpu=on_gpu,
    )


def _installed(name: str) -> bool:
    return find_spec(name.removesuffix("_python")) is not None


if __name__ == "__main__":
    main()

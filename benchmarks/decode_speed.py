"""Decoding speed: looptx at full depth against transformers' `generate`, `small`, batch 1.

Both have width 512 and 12 effective layers, in float32: 2 + 4 x 2 + 2 looped ones here, 12 of
their own in transformers' Llama. Greedy, the end token ignored, rounds alternating in one process.

    python benchmarks/decode_speed.py [--threads 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models

from looptx_core import __version__
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

PROMPT, NEW, VOCAB = 32, 128, 4096


def ours(prompt: list[int]) -> Callable[[], object]:
    config = ModelConfig(
        vocab_size=VOCAB, d_model=512, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536,
        prelude_layers=2, core_layers=2, coda_layers=2, loops=4, max_loops=4,
    )  # fmt: skip
    # The text is not the matter here: any vocabulary of this size does.
    vocabulary = {"<|end|>": 0, **{f"t{i}": i for i in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    engine = Engine(LoopedTransformer(config), tokenizer)
    options = GenerationOptions(loops=4, temperature=0, max_new_tokens=NEW, ignore_eos=True)
    return lambda: engine.complete([prompt], options)


def theirs(prompt: list[int]) -> Callable[[], object]:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, hidden_act="gelu",
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([prompt])

    def generate() -> object:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
        assert out.shape[1] == PROMPT + NEW
        return out

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    here = Path(__file__).parent / "results" / "decode_speed.json"
    parser.add_argument("--out", type=Path, default=here)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    prompt = torch.randint(1, VOCAB, (PROMPT,)).tolist()
    runs = {"looptx": ours(prompt), "transformers": theirs(prompt)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(flags.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    rates = {name: [NEW / t for t in times] for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(rates["looptx"], rates["transformers"])]
    report = {
        "what": "tokens per second, prompt of 32 included, 128 new tokens, float32, batch 1",
        "threads": flags.threads,
        "rounds": flags.rounds,
        "tokens_per_second": {name: statistics.median(all_) for name, all_ in rates.items()},
        "ratio_of_medians": statistics.median(rates["looptx"])
        / statistics.median(rates["transformers"]),
        "ratio_by_round": ratios,
        "median_ratio": statistics.median(ratios),
        "versions": {
            "looptx": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

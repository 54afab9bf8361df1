"""Ternary models: size and loss both ways, error by loop, decoding speed packed against float32.

The bundled model on the bundled text, rounded at once and trained through the rounding; then two
engines at preset `small`'s shape, rounds alternating in one process, with weights as drawn.

    python benchmarks/ternary.py [--threads 1] [--rounds 9] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from looptx_core import __version__
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.conversion.run import convert
from looptx_core.conversion.ternary import bits_per_weight, pack_model, running_bytes, to_ternary
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

PROMPT, NEW = 32, 128


def conversions(steps: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, how in (
        ("rounded", {"direct": True}),
        ("trained", {"finetune_steps": steps}),
        ("trained, the rest in bf16", {"finetune_steps": steps, "dtype": "bf16"}),
    ):
        if name.endswith("bf16"):  # of the trained one: only the number type is new
            how = {"model": str(folder / "trained"), "dtype": "bf16"}
        config = ConvertConfig(
            **{"model": str(bundled_model()), "to_bitnet": "model" not in how, **how},
            out=str(folder / name), max_minutes=60,
        )  # fmt: skip
        result = convert(config)
        found[name] = {
            **result.to_dict(),
            "out": name,
            "memory_before": result.memory_before,
            "memory_after": result.memory_after,
            "loss_by_loop_before": result.loss_by_loop_before,
            "loss_by_loop": result.loss_by_loop,
            "seconds": result.seconds,
            "steps": result.steps,
        }
        print(json.dumps(found[name]), flush=True)
    return found


@torch.no_grad()
def compounding(folder: Path) -> dict[str, Any]:
    """How far the rounded model's states and outputs are from the float one's, by loop."""
    whole = load_model(bundled_model())
    shards = bundled_shards(whole.tokenizer.get_vocab_size(), whole.tokenizer)
    data = TokenData(shards, seq_len=128, micro_batch=32, batches=1, val_batches=4)
    rounded = to_ternary(whole.model, [next(iter(data.train_dataloader()))])
    trained = load_model(folder / "trained").model
    found: dict[str, Any] = {}
    for name, model in (("rounded", rounded), ("trained", trained)):
        states, divergences, agreements = [], [], []
        for batch in data.val_dataloader():
            tokens, documents = batch["tokens"][:, :-1], batch["documents"]
            around = model.surroundings(tokens.shape[1], documents=documents)
            pairs = zip(
                whole.model.states(tokens, 10, around=around),
                model.states(tokens, 10, around=around),
            )
            for loop, (a, b) in enumerate(pairs):
                p, q = (
                    m.head(m.decode(s, around)).log_softmax(-1)
                    for m, s in ((whole.model, a), (model, b))
                )
                if len(states) <= loop:
                    states.append([]), divergences.append([]), agreements.append([])
                states[loop].append(float(((a - b).norm(dim=-1) / a.norm(dim=-1)).mean()))
                kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
                divergences[loop].append(float(kl))
                agreements[loop].append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        found[name] = {
            "relative_state_error_by_loop": [statistics.mean(x) for x in states],
            "kl_by_loop_nats": [statistics.mean(x) for x in divergences],
            "same_top_token_by_loop": [statistics.mean(x) for x in agreements],
        }
    return found


def speed(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shape: dict[str, Any] = get_preset("small")["model"]
    vocab = shape["vocab_size"]
    vocabulary = {"<|end|>": 0, **{f"t{i}": i for i in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    latent = LoopedTransformer(ModelConfig(**shape, linear="ternary"))
    kinds = {
        "float32": LoopedTransformer(ModelConfig(**shape)),
        "packed": pack_model(latent),
    }
    memory = {name: running_bytes(model) for name, model in kinds.items()}
    stored = {
        name: sum(t.numel() * t.element_size()
                  for t in {t.data_ptr(): t for t in [*m.parameters(), *m.buffers()]}.values())
        for name, m in kinds.items()
    }  # fmt: skip
    bits = {name: bits_per_weight(model) for name, model in kinds.items()}
    engines = {name: Engine(model, tokenizer) for name, model in kinds.items()}
    options = GenerationOptions(loops=2, temperature=0, max_new_tokens=NEW, ignore_eos=True)
    prompt = torch.randint(1, vocab, (PROMPT,)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in engines}
    prompts: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            steps = engine.complete([prompt], options)[0].tokens
            if number:  # the first round warms up
                rates[name].append((NEW - 1) / (steps[-1].seconds - steps[0].seconds))
                prompts[name].append(PROMPT / steps[0].seconds)
    ratios = [a / b for a, b in zip(rates["packed"], rates["float32"])]
    return {
        "what": "small, effective depth 12, batch 1, 128 new tokens after a prompt of 32",
        "decode_tokens_per_second": {k: statistics.median(v) for k, v in rates.items()},
        "prompt_tokens_per_second": {k: statistics.median(v) for k, v in prompts.items()},
        "ratio_by_round": ratios,
        "median_ratio": statistics.median(ratios),
        "bytes_in_memory": memory,
        "bytes_stored": stored,
        "bits_per_weight": bits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only-speed", action="store_true", help="Keep the other figures.")
    here = Path(__file__).parent / "results" / "ternary.json"
    parser.add_argument("--out", type=Path, default=here)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    report: dict[str, Any] = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    if not flags.only_speed:
        with tempfile.TemporaryDirectory() as folder:
            report["conversions"] = conversions(flags.steps, Path(folder))
            report["compounding"] = compounding(Path(folder))
    report["speed"] = {**speed(flags.rounds), "threads": flags.threads}
    report["versions"] = {
        "looptx": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

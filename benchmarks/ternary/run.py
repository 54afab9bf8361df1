"""Ternary models: size and loss both ways, error by loop, and decoding speed against float32.

The bundled model on the bundled text, rounded at once and trained through the rounding; what the
rounding does to the states of each loop; then two engines at preset `small`'s shape, rounds
alternating in one process, with weights as drawn.

    python -m benchmarks.ternary.run [--threads 1] [--rounds 9] [--steps 200] [--parts speed ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor

from benchmarks.common.record import flat, results_file, rows_by, rows_so_far, write
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.config.run import TrainConfig
from looptx_core.conversion.run import convert
from looptx_core.conversion.ternary import bits_per_weight, pack_model, running_bytes, to_ternary
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.generation.engine import Engine
from looptx_core.model.bitnet import BitLinear, int8_by_token, ternary
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.run import train

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


def compounding(steps: int, folder: Path) -> dict[str, Any]:
    """How far rounding moves states and outputs, by loop, in models trained for it and not.

    Against the same weights and norms unrounded, so that nothing but the rounding differs. Beside
    the bundled model two of `nano`'s shape with two blocks in the core, with the decayed injection
    and without any, trained alike.
    """
    bundled = load_model(bundled_model())
    shards = bundled_shards(bundled.tokenizer.get_vocab_size(), bundled.tokenizer)
    data = TokenData(shards, seq_len=128, micro_batch=32, batches=1, val_batches=4)
    calibration = [next(iter(data.train_dataloader()))]
    found = {}
    for name in ("bundled", "decay", "none"):
        model = bundled.model
        if name != "bundled":
            shape = replace(bundled.config, core_layers=2, injection=name)  # type: ignore[arg-type]
            run = folder / name
            run.mkdir()
            settings = TrainConfig(steps=steps, save_every=steps, val_every=steps)
            model = load_model(train(settings, shape, data=shards, folder=run).model_folder).model
            name = f"two blocks, injection {name}"
        for what in ("activations", "weights", "both"):
            exact, rounded = to_ternary(model, calibration), to_ternary(model, calibration)
            for layer in exact.modules():
                if isinstance(layer, BitLinear):
                    layer.quantised = 0.0
            if what != "both":
                _round_only(rounded, what)
            found[f"{name}: {what} rounded"] = _differences(exact, rounded, data)
            print(name, what, json.dumps(found[f"{name}: {what} rounded"]), flush=True)
    return found


def _round_only(model: LoopedTransformer, what: str) -> None:
    for layer in model.modules():
        if isinstance(layer, BitLinear):

            def forward(x: Tensor, layer: BitLinear = layer) -> Tensor:
                x, weight = layer.norm(x), layer.weight
                if what == "weights":
                    values, scale = ternary(weight)
                    return F.linear(x, values * scale)
                values, scale = int8_by_token(x)
                return F.linear(values * scale, weight)

            layer.forward = forward  # type: ignore[method-assign]


@torch.no_grad()
def _differences(
    exact: LoopedTransformer, rounded: LoopedTransformer, data: TokenData
) -> dict[str, list[float]]:
    """By loop, 1 to 10, means over held-out tokens."""
    names = ("relative_state_error", "kl_nats", "same_top_token", "loss_rise_nats")
    sums = torch.zeros(10, len(names), dtype=torch.float64)
    batches = list(data.val_dataloader())
    for batch in batches:
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        ctx = exact.context(tokens.shape[1], documents=batch["documents"])
        each = zip(*(m.states(tokens, 10, ctx=ctx) for m in (exact, rounded)))
        for loop, (a, b) in enumerate(each):
            p, q = (
                m.head(m.coda_hidden(state, ctx)).log_softmax(-1)
                for m, state in ((exact, a), (rounded, b))
            )
            rise = (p - q).gather(-1, targets[..., None])
            sums[loop] += torch.stack([
                ((a - b).norm(dim=-1) / a.norm(dim=-1)).mean(),
                (p.exp() * (p - q)).sum(-1).mean(),
                (p.argmax(-1) == q.argmax(-1)).float().mean(),
                rise.mean(),
            ]).double()  # fmt: skip
    means = (sums / len(batches)).T.tolist()
    return {name: [round(v, 5) for v in values] for name, values in zip(names, means)}


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
    parts = ("conversions", "compounding", "speed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    report: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "conversions" in flags.parts:
            report["conversions"] = rows_by(conversions(flags.steps, Path(folder)), "name")
        if "compounding" in flags.parts:
            rows = rows_by(compounding(flags.steps, Path(folder)), "name")
            report["compounding"] = [{**row, "steps": flags.steps} for row in rows]
    if "speed" in flags.parts:
        report["speed"] = [flat(speed(flags.rounds))]
    earlier = rows_so_far(results_file("ternary.run"))
    rows = [row for row in earlier if row["part"] not in report]
    rows += [{"part": part, **row} for part, found in report.items() for row in found]
    write("ternary.run", __doc__.splitlines()[0], rows)


if __name__ == "__main__":
    main()

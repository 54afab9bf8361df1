"""How fast a converted model decodes, beside transformers and llama.cpp with the same weights.

    looptx convert --from-gguf SmolLM2-135M-Instruct.Q4_1.gguf --core auto --out smol
    python -m benchmarks.retrofit.decoding --base smol --llama-bench llama.cpp/build/bin/llama-bench

One loop, batch 1, greedy; the time is of the tokens after the first. looptx (float32, bf16, int8),
transformers (float32, bf16) and llama.cpp (F32, BF16, Q8_0) take turns within each round, with one
and with two threads; ratios are medians over rounds, so that a busy moment meets all sides. All
weights are those of --base: it is written as GGUF, from which transformers reads it, too.

llama-bench is built by `cmake -B build -DLLAMA_CURL=OFF && cmake --build build -t llama-bench` in
llama.cpp's folder; without --llama-bench that side is left out. --check only tries everything.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.decoding import Run, by_engine, by_transformers, measure, summary
from benchmarks.common.record import finish, rows_by
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.conversion.gguf_export import file_name, gguf_stack, write_gguf
from looptx_core.conversion.gguf_file import GGUF
from looptx_core.data.sample import sample_text
from looptx_core.generation.engine import Engine

KINDS = {"float32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""GGUF's types of the matrices, by looptx's `precision`."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def as_gguf(base: LoadedModel, kind: str, folder: Path) -> Path:
    """The model's first loop as a file, with matrices of this kind."""
    stack, out = gguf_stack(base, 1), folder / kind
    tokens = sample_text(base.tokenizer, 16)[:1]
    exact = kind == "F32"
    write_gguf(out, base, base.model, stack, lambda _: {}, kind=kind, exact=exact, tokens=tokens)
    return out / file_name(base, kind)


def llama_bench(program: Path, file: Path, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """What it says of so many new tokens after a prompt."""
    command = [str(program.resolve()), "-m", str(file), "-t", str(threads), "-p", "0", "-n", str(new),
               "-d", str(prompt), "-r", "1", "-ngl", "0", "-o", "json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any]
    [found] = json.loads(done.stdout)
    assert (found["n_gen"], found["n_depth"], found["n_threads"]) == (new, prompt, threads)
    return found


def by_llama_bench(program: Path, file: Path, threads: int, prompt: int, new: int) -> Run:
    """llama.cpp on a file; after the first token, as the other sides."""
    return lambda: (new - 1) / llama_bench(program, file, threads, prompt, new - 1)["avg_ts"]


def sides(
    args: argparse.Namespace, base: LoadedModel, files: dict[str, Path], weights: str, threads: int
) -> dict[str, Run]:
    """Those that run this kind of weights, with torch set to so many threads."""
    torch.set_num_threads(threads)
    prompt = sample_text(base.tokenizer, args.prompt)[0].tolist()
    engine = Engine(base.model, base.tokenizer, precision=weights)
    runs = {"looptx": by_engine(engine, prompt, 1, args.new)}
    if weights in DTYPES:
        model = GGUF(files["float32"]).in_transformers().to(DTYPES[weights])
        runs["transformers"] = by_transformers(model, prompt, args.new)
    if args.llama_bench:
        runs["llama.cpp"] = by_llama_bench(
            args.llama_bench, files[weights], threads, len(prompt), args.new
        )
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="A converted model.")
    parser.add_argument("--llama-bench", type=Path, help="The program.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--prompt", type=int, default=32, help="Tokens.")
    parser.add_argument("--new", type=int, default=96, help="Tokens.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="One short round, and no record.")
    args = parser.parse_args()
    if args.check:
        args.new, args.rounds = 8, 1
    base = load_model(args.base, dtype=torch.float32)
    found: dict[int, dict[str, Any]] = {threads: {} for threads in args.threads}
    with tempfile.TemporaryDirectory() as scratch:
        kinds = {"float32": "F32"} | {weights: KINDS[weights] for weights in args.weights}
        files = {weights: as_gguf(base, kind, Path(scratch)) for weights, kind in kinds.items()}
        build = "none"
        if args.llama_bench:
            said = llama_bench(args.llama_bench, files["float32"], 1, 1, 1)
            build = f"{said['build_number']} ({said['build_commit']})"
        gc.collect()
        for threads in args.threads:
            for weights in args.weights:
                runs = sides(args, base, files, weights, threads)
                row = summary(measure(runs, args.rounds, args.new))
                del runs
                gc.collect()
                shown = json.dumps({key: row[key] for key in ("tokens_per_second", "ratio_to")})
                print(f"{threads} threads, {weights}: {shown}", flush=True)
                found[threads][weights] = row
    return finish(
        "retrofit.decoding",
        f"tokens per second after the first, prompt {args.prompt}, {args.new} new, batch 1",
        rows_by(found, "threads", "weights"), args.check, rounds=args.rounds,
        llama_cpp=build,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())

"""What is compared: each function runs commands of one side and gives named records.

A record is a flat dict of fields: strings, numbers, and lists of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side import Server, Side

Record = dict[str, Any]
Records = dict[str, Record]

HOPS = "map bf da ee fe cd hh gh aa:"
PROSE = "Call me"
PROMPTS = (
    PROSE,
    HOPS,
    "The whale",
    "It was a dark night, and the ship\u2019s captain",
    "map ab ba:",
)
MODEL = {
    "vocab_size": 400, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 128,
    "prelude_layers": 1, "core_layers": 1, "coda_layers": 1, "max_loops": 4,
}  # fmt: skip
TRAIN = (
    "train", "--data", "shards", "--config", "model.json", "--steps", "20", "--seq-len", "32",
    "--batch-size", "8", "--val-every", "20", "--val-batches", "1", "--log-every", "1",
    "--precision", "float32", "--json", "--quiet",
)  # fmt: skip
GREEDY = ("--temperature", "0", "--json", "--quiet", "--max-new-tokens")

# Logits of an exported model, opened by transformers alone; its path and token ids are arguments.
OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.inference_mode():
    depths = {"default": {}, "one loop": {"loops": 1}, "three loops": {"loops": 3}}
    found = {name: model(ids, **depth).logits[0] for name, depth in depths.items()}
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
record = {f"{name}, logits": logits[-1].tolist() for name, logits in found.items()}
record |= {f"{name}, means": logits.mean(-1).tolist() for name, logits in found.items()}
print(json.dumps({**record, "tokens": tokens}))
"""

# Two float64 sums of each tensor, which no change of its numbers leaves as they were.
SUMS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
found = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    found |= load_file(file)
sums = []
for name in sorted(found):
    flat = found[name].double().flatten()
    sums += [flat.sum().item(), (flat * torch.arange(len(flat)).cos()).sum().item()]
print(json.dumps({"weight names": sorted(found), "weights": sums}))
"""


def prepare(side: Side, sources: Path) -> None:
    """The inputs, the same bytes for both sides; shards are each side's own."""
    side.folder.mkdir(parents=True, exist_ok=True)
    text = (sources / "looptx_core/assets/moby-dick.txt").read_bytes()[:100_000]
    (side.folder / "text.txt").write_bytes(text)
    (side.folder / "model.json").write_text(json.dumps({"model": MODEL}))
    (side.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    picture = (sources / "examples/cat.png").read_bytes()
    (side.folder / "cat.png").write_bytes(picture)
    pairs = []
    for number in range(8):  # one picture under eight names: a split needs several groups
        (side.folder / f"cat{number}.png").write_bytes(picture)
        pairs.append({"image": f"cat{number}.png", "text": f"cat number {number}"})
    (side.folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    questions = [{"prompt": f"What is {n}?", "response": f"{n} and {n + 1}"} for n in range(40)]
    (side.folder / "qa.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def of_generation(output: str) -> Record:
    """Tokens, loops and confidences of a `generate --json`; several results are joined."""
    document = json.loads(output)
    results = document.get("results", [document])
    tokens = [token for result in results for token in result["tokens"]]
    return {
        "text": [result["text"] for result in results],
        "finish": [result["finish_reason"] for result in results],
        **{key: [token[key] for token in tokens] for key in ("id", "loops")},
        **{key: [token[key] for token in tokens] for key in ("confidence", "logprob")},
    }


def of_training(side: Side, output: str, run: str, part: str = "") -> Record:
    """Losses of a run's log, the summary's figures and the weights."""
    lines = [json.loads(line) for line in output.splitlines()]
    summary = lines[-1]["summary"]
    log_file = side.folder / run / "metrics.jsonl"
    log = [json.loads(line) for line in log_file.read_text("utf-8").splitlines()]
    keys = ("train_loss", "mean_loops", "gradient_norm", "confidence_error", "lr", "flops")
    record = {key: [line[key] for line in log if key in line] for key in keys}
    record["val_loss"] = [x for line in log for x in line.get("val_loss_by_loop", [])]
    for key in (
        "loss_by_loop",
        "accuracy_by_loop",
        "caption_loss_by_loop",
        "temperature",
        "ece",
        "verdict",
    ):
        if summary.get(key) is not None:
            record[key] = summary[key]
    return record | json.loads(side.python(SUMS, f"{run}/final{part}"))


def tokenized(side: Side) -> Records:
    out = side.command("tokenize", "text.txt", "--vocab-size", "400", "--out", "shards", "--json",
                       "--quiet")  # fmt: skip
    document = json.loads(out)
    return {"tokenize": {key: document[key] for key in ("documents", "bytes", "tokens")}}


def generated(side: Side) -> Records:
    """Both bundled models, through every back end and every way to decode."""
    ways: dict[str, tuple[str, ...]] = {}
    bundled = "looptx_core/assets/model"
    pictured = "looptx_core/assets/picture-model"
    for kernel in ("torch", "native"):
        on = ("--kernel", kernel)
        rounded = ("int8",) if kernel == "native" else ()
        for precision in ("float32", "bf16", *rounded):
            kind = f"{kernel} {precision}"
            both = (*on, "--precision", precision)
            ways[f"hops, {kind}"] = (HOPS, *both, *GREEDY, "12")
            ways[f"prose, {kind}"] = (PROSE, *both, *GREEDY, "32")
            ways[f"picture, {kind}"] = ("--image", "cat.png", *both, *GREEDY, "12")
        ways[f"batch, {kernel}"] = ("--prompts-file", "prompts.txt", *on, *GREEDY, "16")
        ways[f"batch, fixed depth, {kernel}"] = (
            "--prompts-file", "prompts.txt", "--loops", "3", *on, *GREEDY, "16")  # fmt: skip
        ways[f"speculation, {kernel}"] = (PROSE, "--speculate", "4", *on, *GREEDY, "24")
        ways[f"speculation, sampled, {kernel}"] = (
            PROSE, "--speculate", "3", *on, *GREEDY, "24", "--temperature", "0.8")  # fmt: skip
        for kv in ("int8", "int4"):
            ways[f"cache {kv}, {kernel}"] = (PROSE, "--kv-type", kv, *on, *GREEDY, "24")
        ways[f"cache last, {kernel}"] = (PROSE, "--kv-policy", "last", *on, *GREEDY, "24")
        for rule in ("confidence", "gain", "kl", "entropy", "maxprob"):
            ways[f"exit {rule}, {kernel}"] = (PROSE, "--exit", rule, *on, *GREEDY, "24")
        ways[f"bounds, {kernel}"] = (
            PROSE, "--min-loops", "2", "--max-loops", "6", "--prompt-loops", "5", *on, *GREEDY,
            "24")  # fmt: skip
        ways[f"sampled, {kernel}"] = (
            PROSE, *on, *GREEDY, "24", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.9",
            "--min-p", "0.02", "--repetition-penalty", "1.1", "--seed", "7")  # fmt: skip
    records = {}
    with Server(side) as server:
        for name, arguments in ways.items():
            model = str(side.tree / (pictured if "--image" in arguments else bundled))
            out, _ = server.run("generate", *arguments, "--model", model)
            records[f"generate: {name}"] = of_generation(out)
    return records


def trained(side: Side) -> Records:
    """A run of 20 steps, an interrupted one that goes on, and what is made of the first."""
    out = side.command(*TRAIN, "--out", "run")
    records = {"train": of_training(side, out, "run")}
    side.interrupted(*TRAIN, "--save-every", "6", "--out", "stopped", step=8)
    out = side.command("train", "--resume", "stopped", "--json", "--quiet")
    records["train: resumed"] = of_training(side, out, "stopped")
    model = ("--model", "run/final")
    with Server(side) as server:
        server.run("convert", "--to-hf", *model, "--out", "hf", "--json", "--quiet")
        out, _ = server.run("convert", "--to-bitnet", "--direct", *model, "--data", "shards",
                            "--out", "ternary", "--json", "--quiet")  # fmt: skip
        document = json.loads(out)
        keys = ("bytes_before", "bytes_after", "bits_per_weight", "loss_before", "loss_after")
        records["convert: ternary"] = {key: document[key] for key in keys}
        for kernel in ("torch", "native"):
            out, _ = server.run("generate", PROSE, *GREEDY, "16", "--kernel", kernel,
                                "--model", "ternary")  # fmt: skip
            records[f"generate: ternary, {kernel}"] = of_generation(out)
        out, _ = server.run("inspect-loops", "--model", "run", "--out", "report", "--json",
                            "--quiet")  # fmt: skip
        records["inspect-loops"] = _report(json.loads(out))
    records["export: trained"] = json.loads(side.python(OPEN, "hf", "[5, 7, 30, 200, 9]"))
    return records


def _report(document: dict[str, Any]) -> Record:
    points = document["frontier"]
    return {
        **{key: document[key] for key in ("bits_per_byte_by_loop", "accuracy_by_loop", "ece",
                                          "auroc")},
        **{f"frontier {key}": [point[key] for point in points]
           for key in ("rule", "threshold", "mean_loops", "loss")},
    }  # fmt: skip


def exported(side: Side) -> Records:
    bundled = str(side.tree / "looptx_core/assets/model")
    side.command("convert", "--to-hf", "--model", bundled, "--out", "hf-bundled", "--json",
                 "--quiet")  # fmt: skip
    out = side.python(OPEN, "hf-bundled", "[27, 322, 351, 348, 373]")
    return {"export: bundled": json.loads(out)}


def _run(name: str, *more: str) -> Callable[[Side], Records]:
    def train(side: Side) -> Records:
        run = name.replace(" ", "-")
        out = side.command(*TRAIN, *more, "--out", run)
        return {f"train: {name}": of_training(side, out, run)}

    return train


def finetuned(side: Side) -> Records:
    bundled = str(side.tree / "looptx_core/assets/model")
    out = side.command(
        "finetune", "--lora", "--data", "qa.jsonl", "--model", bundled, "--steps", "20",
        "--seq-len", "48", "--batch-size", "4", "--log-every", "1", "--val-every", "20",
        "--val-batches", "1", "--precision", "float32", "--out", "lora", "--json",
        "--quiet")  # fmt: skip
    return {"finetune: lora": of_training(side, out, "lora")}


GROUPS: dict[str, Callable[[Side], Records]] = {
    "tokenize": tokenized,
    "generate": generated,
    "train": trained,
    "export": exported,
    "bitnet": _run("bitnet", "--bitnet"),
    "pictures": _run(
        "pictures", "--data", "pairs.jsonl", "--seq-len", "96", "--mask-patches", "0.25"
    ),
    "adamw": _run(
        "adamw", "--optimizer", "adamw", "--loop-schedule", "sampled", "--loss-at", "all"
    ),
    "lora": finetuned,
    "zero3": _run("zero3", "--zero3", "--offload", "none", "--optimizer", "adamw"),
}
"""In the order they run; `train`, `pictures` and the like need `tokenize`'s shards."""


def difference(old: Any, new: Any) -> float:
    """The largest difference of two fields: 0 for equal ones, infinite for other texts, lengths
    or missing fields."""
    if old == new:
        return 0.0
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return math.inf
        return max(map(difference, old, new), default=0.0)
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    if not numbers:
        return math.inf
    if math.isnan(old) and math.isnan(new):
        return 0.0
    return abs(old - new) if math.isfinite(old) and math.isfinite(new) else math.inf

# ruff: noqa: E501
"""A case of the fuzz run: which inputs are spoilt, how, and which command reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability import mutations

SHORT = "--max-new-tokens 3 --kernel torch"


@dataclass(frozen=True)
class Area:
    """Inputs of one kind. needs: what the command reads beside the one that is spoilt."""

    share: int
    spoilt: tuple[str, ...]
    commands: tuple[str, ...]
    """`{}` stands for the spoilt input."""
    needs: tuple[str, ...] = ()


AREAS = {
    "model folders": Area(5, ("run/final", "ternary", "seeing/final"), (
        f"generate a --model {{}} {SHORT}", f"generate a --model {{}} {SHORT} --json --loops 2",
        "generate a --model {} --max-new-tokens 3", f"generate a --model {{}} {SHORT} --chat",
        f"generate --model {{}} --image pictures/cat.png {SHORT}",
        f"generate a --model {{}} {SHORT} --speculate 2 --kv-type int8",
        "convert --model {} --to-hf --data text.txt --out new",
        "convert --model {} --dtype bf16 --data text.txt --out new",
        "convert --model {} --to-bitnet --direct --data shards --out new --json",
        "inspect-loops --model {} --data text.txt --val-batches 1 --batch-size 2 --seq-len 16 "
        "--decode-tokens 0 --out new", "finetune --model {} --data questions.jsonl --lora --steps 1 "
        "--batch-size 1 --seq-len 64 --precision float32 --out new",
    ), ("shards", "text.txt", "questions.jsonl", "pictures")),
    "shards": Area(3, ("shards",), (
        "train --config train.yaml --data {} --steps 1 --out new",
        "train --config train.yaml --data {} --dry-run", "tokenize text.txt --tokenizer {} --out new",
        "inspect-loops --model run --data {} --val-batches 1 --batch-size 2 --seq-len 16 "
        "--decode-tokens 0 --out new",
    ), ("train.yaml", "text.txt", "run")),
    "run folders": Area(4, ("run", "tuned"), (
        "train --resume {} --steps 5", "train --resume {}", "finetune --resume {} --steps 3",
        "runs .", "runs . --json", "compare {} {}", "compare {} {} --json",
        "compare {} {} --format latex", f"generate a --model {{}} {SHORT}",
    ), ("shards", "questions.jsonl")),
    "corpora": Area(4, ("text.txt", "lines.jsonl", "text.parquet", "array.json", "table.csv"), (
        "tokenize {} --vocab-size 300 --out new", "tokenize {} --vocab-size 300 --out new --json",
        "train --config train.yaml --data {} --steps 1 --out new",
    ), ("train.yaml",)),
    "records": Area(4, ("questions.jsonl", "chats.jsonl", "questions.parquet", "table.csv",
                        "array.json", "pairs.jsonl"), (
        "finetune --model seeing --data {} --lora --steps 1 --batch-size 1 --seq-len 64 "
        "--precision float32 --out new",
        "finetune --model seeing --data {} --lora --steps 1 --batch-size 1 --seq-len 64 "
        "--precision float32 --skip-bad --too-long drop --out new",
    ), ("seeing", "pictures")),
    "pictures": Area(3, ("pictures",), (
        f"generate --model seeing --image {{}} {SHORT} --json", f"generate --image {{}} {SHORT}",
        "finetune --model seeing --data pairs.jsonl --steps 1 --batch-size 1 --seq-len 64 "
        "--precision float32 --skip-bad --out new",
    ), ("seeing", "pairs.jsonl")),
    "adapters": Area(3, ("tuned/final",), (
        f"generate a --adapter {{}} --model run {SHORT}",
        f"generate a --adapter {{}} --model run {SHORT} --json --loops 2",
        "convert --adapter {} --model run --merge-adapter --data text.txt --out new",
        f"generate a --model {{}} {SHORT}",
    ), ("run", "text.txt")),
    "Hugging Face folders": Area(3, ("hf", "llama"), ("convert --from-hf {} --data text.txt --out new",
                                                       "convert --from-hf {} --data text.txt --out new --json"),
        ("text.txt",)),
    "YAML": Area(3, ("train.yaml", "generate.yaml"), (
        "train --config {} --data shards --dry-run", "train --config {} --data shards --dry-run --json",
        f"generate a --model run --config {{}} {SHORT}", "tokenize text.txt --config {} --out new",
    ), ("shards", "run", "text.txt")),
    "DeepSpeed JSON": Area(1, ("ds.json",), (
        "train --config train.yaml --data shards --zero3 --deepspeed-config {} --dry-run",
    ), ("train.yaml", "shards")),
    "prompt files": Area(2, ("prompts.txt", "prompts.jsonl"), (
        f"generate --model run --prompts-file {{}} {SHORT}",
        f"generate --model run --prompts-file {{}} {SHORT} --json",
    ), ("run",)),
    "sounds": Area(3, ("sounds",), (
        f"generate --model sensing --audio {{}} {SHORT} --json",
        f"generate --model sensing --audio {{}} {SHORT} --timestamps",
        "train --config train.yaml --data one.jsonl --steps 1 --seq-len 48 --out new "
        "--set model.audio.layers=1 --set model.audio.width=32",
    ), ("sensing", "train.yaml")),
    "clips": Area(2, ("clips",), (
        f"generate --model sensing --video {{}} {SHORT} --json",
        "finetune --model sensing --data one.jsonl --steps 1 --batch-size 1 --seq-len 64 "
        "--precision float32 --skip-bad --out new",
    ), ("sensing",)),
    "media records": Area(2, ("sounds.jsonl", "clips.jsonl"), (
        "train --config train.yaml --data {} --steps 1 --seq-len 48 --out new "
        "--set model.audio.layers=1 --set model.audio.width=32 --set model.vision_layers=1 "
        "--set model.patch_size=8 --set model.max_patches=16 --set model.video.frames=4",
        "finetune --model sensing --data {} --steps 1 --batch-size 1 --seq-len 64 "
        "--precision float32 --out new",
    ), ("sensing", "train.yaml", "sounds", "clips")),
    "models that hear and watch": Area(1, ("sensing/final",), (
        f"generate --model {{}} --audio sounds/0.wav {SHORT}",
        f"generate --model {{}} --video clips/0.webp {SHORT} --json",
    ), ("sounds", "clips")),
    "GGUF": Area(3, ("llama.gguf",), (
        "convert --from-gguf {} --data text.txt --out new",
        "convert --from-gguf {} --core 0:1 --data text.txt --out new --json",
    ), ("text.txt",)),
    "evaluation tasks": Area(3, ("tasks",), (
        "evaluate --model run --include-path {} --loops 1,auto --limit 3",
        "evaluate --model run --include-path {} --tasks choice --loops 1 --limit 3 --json",
        "evaluate --model run --include-path {} --tasks answer,passage --loops 1 --limit 3",
    ), ("run",)),
    "options": Area(4, (), ()),
}  # fmt: skip
_WORDS = (
    "", "a", "0", "1", "2", "-1", "3", "0.5", "-0.5", "1e-9", "1e308", "nan", "inf", "-inf", "1e999",
    "99999999999999999999", "9223372036854775807", "2147483648", "none", "auto", "true", "[]", "{}",
    "../x", "/dev/null", "/etc/passwd", "gone", "run", "shards", "pictures/cat.png", "text.txt", ".",
    "\x1b[31m", "[red]", "é", "\udcff", "x" * 5000, "1:1", "1:0", "a=b", "model.d_model=0",
    "model.max_loops=99999999", "model=1", "=", "steps=nan", "(", "*", "hf:", "-", "--", "~", "\n",
)  # fmt: skip
_BASES = {
    "train": "train --config train.yaml --data shards --out new",
    "finetune": "finetune --model run --data questions.jsonl --steps 1 --out new --seq-len 64",
    "generate": f"generate a --model run {SHORT}",
    "convert": "convert --model run --to-hf --out new",
    "tokenize": "tokenize text.txt --vocab-size 300 --out new",
    "inspect-loops": "inspect-loops --model run --data text.txt --seq-len 16 --out new",
    "runs": "runs .",
    "compare": "compare run run",
    "evaluate": "evaluate --model run --tasks text --loops 1",
}
_ENDS = {  # what keeps a command short, whatever was drawn
    "train": "--dry-run",
    "finetune": "--steps 1 --batch-size 1 --max-minutes 0.05",
    "convert": "--data text.txt --direct --max-minutes 0.02",
    "generate": "--max-new-tokens 3 --speculate 0",
    "evaluate": "--tasks text --limit 2",
    "inspect-loops": "--val-batches 1 --batch-size 2 --decode-tokens 0 --max-new-tokens 2",
}
_FILES_OF = {
    "pictures": ("image", "pairs.jsonl"), "sounds": ("audio", "one.jsonl"),
    "clips": ("video", "one.jsonl"),
}  # fmt: skip
# They ask for much by right, or for other machines.
_LEFT_OUT = {"--compile", "--devices", "--nodes", "--workers", "--debug", "--help", "--from-hf"}


@dataclass(frozen=True)
class Case:
    """What to run in a folder that holds its inputs."""

    area: str
    what: str
    arguments: list[str]
    stdin: bytes = b""


def make(
    seed: int, number: int, sound: Path, folder: Path, areas: Mapping[str, Area] = AREAS
) -> Case:
    """Put the inputs of case `number` into an empty folder. The same numbers, the same case."""
    rng = random.Random(f"{seed}/{number}")
    area = rng.choices(list(areas), [a.share for a in areas.values()])[0]
    if area == "options":
        return _options(rng, sound, folder)
    chosen = areas[area]
    source = rng.choice(chosen.spoilt)
    command = rng.choice(chosen.commands)
    for name in (*chosen.needs, source):
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            mutations.copy(sound / name, target)
    spoilt = folder / source
    if spoilt.is_dir():
        files = sorted(file for file in spoilt.rglob("*") if file.is_file())
        # A run's own small files before the model within.
        files = [f for f in files if f.suffix not in (".md", ".py", ".png") or f.parent == spoilt]
        picked = rng.choice(files)
    else:
        picked = spoilt
    what = f"{picked.relative_to(folder)}: {mutations.file(rng, picked)}"
    if spoilt.name in _FILES_OF:  # the command is given the file, or records of it
        source = str(picked.relative_to(folder))
        key, records = _FILES_OF[spoilt.name]
        (folder / records).write_text(
            "".join(json.dumps({key: source, "text": f"cat {n}"}) + "\n" for n in range(8))
        )
    if area == "run folders" and "--steps" in command:
        _unfinished(rng, spoilt)
    return Case(area, what, command.replace("{}", source).split())


def _unfinished(rng: random.Random, run: Path) -> None:
    """Half of the time as a run that was killed."""
    facts = run / "run.json"
    if rng.random() < 0.5 and facts.is_file() and not facts.is_symlink():
        try:
            content = json.loads(facts.read_bytes())
            content.pop("finished", None)
            facts.write_bytes(mutations.written(content))
        except (ValueError, AttributeError, RecursionError):
            pass


def _options(rng: random.Random, sound: Path, folder: Path) -> Case:
    """A command with some flags and values that nobody would type, or in the environment."""
    from looptx_cli.main import load_command

    for name in ("run", "shards", "train.yaml", "questions.jsonl", "text.txt", "pictures"):
        mutations.copy(sound / name, folder / name)
    name = rng.choice(list(_BASES))
    flags = [p for p in load_command(name).params if p.opts[0] not in _LEFT_OUT]
    drawn: list[str] = []
    for param in rng.sample(flags, min(len(flags), rng.choice((1, 1, 2, 4)))):
        if param.opts[0].startswith("--"):
            drawn.append(rng.choice([*param.opts, *param.secondary_opts]))
        if not getattr(param, "is_flag", False):
            drawn.append(rng.choice(_WORDS))
    arguments = _BASES[name].split() + drawn + _ENDS.get(name, "").split()
    if rng.random() < 0.2:
        rng.shuffle(arguments)
        arguments = [name, *(a for a in arguments if a != name), *_ENDS.get(name, "").split()]
    stdin = rng.choice((b"", b"a\n", b"\xff\xfe", b"\0" * 100, b"x" * 100_000))
    return Case("options", " ".join(drawn)[:200], arguments, stdin)

"""What must not drift: import order, no pickles, the set of flags."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from looptx_cli.main import COMMANDS, load_command

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for name in ("looptx_core", "looptx_cli") for p in (ROOT / name).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# The flags of each command, in the order of its code. A flag is an interface: scripts break when
# one goes. Changed on purpose? Paste what the failing test prints.
OPTIONS = {
    "sweep": """
        --out --dry-run --json --quiet
    """,
    "inspect-loops": """
        --data --out --seq-len --batch-size --val-batches --max-loops --calibrate --no-calibrate
        --target-loss-increase --text --prompt --image --audio --video --max-new-tokens
        --decode-tokens --seed --model --config --overwrite --json --quiet
    """,
    "evaluate": """
        --tasks --loops --limit --include-path --out --batch-size --exit --threshold --model
        --adapter --config --overwrite --json --quiet
    """,
    "tokenize": """
        --data --out --vocab-size --tokenizer --val-fraction --text-key --seed --codec --steps
        --max-minutes --batch-size --lr --set --config --overwrite --json --quiet
    """,
    "finetune": """
        --data --out --seed --steps --epochs --max-minutes --seq-len --batch-size --micro-batch
        --workers --augment --no-augment --skip-bad --no-skip-bad --lr --lr-schedule --min-lr
        --warmup --lr-decay --weight-decay --optimizer --beta2 --clip --loop-schedule --loops
        --max-loops --mean-loops --grow-share --deeper-by --loss-threshold --deeper-share --explore
        --loss-at --loss-prior --teacher --teacher-weight --control --no-control --precision
        --attention --compile --no-compile --grad-checkpointing --no-grad-checkpointing --devices
        --nodes --strategy --zero3 --no-zero3 --offload --nvme-path --deepspeed-config --save-every
        --keep --keep-best --no-keep-best --val-every --val-batches --eval-every --eval-tasks
        --eval-limit --log-every --log --profile --model --lora --no-lora --qlora --no-qlora
        --quantization --dora --no-dora --lora-per-loop --no-lora-per-loop --lora-layers --lora-rank
        --lora-alpha --lora-dropout --rslora --no-rslora --target-modules --columns
        --train-on-prompt --no-train-on-prompt --too-long --val-fraction --config --resume
        --overwrite --dry-run --json --quiet
    """,
    "generate": """
        --max-new-tokens --loops --exit --threshold --min-loops --max-loops --prompt-loops
        --kv-policy --kv-type --speculate --draft-loops --temperature --top-k --top-p --min-p
        --repetition-penalty --seed --stop --guidance --draw-steps --draw-guidance --ignore-eos
        --no-ignore-eos --prompts-file --prompt-file --model --adapter --image --audio --video --fps
        --every --chat --draw --speak --timestamps --show-iterations --compare-loops --attention
        --precision --kernel --config --json --quiet
    """,
    "convert": """
        --model --from-hf --from-gguf --core --max-loops --injection --out --to-bitnet
        --no-to-bitnet --direct --no-direct --finetune-steps --max-minutes --lr --data --seed
        --memory --memory-window --memory-block --adapter --merge-adapter --no-merge-adapter --to-hf
        --no-to-hf --to-onnx --no-to-onnx --to-gguf --no-to-gguf --loops --dtype --shard-size
        --config --overwrite --dry-run --json --quiet
    """,
    "doctor": """
        --build --path --json --quiet
    """,
    "chat": """
        --max-new-tokens --loops --exit --threshold --min-loops --max-loops --prompt-loops
        --kv-policy --kv-type --speculate --draft-loops --temperature --top-k --top-p --min-p
        --repetition-penalty --seed --stop --guidance --draw-steps --draw-guidance --ignore-eos
        --no-ignore-eos --model --adapter --image --audio --video --system --show-iterations
        --attention --precision --kernel --config --quiet
    """,
    "serve": """
        --host --port --api-key --max-batch --max-queue --max-context --request-timeout
        --drain-seconds --model --adapter --attention --precision --kernel --config --quiet
    """,
    "compare": """
        --format --out --overwrite --json --quiet
    """,
    "push": """
        --private --message --json --quiet
    """,
    "runs": """
        --json --quiet
    """,
    "train": """
        --data --out --seed --steps --epochs --max-minutes --seq-len --batch-size --micro-batch
        --workers --augment --no-augment --skip-bad --no-skip-bad --lr --lr-schedule --min-lr
        --warmup --lr-decay --weight-decay --optimizer --beta2 --clip --loop-schedule --loops
        --max-loops --mean-loops --grow-share --deeper-by --loss-threshold --deeper-share --explore
        --loss-at --loss-prior --teacher --teacher-weight --control --no-control --precision
        --attention --compile --no-compile --grad-checkpointing --no-grad-checkpointing --devices
        --nodes --strategy --zero3 --no-zero3 --offload --nvme-path --deepspeed-config --save-every
        --keep --keep-best --no-keep-best --val-every --val-batches --eval-every --eval-tasks
        --eval-limit --log-every --log --profile --preset --init --document-mask --no-document-mask
        --mix --codec --direction --mask-patches --bitnet --no-bitnet --set --config --memory
        --resume --overwrite --dry-run --force --json --quiet
    """,
}


def test_imports_go_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_is_read(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    imported = {name.split(".")[0] for name in _imports(tree)}
    assert not imported & UNPICKLERS
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        match ast.unparse(call.func):
            case "torch.load":
                assert options.get("weights_only") is True, f"line {call.lineno}"
            case "np.load" | "numpy.load":
                assert not options.get("allow_pickle"), f"line {call.lineno}"


COMMAND = re.compile(
    r"""(looptx (?:[a-z-]+|{})(?: "[^"]*")?|pip install(?: '[^']*')?)"""
    r"""(?: --[a-z-]+(?: [^\s-]\S*)?)+"""
)
FLAGS = {
    ("config/resolve.py", "--set"): "the origin of a value, as the command line gave it",
    ("inspection/browser.py", "--c"): "a variable of a style sheet",
    ("inspection/browser.py", "--d"): "a variable of a style sheet",
    ("machine/compiler.py", "--version"): "an option of C++ compilers",
}
"""The flags that looptx_core spells outside whole commands, and why."""


def test_the_library_speaks_of_parameters_not_flags() -> None:
    core, found = ROOT / "looptx_core", set()
    for path in core.rglob("*.py"):
        for text in _texts(ast.parse(path.read_text("utf-8"))):
            loose = re.findall(r"--[a-z][a-z0-9-]*", COMMAND.sub("", text))
            found |= {(path.relative_to(core).as_posix(), flag) for flag in loose}
    assert found == FLAGS.keys()


def test_what_counts_as_a_whole_command() -> None:
    for text in (
        "looptx train --resume",
        'run looptx generate "Call me" --model {} --show-iterations.',
        "go on with looptx {} --resume {}",
        "pip install 'looptx[flash]' --no-build-isolation",
    ):
        assert "--" not in COMMAND.sub("", text)
    for text in ("pass --lr", "looptx train stops; pass --lr", "looptx train takes no --lr"):
        assert "--lr" in COMMAND.sub("", text)


def _texts(node: ast.AST) -> Iterator[str]:
    """All string literals; an f-string is one, with {} where it takes a value."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
            parts = [p for p in parts if not isinstance(p, ast.Constant)]
            yield from (text for part in parts for text in _texts(part))
        case _:
            yield from (text for child in ast.iter_child_nodes(node) for text in _texts(child))


NAME_IMAGES = {
    "config/corpus.py": "the flag --codec, with the kinds of codecs",
    "config/generation.py": "the help of the flags of drawing",
    "config/inspection.py": "the flag --image",
    "config/media.py": "the keys of clips, whose frames are cut into patches",
    "config/model.py": "the keys of config.json, which are flat for images",
    "config/ranges.py": "the range of --mask-patches",
    "config/run.py": "the flags --mix, --mask-patches and --augment, and their messages",
    "data/records.py": "the grammar of records, with its first medium as the example",
    "data/tokenizer.py": "the special token <|image|>, whose id is fixed for good",
    "inspection/page.py": "a page holds its figures as data:image/png",
}
"""The files of looptx_core outside media/ that name an image, at most 10, and why."""


def test_images_are_named_in_their_own_folder() -> None:
    core = ROOT / "looptx_core"
    word = re.compile(r"image|pictur|(?<!re)vision|patch(?!er)", re.IGNORECASE)
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    found = set()
    for path in core.rglob("*.py"):
        with path.open("rb") as file:
            tokens = tokenize.tokenize(file.readline)
            if any(token.type in kinds and word.search(token.string) for token in tokens):
                found.add(path.relative_to(core).as_posix())
    # Codecs are made of patches, wherever they are stored, trained and judged.
    outside = {name for name in found if not name.startswith("media/") and "codec" not in name}
    assert outside == NAME_IMAGES.keys() and len(outside) <= 10
    assert any(name.startswith("media/") for name in found)


def test_the_registry_of_media_brings_no_torch() -> None:
    asked = "import sys, looptx_core.media.registry, looptx_core.checkpoint.registry as _; "
    code = asked + "sys.exit(bool({'torch', 'PIL', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_are_these(command: str) -> None:
    parameters = load_command(command).params
    flags = [name for p in parameters for name in p.opts + p.secondary_opts if name[:2] == "--"]
    flags = [flag for flag in flags if flag != "--help"]
    lines = textwrap.fill(" ".join(flags), 100, initial_indent=" " * 8, subsequent_indent=" " * 8,
                          break_on_hyphens=False, break_long_words=False)  # fmt: skip
    assert OPTIONS.get(command, "").split() == flags, f'\n    "{command}": """\n{lines}\n    """,'


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)):
                yield module

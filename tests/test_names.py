"""Names are the field's own, files are short, and the cache's layout has a home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for name in ("looptx_core", "looptx_cli") for p in (ROOT / name).rglob("*.py"))

# What each was, and what the field says.
PRIVATE_WORDS = {
    "Moves": "Backend, Pass", "GraphMoves": "CudaGraphBackend", "NativeMoves": "CpuBackend",
    "Flight": "RunningBatch", "Rider": "ActiveRow", "Landing": "StepOutput", "Ride": "LoopResult",
    "ride": "until_exit", "land": "finish", "turn": "step", "leave": "backfill",
    "leaves": "needs_backfill", "Surroundings": "ForwardContext", "surroundings": "context",
    "Place": "say what it is: a column, an index, a folder", "place": "as Place",
    "Window": "CacheView", "FixedWindow": "FixedCacheView", "Slot": "LayerView",
    "Readout": "ExitSignals", "Readouts": "say what is read", "readouts": "as Readouts",
    "draw": "sample, plot, or reconstruct", "Packed": "VarlenBatch or PackedExamples",
    "PackedBitLinear": "TernaryLinear", "pictures": "images, or figures",
    "stated": "reported_confidence", "told": "reported_confidence", "said": "output",
    "words": "output", "judge": "confidence", "judged": "confidence", "judges": "confidence",
    "look": "check", "looks": "checks", "first_look": "first_check", "next_look": "next_check",
    "bounds": "kernel_thresholds", "Watch": "StopCondition", "SideBySide": "FusedProjection",
    "join": "fuse_projections", "together": "collate, or merge", "Together": "ChainedOptimizer",
    "EndsTogether": "BarrierAtTeardown", "unset_weights": "init_empty_weights",
    "follow": "score_forced", "Followed": "ForcedScores", "Work": "WorkCounters",
    "forget": "truncate", "grow": "advance", "obstacle": "unsupported_reason",
    "Track": "GraphPass", "Spread": "ParallelLayout", "Hold": "MemoryUse", "Need": "MemoryEstimate",
    "Piece": "TensorShard",
}  # fmt: skip
MAX_LINES = 400

# Who knows how keys and values lie in memory.
LAYOUT = {
    "looptx_core/model/layer_state.py": "its home",
    "looptx_core/model/cache.py": "makes one for each layer by default",
    "looptx_core/model/memory_state.py": "a window is one whose columns are a ring",
    "looptx_core/model/loop.py": "a model chooses what its layers remember",
    "looptx_core/backends/cpu/structs.py": "gives the kernel pointers to it, or refuses",
    "looptx_core/backends/cuda_graphs.py": "records it alone, or refuses",
}


def definitions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text("utf-8"))
    return [(node.name, node.lineno) for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_classes_and_functions_have_the_fields_names(path: Path) -> None:
    for name, line in definitions(path):
        word = name.strip("_")
        assert word not in PRIVATE_WORDS, f"line {line}: {name}; say {PRIVATE_WORDS[word]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_the_caches_layout_has_few_homes() -> None:
    knows = {
        str(path.relative_to(ROOT)) for path in SOURCES if "KVState" in path.read_text("utf-8")
    }
    assert knows == LAYOUT.keys()


def test_the_loop_is_written_once() -> None:
    """Everyone iterates the core by `LoopedTransformer.iterate`; other back ends are their own."""
    steps = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "step"
        and "model" in ast.unparse(node.func.value)
    }
    assert steps <= {
        "looptx_core/backends/torch_backend.py",  # rows at different loops
        "looptx_core/backends/cuda_graphs.py",  # one recorded loop
    }

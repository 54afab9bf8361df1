"""The documentation: links lead somewhere, examples fit the code, tutorials run."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from looptx_cli.main import COMMANDS, load_command, main
from looptx_core.config.model import ModelConfig
from looptx_core.config.resolve import resolve
from looptx_core.config.run import TrainConfig
from looptx_core.config.sweep import read_grid

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOK = DOCS / "tutorial/5-python.ipynb"

# The length of what the tutorials run; every setting has such a variable.
SHORT = {
    "LOOPTX_STEPS": "2",
    "LOOPTX_BATCH_SIZE": "2",
    "LOOPTX_SEQ_LEN": "64",
    "LOOPTX_VAL_BATCHES": "1",
    "LOOPTX_VAL_EVERY": "2",
    "LOOPTX_DECODE_TOKENS": "24",
    "LOOPTX_MAX_LOOPS": "2",
    "LOOPTX_MODEL_MAX_LOOPS": "2",
}


def _generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.M | re.S):
            title = re.search(r'title="([^"]+)"', match[2])
            line = text[: match.start()].count("\n") + 1
            found.append(Block(page, line, match[1], title[1] if title else "", match[3]))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each looptx command of a block, without the program's name."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "|" in words:
            words = next(part for part in _pipeline(words) if "looptx" in part)
        if "looptx" in words:
            yield words[words.index("looptx") + 1 :]


def _pipeline(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, "|"]:
        if word == "|":
            yield part
            part = []
        else:
            part.append(word)


def _slug(heading: str) -> str:
    words = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return words.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M)
            assert anchor in map(_slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("block", blocks("", "sh"), ids=str)
def test_commands_have_these_options(block: Block) -> None:
    schemas = _generator().SCHEMAS
    for words in commands(block):
        name, *arguments = words
        assert name in COMMANDS, f"{block}: looptx {name}"
        with load_command(name).make_context(name, arguments) as context:
            given = {key: value for key, value in context.params.items() if value is not None}
        if schema := schemas.get(name):
            keys = {field for field in schema.__dataclass_fields__ if field in given}
            sections = {"model": ModelConfig} if name == "train" else None
            resolve(schema, sections, flags={key: given[key] for key in keys}, env={}).build(schema)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_exist(block: Block, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(block.text)
    assert yaml.safe_load(block.text)
    if "seeds:" in block.text:
        assert read_grid(tmp_path / "my.yaml").cells
        return
    sections = {"model": ModelConfig}
    resolved = resolve(TrainConfig, sections, config=tmp_path / "my.yaml", env={})
    resolved.build(TrainConfig), resolved.build(ModelConfig, "model")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_records_are_json(block: Block) -> None:
    for line in block.text.splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_imports_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if "onnxruntime_genai" in block.text:  # in no extra
        pytest.importorskip("onnxruntime_genai")
    exec(compile(ast.Module(imports, []), str(block), "exec"), {})


def test_the_readme_runs_in_python(short: Path) -> None:
    (block,) = [block for block in blocks("python") if block.page.name == "README.md"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(block.text, str(block), "exec"), {})
    assert len(printed.getvalue().splitlines()) > 8


def test_the_reference_is_fresh() -> None:
    assert _generator().stale_pages() == []


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a little text, where commands are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    for name, value in SHORT.items():
        monkeypatch.setenv(name, value)
    text = (ROOT / "looptx_core/assets/moby-dick.txt").read_text("utf-8")
    Path("corpus").mkdir()
    for number in range(4):
        Path(f"corpus/{number}.txt").write_text(text[number * 20_000 :][:20_000], "utf-8")
    shutil.copy(ROOT / "examples/cat.png", "cat.png")
    return tmp_path


@pytest.mark.parametrize("page", sorted(DOCS.glob("tutorial/*.md")), ids=lambda page: page.stem)
def test_the_tutorial_runs(
    page: Path, short: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem == "4-finetune":  # few of the 4,000 questions are enough to measure
        monkeypatch.setenv("LOOPTX_VAL_FRACTION", "0.02")
    for block in blocks("sh", "json", "yaml"):
        if block.page != page:
            continue
        if block.title:
            Path(block.title).write_text(block.text)
        if block.language != "sh":
            continue
        for words in commands(block):
            words = [part for word in words for part in _globbed(word)]
            assert main(words) == 0, f"{block}\n{capfd.readouterr().err}"


def _globbed(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def test_the_notebook_runs(short: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
            stored = "".join("".join(part["text"]) for part in cell["outputs"])
            assert _lines(printed.getvalue()) == _lines(stored)


def _lines(text: str) -> list[str]:
    """What a machine prints like another: words, but no digits that rounding may turn."""
    return [re.sub(r"[\d.]+", "0", line) for line in text.splitlines()]


def documented(heading: str, page: str = "json") -> set[str]:
    """What the first column names in the first table below a heading of the reference."""
    section = (DOCS / f"reference/{page}.md").read_text("utf-8").split(f"## {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert table
    cells = [row.split("|")[1] for row in table[0].splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`([\w.]+)/?`", cell)}


def test_a_run_has_the_documented_files(short: Path) -> None:
    assert main(shlex.split("train --data corpus --save-every 1 --out runs/a")) == 0
    run = {file.name for file in Path("runs/a").iterdir()}
    of_some = {"kernels.json", "profile", "trackers.json", "control"}
    assert run | of_some == documented("A run", "files")
    optional = {"model.safetensors.index.json", "preprocessor_config.json"}
    model = {file.name for file in Path("runs/a/final").iterdir()}
    assert model == documented("A model folder", "files") - optional


def test_json_has_the_documented_keys(short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def printed(command: str) -> list[dict[str, Any]]:
        assert main(shlex.split(command)) == 0, capfd.readouterr().err
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    def keys(command: str) -> set[str]:
        (document,) = printed(command)
        return document.keys() - {"schema_version"}

    capfd.readouterr()
    assert keys("tokenize corpus --out data --json") == documented("looptx tokenize")
    (document,) = printed('generate "Call me" --max-new-tokens 2 --json')
    assert document.keys() - {"schema_version"} == documented("looptx generate")
    page = (DOCS / "reference/json.md").read_text("utf-8")
    of_token = re.findall(
        r"`(\w+)`", page.split("Of each token:")[1].split("##")[0].split("|\n", 2)[2]
    )
    assert document["tokens"][0].keys() <= set(of_token)

    *records, last = printed("train --data data --out runs/a --json")
    assert {key for record in records for key in record} == documented("metrics.jsonl")
    assert last["summary"].keys() == documented("Summary of train")
    (document,) = printed("runs --json")
    of_run = document["runs"][0].keys()
    assert of_run == documented("looptx runs")
    (document,) = printed("compare runs/a --json")
    assert document["runs"][0].keys() - of_run == documented("looptx compare")
    assert keys("inspect-loops --model runs/a --json") == documented("looptx inspect-loops")
    assert keys("convert --dtype bf16 --model runs/a --json") == documented("looptx convert")
    *_, last = printed("finetune --lora --model runs/a --seq-len 128 --too-long drop --json")
    assert last["summary"].keys() == documented("Summary of finetune")

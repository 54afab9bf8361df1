"""What a newcomer types: the README's commands and the bare ones, from a built wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_commands import Done, Installed

from looptx_core.data.bundled import bundled_questions

ROOT = Path(__file__).parent.parent
# The commands are verbatim; only the run's length is cut, by the documented variables.
SHORT = {
    "LOOPTX_STEPS": "3",
    "LOOPTX_BATCH_SIZE": "4",
    "LOOPTX_VAL_BATCHES": "1",
    "LOOPTX_MAX_NEW_TOKENS": "6",
    "LOOPTX_VAL_EVERY": "3",
    "LOOPTX_DECODE_TOKENS": "48",
    "LOOPTX_LIMIT": "3",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The wheel's content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "capture_output": True, "cwd": ROOT}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    subprocess.run(build, **quiet)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, folder / "site", wheel], **quiet)
    commands = Installed(folder / "site")
    yield commands
    commands.close()


def looptx(command: str, where: Path, installed: Installed, **env: str) -> Done:
    words = shlex.split(command)
    assert words[0] == "looptx"
    arguments = [part for word in words[1:] for part in _glob(word, where)]
    return installed.run(arguments, where, {**SHORT, **env})


def _glob(word: str, where: Path) -> list[str]:
    found = sorted(str(p.relative_to(where)) for p in where.glob(word)) if "*" in word else []
    return found or [word]


def test_the_readme(installed: Installed, tmp_path: Path) -> None:
    text = (ROOT / "looptx_core/assets/moby-dick.txt").read_text("utf-8")
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        part = text[number * 200_000 : (number + 1) * 200_000]
        (tmp_path / f"corpus/{number}.txt").write_text(part, "utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme.split("## Use it")[1].split("```")[1]
    commands = [line for line in section.splitlines() if line.startswith("looptx")]
    assert len(commands) >= 5
    for command in commands:
        done = looptx(command, tmp_path, installed)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "\x1b" not in done.stdout
    document = json.loads(done.stdout)
    assert set(document["tokens"][0]) == {"id", "text", "loops", "confidence", "logprob"}
    assert "".join(token["text"] for token in document["tokens"]) == document["text"]


def test_the_readme_names_real_flags() -> None:
    from looptx_cli.main import COMMANDS, load_command

    known = {"--help"}
    for command in COMMANDS:
        known |= {name for p in load_command(command).params for name in p.opts}
    readme = (ROOT / "README.md").read_text("utf-8")
    assert set(re.findall(r"--[a-z][a-z0-9-]+", readme)) <= known


@pytest.mark.parametrize(
    "command",
    [
        "looptx tokenize",
        "looptx train",
        "looptx finetune --lora --qlora",
        "looptx inspect-loops",
    ],
)
def test_bare_commands(command: str, installed: Installed, tmp_path: Path) -> None:
    done = looptx(command, tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert "try next" in done.stderr and done.stdout
    assert (tmp_path / "runs" / f"{command.split()[1]}-1").is_dir()


def test_bare_generate_takes_the_bundled_model(installed: Installed, tmp_path: Path) -> None:
    done = looptx('looptx generate "Call me"', tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Call me") and len(done.stdout) > len("Call me\n")
    assert "bundled" in done.stderr and "try next" in done.stderr


def test_bare_evaluate_takes_its_own_tasks(installed: Installed, tmp_path: Path) -> None:
    done = looptx("looptx evaluate", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert "bundled" in done.stderr and "try next" in done.stderr
    for task in ("hops", "p_hop", "arithmetic", "continuation", "text"):
        assert re.search(rf"^{task} ", done.stdout, re.M)


def test_bare_serve_answers_until_it_is_ended(installed: Installed, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "looptx_cli.main", "serve"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed.site), "LOOPTX_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        body = json.dumps({"prompt": "Call me", "max_tokens": 3}).encode()
        kind = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address}/v1/completions", body, kind)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            [choice] = json.load(answer)["choices"]
        assert len(choice["looptx"]["loops"]) == 3
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"</script>" in answer.read()
    finally:
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "bundled" in told and f"try next: curl {address}/v1/completions" in told


@pytest.mark.slow
def test_bare_training_that_swaps(installed: Installed, tmp_path: Path) -> None:
    done = looptx("looptx train --zero3 --offload nvme", tmp_path, installed, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"swapped: [1-9]\d+ files of [\d,]{9,} bytes; [\d,]{9,} bytes written", done.stdout
    )
    assert "try next" in done.stderr and not (tmp_path / "runs/train-1/swap").exists()


def test_bare_generate_describes_a_picture(installed: Installed, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/cat.png", tmp_path)
    done = looptx("looptx generate --image cat.png --show-iterations", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert "bundled" in done.stderr and "try next" in done.stderr
    assert "loops a token" in done.stdout


def test_bare_generate_writes_what_is_said(installed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/hello.wav", tmp_path)
    done = looptx("looptx generate --audio hello.wav", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert "bundled" in done.stderr and "try next" in done.stderr
    assert "hello world" in done.stdout


def test_bare_generate_writes_what_happens(installed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/wave.webp", tmp_path)
    done = looptx("looptx generate --video wave.webp --temperature 0", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert "bundled" in done.stderr and "octopus turns left" in done.stdout


EXAMPLES = {
    "own_trainer --batch-size 4": "10 loops:",
    "finetune_lora --data few.jsonl": "Where ends g ->",
    "finetune_qlora --data few.jsonl": "parameters, as the base",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples(example: str, installed: Installed, tmp_path: Path) -> None:
    lines = bundled_questions().read_text("utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:40]), "utf-8")
    name, *flags = example.split()
    script = [str(ROOT / f"examples/{name}.py"), "--steps", "3", *flags]
    done = installed.run(script, tmp_path, {})
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[example] in done.stdout

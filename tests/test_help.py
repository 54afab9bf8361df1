"""The help of each command: flags in panels, the values that are allowed, a light start."""

from __future__ import annotations

import re
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from looptx_cli.main import COMMANDS, load_command, main
from looptx_cli.panels import MOST_USED, NAMES, panel_of
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.run import TrainConfig

pytestmark = pytest.mark.fast

LARGE = ("train", "finetune", "generate", "inspect-loops", "convert", "tokenize")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_a_panel(command: str) -> None:
    loaded = load_command(command)
    flags = [p for p in loaded.params if p.param_type_name == "option"]
    assert {p.name for p in flags if panel_of(command, p.name) not in NAMES} == set()
    shown = loaded.get_params(typer.Context(loaded))
    assert {p.name for p in shown} == {p.name for p in loaded.params} | {"help"}


@pytest.mark.parametrize("command", LARGE)
def test_at_most_ten_flags_come_first(command: str) -> None:
    loaded = load_command(command)
    panels = [p.rich_help_panel for p in loaded.get_params(typer.Context(loaded))]
    panels = [panel for panel in panels if panel is not None]
    assert 5 <= panels.count(MOST_USED) <= 10
    order = [NAMES.index(panel) for panel in panels]
    assert order == sorted(order)


@pytest.mark.parametrize("command", LARGE)
def test_no_flag_is_lost_from_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index(MOST_USED) < text.index("─ Output ─")
    for parameter in load_command(command).params:
        for flag in parameter.opts:
            assert re.search(rf"{flag}(?![\w-])", text)


@pytest.mark.parametrize(
    ("command", "schema"),
    [("train", TrainConfig), ("finetune", FinetuneConfig), ("generate", GenerationOptions)],
)
def test_allowed_values_are_shown(command: str, schema: type) -> None:
    shown = {p.name: p.metavar for p in load_command(command).params}
    for name, hint in get_type_hints(schema).items():
        kinds = [hint, *get_args(hint)]
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        for word in words:
            assert word in str(shown[name]).split(" | ")
    assert shown["steps" if command != "generate" else "seed"] is None

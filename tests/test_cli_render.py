"""Tokens on a terminal: figures under their tokens, the first token's depth, the answers."""

from __future__ import annotations

import io

from rich.cells import cell_len
from rich.console import Console

from looptx_cli.render import TokenDisplay, answers_told, depth_colour, legend
from looptx_core.data.hops import check_answers, hop_lines
from looptx_core.generation.request import Generation, Step
from looptx_core.stopping.rule import Exit


def step(text: str, loops: int = 2, confidence: float = 0.5, reason: str | None = None) -> Step:
    return Step(0, 1, text, loops, confidence, 0.0, 1.0, reason)


def shown(steps: list[Step], columns: int = 40, before: str = "") -> list[str]:
    out = io.StringIO()
    display = TokenDisplay(Console(file=out, width=columns, color_system=None), 10, before)
    for each in steps:
        display.add(each)
    display.close()
    return out.getvalue().split("\n")


def test_figures_stand_under_their_tokens() -> None:
    text, loops, sure, _ = shown([step(" a", 10, 0.04), step(" bc", 1, 1.0), step("d", 3, 0.99)])
    assert text == "   a  bc  d"
    assert loops == " 10*   1  3"
    assert sure == "   4 100 99"


def test_lines_end_before_the_terminal_does_and_lose_nothing() -> None:
    words = [f" word{n}" for n in range(30)] + [" 漢字", " end"]
    lines = shown([step(word) for word in words], columns=33, before="the prompt:")
    assert all(cell_len(line) < 33 for line in lines[1:])
    assert len(lines[0]) + len("the prompt:") < 33
    assert "".join(lines[::3]).split() == [word.strip() for word in words]
    assert lines[1].startswith("      loops") and lines[2].startswith("     sure %")


def test_what_has_no_picture_is_written_out() -> None:
    lines = shown([step("a\n\n"), step("\x1b[31m"), step(""), step("", reason="end")])
    assert lines[0].strip() == "a↵↵" and len(lines) == 7
    assert "\x1b" not in "".join(lines) and lines[3].split() == ["\\x1b[31m", "…", "<end>"]


def test_the_first_token_tells_the_prompts_depth_and_counts_for_no_colour() -> None:
    steps = [step("a", 10), step("b", 1), step("c", 1), step("d", 2)]
    result = Generation("p", "abcd", steps, 1, "length", Exit(1, 10, None), "m")  # type: ignore[arg-type]
    said = legend(result, 10).plain
    assert "1 loop x2" in said and "2 loops x1" in said and "10 loops x" not in said
    assert "the prompt, which ran 10 loops" in said
    colours = {loops: depth_colour(loops, 10) for loops in (1, 2, 3, 10)}
    assert len(set(colours.values())) == 4


def test_answers_on_a_table_of_arrows() -> None:
    table = "map bf da ee fe cd hh gh aa:"
    assert check_answers(table, " f E c A g H b E d A") == (5, 5)
    assert check_answers(table, " f E c E g") == (1, 2)
    assert check_answers(table + " c", " A b D") == (1, 2)  # a question that the prompt begins
    assert check_answers(table + " c A", " b E") == (1, 1)  # what the prompt says is not counted
    assert check_answers("map ab ba:", " a A") == (0, 1)  # a cycle ends nowhere
    assert check_answers("Call me", " f E") is None and check_answers(table, "") is None
    for line in hop_lines(seed=3, count=20):
        given, _, answers = line.partition(":")
        right, asked = check_answers(given + ":", answers) or (0, 1)
        assert right == asked > 0
    assert answers_told(table, " f E c A") == "all 2 answers are right"
    assert answers_told(table, " f E c B") == "1 of 2 answers are right"
    assert answers_told("Call me", " f E") is None


def test_compute_in_words() -> None:
    from looptx_cli.render import compute_told, counted

    assert compute_told(-8.08) == "9.1 times full depth's compute"
    assert compute_told(-0.001) == "0% of full depth's compute saved"
    assert compute_told(0.4) == "40% of full depth's compute saved"
    assert [counted(n, "token") for n in (1, 1200)] == ["1 token", "1,200 tokens"]

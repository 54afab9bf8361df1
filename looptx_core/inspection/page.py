"""A report as one HTML page: figures and data inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from looptx_core.inspection import written
from looptx_core.inspection.browser import STYLE, TIPS, TOKENS
from looptx_core.inspection.charts import charts, threshold_text
from looptx_core.inspection.memory import memory_sentences
from looptx_core.inspection.stops import stops
from looptx_core.inspection.svg import svg
from looptx_core.media.registry import MEDIA

Document = dict[str, Any]

TERMS = {
    "loops": "How often the model ran its core block for a token. More loops compute more with "
    "the same parameters.",
    "exit": "The rule by which a token stops looping before the last loop.",
    "full depth": "Every token runs all loops.",
    "held-out": "Text that the model was not trained on.",
    "confidence": "The probability, as the model states it, that its likeliest next token is "
    "right.",
    "gain": "By how many nats the model expects one more loop to lower its loss.",
    "calibrated": "Of all tokens that are stated with 80 % confidence, 80 % are right.",
    "ECE": "Expected calibration error: how far the stated confidence and the share of right "
    "answers are apart on average, over 15 bins of equal size. 0 is perfect.",
    "AUROC": "The probability that a right answer has a higher confidence than a wrong one. 1 is "
    "perfect, 0.5 is chance.",
    "bits per byte": "The loss in bits, for each byte of text: comparable between tokenizers. "
    "Smaller is better.",
    "loss": "The mean of -log of the probability that the model gave to the token that came, in "
    "nats.",
    "nats": "Units of information by the natural logarithm; one is 1.44 bits.",
    "oracle": "A rule that sees the answer, and thus the fewest loops that could do.",
    "cache": "What is kept of earlier tokens, so that they are not computed again.",
}
"""What a page explains where a word is pointed at."""
_PERCENT = "\u00a0%"  # a number and its sign stay on one line
_WORD = re.compile(
    r"(?<![\w-])(?:" + "|".join(sorted(TERMS, key=len, reverse=True)) + r")(?![\w-])"
)


def page(document: Document, figures: Mapping[str, Path]) -> str:
    """The page's text. figures: PNG files by title; what a chart draws is drawn as SVG instead."""
    drawn = charts(document)
    sections = [_opening(document), _figure("What each loop brings", drawn), _by_loop(document)]
    sections += [_figure(title, drawn) for title in list(drawn)[1:]]
    trace = document["trace"] or document["sample"]
    if trace:
        sections.append(_trace(document, trace))
    sections.append(_policies(document["kv_policies"]))
    for title, file in figures.items():
        if title not in drawn:
            content = base64.b64encode(file.read_bytes()).decode()
            sections.append(
                f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
                f'src="data:image/png;base64,{content}">'
            )
    terms = "".join(f"<dt><b>{word}</b></dt><dd>{text}</dd>" for word, text in TERMS.items())
    sections.append(f"<h2>Glossary</h2><details><summary>All terms</summary><dl>{terms}</dl>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>looptx: {html.escape(str(document['facts']['name']))}</title>"
        f"<style>{STYLE}</style><body>{''.join(sections)}</details>"
        f"<script>{TIPS}</script>{_script(document, trace) if trace else ''}</body></html>\n"
    )


def headline(document: Document) -> str:
    """What a report comes to, in one sentence."""
    choice, loops = document["choice"], document["loops"]
    if loops == 1:
        return "The model runs one loop a token, so that there is nothing to save."
    within = f"{100 * choice['target_loss_increase']:g}{_PERCENT}"
    if choice["rule"] is None:
        return (
            f"On held-out text no exit keeps the loss within {within} of full depth: let every "
            f"token run all {loops} loops."
        )
    if choice["loss_increase"] <= choice["target_loss_increase"]:
        told = f"keeps the loss within {within} of full depth"
    else:
        told = (
            f"raises the loss by {100 * choice['loss_increase']:.2f}{_PERCENT}, more than {within},"
        )
    return (
        f"On held-out text the exit at {threshold_text(choice)} {told} with "
        f"{choice['mean_loops']:.1f} loops a token instead of {loops}, "
        f"{100 * (1 - choice['flops']):.0f}{_PERCENT} less computing."
    )


def _opening(document: Document) -> str:
    facts = document["facts"]
    layers = [facts[f"{part}_layers"] for part in ("prelude", "core", "coda")]
    rows = {
        "model": facts["name"],
        "parameters": f"{facts['parameters']:,}",
        "layers": f"{layers[0]} + {layers[1]} x {facts['max_loops']} loops + {layers[2]}",
        "width": f"{facts['d_model']}, {facts['n_heads']} heads",
        "vocabulary, context": f"{facts['vocab_size']:,} ids, {facts['max_seq_len']:,} tokens",
        "made from": facts.get("base"),
        "by": facts.get("method"),
        "trained on": _listed(facts.get("data")),
        "steps": _counted(facts.get("steps")) + _counted(facts.get("tokens"), " ({} tokens)"),
        "measured on": f"{document['tokens']:,} held-out tokens",
    }
    boxes = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in rows.items()
        if value
    )
    told = "".join(f"<p>{_explained(line)}</p>" for line in sentences(document))
    return (
        f'<p class="source">looptx inspect-loops, {html.escape(document["model"])}</p>'
        f'<h1>{_explained(headline(document))}</h1><dl class="facts">{boxes}</dl>{told}'
        f"<p>Thresholds and calibration come from {document['tokens_to_calibrate']:,} other "
        "tokens.</p>"
    )


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _counted(value: object, form: str = "{}") -> str:
    return form.format(f"{value:,}") if isinstance(value, int | float) else ""


def _explained(text: str) -> str:
    """Escaped, with the first place of each term explained."""
    seen: set[str] = set()

    def explain(found: re.Match[str]) -> str:
        word = found[0]
        if word in seen:
            return word
        seen.add(word)
        return f'<dfn tabindex="0" data-tip="{html.escape(TERMS[word])}">{word}</dfn>'

    return _WORD.sub(explain, html.escape(text))


def _figure(title: str, drawn: Mapping[str, Any]) -> str:
    name, made = drawn[title]
    parts = "".join(svg(chart, f"{name}-{n}") for n, chart in enumerate(made))
    return f'<section id="{name}"><h2>{title}</h2><div class="row">{parts}</div></section>'


def _by_loop(document: Document) -> str:
    rows = [
        (loop, f"{bits:.4f}", f"{accuracy:.1%}")
        for loop, (bits, accuracy) in enumerate(
            zip(document["bits_per_byte_by_loop"], document["accuracy_by_loop"]), start=1
        )
    ]
    return _table(("loops", "bits per byte", "accuracy"), rows)


def sentences(document: Document) -> list[str]:
    """What a report comes to, in words; for the terminal too."""
    choice = document["choice"]
    said = [
        f"Confidence where tokens stop: ECE {document['ece']:.3f} "
        f"(before calibration {document['ece_before']:.3f}), "
        f"AUROC {_number(document['auroc'])}, by the head alone "
        f"{_number(document['auroc_head'])}, by max-probability "
        f"{_number(document['auroc_maxprob'])}."
    ]
    within = f"{choice['target_loss_increase']:.2%}"
    fixed = choice["fixed"]
    if document["loops"] == 1:
        said.append("The model runs one loop a token, so that there is nothing to save.")
    elif choice["rule"] is None:
        said.append(f"No exit rule is sure to stay within {within} of the full depth's loss.")
    else:
        said.append(
            f"Cheapest rule within {within} of the full depth's loss: {choice['rule']} at "
            f"{choice['threshold']:g}, {choice['mean_loops']:.2f} loops a token, loss "
            f"{choice['loss_increase']:+.2%} ± {choice['loss_increase_error']:.2%}; the smallest "
            f"fixed depth is {fixed['mean_loops']:.0f} "
            f"({fixed['loss'] / choice['full_depth_loss'] - 1:+.2%})."
        )
    if deeper := choice["undecided"]:
        said.append(
            f"{deeper['rule']} at {deeper['threshold']:g}, {deeper['mean_loops']:.2f} loops, may "
            f"stay within {within} too, but {document['tokens_to_calibrate']:,} tokens are too few "
            f"to show it; about {deeper['tokens']:,} would: raise `val_batches`, or hold out more."
        )
    if choice["oracle"]:
        said.append(
            f"An oracle that sees the answer would need {choice['oracle']['mean_loops']:.2f}."
        )
    if simple := document["as_good"]:
        said.append(
            f"In real decoding with the cache policy {simple['policy']} a fixed depth of "
            f"{simple['fixed']} does as well as the exit at about the same loops: looptx generate "
            f"--loops {simple['fixed']} --prompt-loops {simple['prompt_loops']}."
        )
    if document.get("memory"):
        said += memory_sentences(document["memory"])
    for medium in MEDIA.values():
        for found in document[medium.plural]:
            said += medium.sentences(found)
    for found in document["written"]:
        said += written.sentences(found)
    trace = document["trace"]
    if trace and trace["deletion"]:
        test = trace["deletion"]
        said.append(
            f"Without its {test['removed']} most influential tokens an answer loses "
            f"{test['influential']:.2f} nats, without as many random ones {test['random']:.2f}."
        )
    return said


def _policies(rows: Sequence[Document]) -> str:
    if not rows:
        return ""
    head = ("policy", "exit", "loss", "with full cache", "accuracy", "with full cache", "loops",
            "bytes a token", "tokens/s")  # fmt: skip
    body = [
        (
            r["policy"], r["exit"], f"{r['loss']:.4f}",
            f"{r['loss_with_full_cache']:.4f}", f"{r['accuracy']:.2%}",
            f"{r['accuracy_with_full_cache']:.2%}", f"{r['mean_loops']:.2f}",
            f"{r['bytes_per_token']:,}", f"{r['tokens_per_second']:.0f}",
        )
        for r in rows
    ]  # fmt: skip
    title = f"<h2>The cache under real exits, {rows[0]['tokens']:,} tokens</h2>"
    return title + _table(head, body)


def _trace(document: Document, trace: Document) -> str:
    whose = "" if document["trace"] else "A held-out text, as none was given. "
    return (
        f"<section><h2>Token by token</h2><p>{whose}The colours tell how many loops each token "
        "runs. Move the threshold of the exit to see who would stop when. Point at a token: what "
        "each loop would have said after it, and outlined in red the earlier tokens that moved it."
        '</p><div class="controls"><label>exit by <select id="rule"></select></label>'
        '<span class="slide"><label for="threshold">fewer loops</label>'
        '<input type="range" id="threshold" min="0" value="0" aria-label="threshold of the exit">'
        '<span>more</span></span><button id="back">picked</button></div>'
        '<p id="said" aria-live="polite"></p><div class="key" id="key"></div>'
        '<div class="tokens"><div id="text"></div><div id="panel"></div></div></section>'
    )


def _script(document: Document, trace: Document) -> str:
    found = stops(document, trace)
    stored = document["exit"]["rule"]
    first = document["choice"]["rule"] or (stored if stored in found else "fixed")
    told = {"tokens": trace["tokens"], "stops": found, "first": first}
    data = json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="trace">{data}</script><script>{TOKENS}</script>'


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line((html.escape(str(cell)) for cell in row), "td") for row in rows)
    return f'<div class="wide"><table>{line(map(_explained, head), "th")}{body}</table></div>'


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"

"""A report as one HTML page: figures and data inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from looptx_core.media.registry import MEDIA

Document = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left }
#text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap }
#text span { border-radius: 3px; padding: .1rem 0; cursor: pointer; outline-offset: -1px }
#panel { position: sticky; bottom: 0; background: Canvas; border-top: 1px solid #8888;
  min-height: 15rem; font: 13px/1.4 ui-monospace, monospace; padding: .5rem 0; overflow-x: auto }
#panel td { white-space: pre } .flip { font-weight: bold; color: #c30 }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('trace').textContent);
const text = document.getElementById('text'), panel = document.getElementById('panel');
const deepest = data.tokens[0].top.length;
const depth = (loops) => `hsl(${210 - 210 * (loops - 1) / Math.max(1, deepest - 1)} 90% 60% / .35)`;
const spans = data.tokens.map((token, place) => {
  const span = document.createElement('span');
  span.textContent = token.text; span.tabIndex = 0;
  span.style.background = depth(token.loops);
  span.onmouseenter = span.onfocus = () => show(place);
  text.append(span); return span;
});
function cell(row, content, style) {
  const td = row.insertCell(); td.textContent = content; if (style) td.className = style;
}
function show(place) {
  const token = data.tokens[place];
  spans.forEach((span) => { span.style.outline = ''; span.style.background = depth(
    data.tokens[spans.indexOf(span)].loops); });
  spans[place].style.outline = '2px solid';
  const most = Math.max(...token.influences.map((pair) => pair[1]));
  for (const [where, share] of token.influences)
    if (where !== place) spans[where].style.outline = `${1 + 2 * share / most}px solid #c30`;
  panel.replaceChildren();
  const line = document.createElement('div');
  line.textContent = `after ${JSON.stringify(token.text)}: ${token.loops} loops, confidence ` +
    `${(100 * token.confidence).toFixed(1)} %, then came ${JSON.stringify(token.next)}`;
  const table = document.createElement('table');
  token.top.forEach((tops, loop) => {
    const row = table.insertRow();
    cell(row, `loop ${loop + 1}${loop + 1 === token.loops ? ' (exit)' : ''}`);
    tops.forEach(([word, share], rank) => cell(row, `${JSON.stringify(word)} ` +
      `${(100 * share).toFixed(1)}%`, rank === 0 && token.flips.includes(loop + 1) ? 'flip' : ''));
  });
  panel.append(line, table);
}
show(data.tokens.length - 1);
"""


def page(document: Document, figures: Mapping[str, Path]) -> str:
    """The page's text. figures: PNG files by title."""
    sections = [_summary(document)]
    for title, file in figures.items():
        content = base64.b64encode(file.read_bytes()).decode()
        sections.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{content}">'
        )
    sections.append(_policies(document["kv_policies"]))
    if document["trace"]:
        sections.append(_trace(document["trace"]))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>looptx: {html.escape(document['model'])}</title>"
        f"<style>{_STYLE}</style><h1>What the loops do</h1>{''.join(sections)}</html>\n"
    )


def _summary(document: Document) -> str:
    lines = [
        f"Model {document['model']}, {document['tokens']:,} held-out tokens; calibrated on "
        f"{document['tokens_to_calibrate']:,} others.",
        *sentences(document),
    ]
    rows = [
        (loop, f"{bits:.4f}", f"{accuracy:.1%}")
        for loop, (bits, accuracy) in enumerate(
            zip(document["bits_per_byte_by_loop"], document["accuracy_by_loop"]), start=1
        )
    ]
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return told + _table(("loop", "bits per byte", "accuracy"), rows)


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
    if choice["rule"] is None:
        said.append(f"No exit rule stays within {within} of the full depth's loss.")
    else:
        said.append(
            f"Cheapest rule within {within} of the full depth's loss: {choice['rule']} at "
            f"{choice['threshold']:g}, {choice['mean_loops']:.2f} loops a token, loss "
            f"{choice['loss_increase']:+.2%}; the smallest fixed depth is "
            f"{fixed['mean_loops']:.0f} ({fixed['loss'] / choice['full_depth_loss'] - 1:+.2%})."
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
    for medium in MEDIA.values():
        for found in document[medium.plural]:
            said += medium.sentences(found)
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


def _trace(trace: Document) -> str:
    data = json.dumps(trace, ensure_ascii=False).replace("<", "\\u003c")
    return (
        "<h2>Token by token</h2><p>Point at a token: what each loop would have said after it, and "
        "outlined the earlier tokens that moved it. Blue left the loop early, red late.</p>"
        f'<div id="text"></div><div id="panel"></div>'
        f'<script type="application/json" id="trace">{data}</script><script>{_SCRIPT}</script>'
    )


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"

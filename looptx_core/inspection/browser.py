"""The style and the script of a report's page."""

from looptx_core.inspection.charts import COLOURS

_SERIES = "".join(f".c{n} {{ --c: var(--c{n}) }}\n" for n in range(len(COLOURS)))
_LIGHT = "".join(f"--c{n}: {colour};" for n, colour in enumerate(COLOURS))
_DARK = "".join(
    f"--c{n}: color-mix(in srgb, {colour} 70%, white);" for n, colour in enumerate(COLOURS)
)

STYLE = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n{_SERIES}"
    """
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem }
h1 { font-size: clamp(1.25rem, 3.2vw, 1.8rem); line-height: 1.3; font-weight: 650;
  margin: .3rem 0 1rem; text-wrap: pretty }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .2rem }
.source { opacity: .7; font-size: .9rem; margin: 0; overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem;
  margin: 1rem 0 }
.facts div { border: 1px solid #8884; border-radius: 8px; padding: .45rem .7rem }
.facts dt { font-size: .78rem; opacity: .7 } .facts dd { margin: 0; overflow-wrap: anywhere }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1.2rem 1.6rem }
figure { margin: 0 } img { max-width: 100%; background: #fff; border-radius: 6px }
svg.chart { width: 100%; height: auto; display: block; font-size: 12px }
svg text { fill: CanvasText; opacity: .8 } svg .strong { font-weight: 650; opacity: 1;
  paint-order: stroke; stroke: Canvas; stroke-width: 4px }
svg path { fill: none; stroke: var(--c); stroke-width: 1.8 }
svg circle, svg rect[class] { fill: var(--c) }
svg .grid { stroke: #8883 } svg .zero { stroke: #888a } svg .level { stroke: #888;
  stroke-dasharray: 5 4 } svg .mark { stroke: #888; stroke-dasharray: 2 3 }
svg circle.picked { fill: none; stroke: CanvasText; stroke-width: 2.2 }
svg circle.now { fill: CanvasText; stroke: Canvas; stroke-width: 1.5 }
.legend { font-size: .82rem; display: flex; flex-wrap: wrap; gap: .1rem .9rem }
.legend span::before { content: ""; display: inline-block; width: .8em; height: .8em;
  border-radius: 2px; margin-right: .35em; background: var(--c) }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem }
th, td { padding: .18rem .75rem; text-align: right; border-bottom: 1px solid #8883;
  white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
dfn { font-style: normal; text-decoration: underline dotted #888; text-underline-offset: .2em;
  cursor: help }
#tip { position: fixed; z-index: 9; max-width: min(20rem, 90vw); padding: .35rem .6rem;
  border-radius: 6px; background: CanvasText; color: Canvas; font-size: .85rem; line-height: 1.4;
  white-space: pre-line; pointer-events: none }
.tokens { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); gap: 1rem;
  align-items: start }
#text { font: 13px/1.95 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
#text span, .key span { border-radius: 3px; padding: .1rem 0; background: var(--d) }
#text span { cursor: pointer; outline-offset: -1px }
.key { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin: .6rem 0 }
.key span { padding: .05rem .5rem }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem }
.slide { flex: 1 1 18rem; display: flex; align-items: center; gap: .6rem; white-space: nowrap }
.slide input { flex: 1; min-width: 0 } select, button { font: inherit }
#said { min-height: 3.1em; margin: .4rem 0 } #panel { font-size: .88rem;
  min-height: 16rem; position: sticky; top: 1rem; overflow-x: auto }
#panel p { margin: .3rem 0; overflow-wrap: anywhere }
#panel td { font: 12.5px/1.4 ui-monospace, monospace; white-space: pre; padding: .1rem .45rem }
#panel tr.exit { background: #8882; font-weight: 650 } .flip { color: #d2431c }
@media (max-width: 46rem) { .tokens { grid-template-columns: minmax(0, 1fr) }
  #text { max-height: 45vh; overflow-y: auto; border-block: 1px solid #8884 }
  #panel { position: static } .facts { grid-template-columns: repeat(2, 1fr) } }
"""
)

TIPS = """
const tip = document.createElement('div'); tip.id = 'tip'; tip.hidden = true;
document.body.append(tip);
function tell(target, x, y) {
  tip.textContent = target.dataset.tip; tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 16 + box.height > innerHeight ? y - box.height - 10 : y + 16}px`;
}
const middle = (mark) => {
  const box = mark.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};
function point(event) {
  const chart = event.target.closest?.('svg.chart');
  let found = event.target.closest?.('[data-tip]');
  if (chart && !found) {
    let nearest = 24;
    for (const mark of chart.querySelectorAll('[data-tip]')) {
      const [x, y] = middle(mark), far = Math.hypot(x - event.clientX, y - event.clientY);
      if (far < nearest) { nearest = far; found = mark; }
    }
  }
  if (found) tell(found, event.clientX, event.clientY); else tip.hidden = true;
}
document.addEventListener('pointermove', point);
document.addEventListener('pointerdown', point);
document.addEventListener('scroll', () => { tip.hidden = true; }, { passive: true });
document.addEventListener('focusin', (event) => {
  if (event.target.matches('dfn')) tell(event.target, ...middle(event.target));
});
document.addEventListener('focusout', () => { tip.hidden = true; });
"""

TOKENS = """
const data = JSON.parse(document.getElementById('trace').textContent);
const at = (id) => document.getElementById(id);
const text = at('text'), panel = at('panel'), rule = at('rule'), slider = at('threshold');
let depths = data.tokens.map((token) => token.loops), place = -1;
const spans = data.tokens.map((token, number) => {
  const span = document.createElement('span');
  span.textContent = token.text; span.tabIndex = 0;
  span.onmouseenter = span.onfocus = () => show(number);
  text.append(span); return span;
});
// Over the depths that occur, and no others.
function colours() {
  const there = [...new Set(depths)].sort((a, b) => a - b);
  const hue = (n) => there.length < 2 ? 210 : 210 - 200 * n / (there.length - 1);
  return new Map(there.map((loops, n) => [loops, `hsl(${hue(n)} 85% 55% / .4)`]));
}
function paint() {
  const colour = colours(), key = at('key');
  spans.forEach((span, n) => span.style.setProperty('--d', colour.get(depths[n])));
  key.replaceChildren();
  for (const [loops, fill] of colour) {
    const chip = document.createElement('span'), count = depths.filter((d) => d === loops).length;
    chip.textContent = `${loops} loop${loops === 1 ? '' : 's'}: ${count}`;
    chip.style.setProperty('--d', fill); key.append(chip);
  }
  if (place >= 0) show(place);
}
function stop() {
  const { says, mean_loops, increase, loss, depths: code } = data.stops[rule.value][slider.value];
  depths = [...code].map((letter) => letter.codePointAt(0) - 48);
  const here = depths.reduce((sum, loops) => sum + loops, 0) / depths.length;
  const sign = increase < 0 ? '\\u2212' : '+';
  at('said').textContent = `Stop at ${says}. Held-out text: ${mean_loops.toFixed(2)} mean loops, ` +
    `loss ${loss.toFixed(4)} (${sign}${Math.abs(increase).toFixed(2)} % on full depth). ` +
    `This text: ${here.toFixed(2)} mean loops.`;
  slider.setAttribute('aria-valuetext', at('said').textContent);
  mark(mean_loops, increase); paint();
}
// The slider's point on the first chart of the frontier.
function mark(x, y) {
  const chart = document.querySelector('#frontier svg.chart');
  const [x0, x1, y0, y1] = chart.dataset.span.split(',').map(Number);
  const [left, right, top, bottom] = chart.dataset.plot.split(',').map(Number);
  let dot = chart.querySelector('.now');
  if (!dot) {
    dot = document.createElementNS(chart.namespaceURI, 'circle');
    dot.setAttribute('class', 'now'); dot.setAttribute('r', 4.5); chart.append(dot);
  }
  const high = Math.min(Math.max(y, y0), y1);
  dot.setAttribute('cx', left + (x - x0) / (x1 - x0) * (right - left));
  dot.setAttribute('cy', bottom - (high - y0) / (y1 - y0) * (bottom - top));
}
function choose(name, position) {
  rule.value = name; slider.max = data.stops[name].length - 1;
  const picked = data.stops[name].findIndex((stop) => stop.picked);
  slider.value = position ?? (picked < 0 ? Math.floor(slider.max / 2) : picked); stop();
}
function cell(row, content, style) {
  const td = row.insertCell(); td.textContent = content; if (style) td.className = style;
}
const short = (value) => value === null ? '' : value.toPrecision(2);
function show(number) {
  place = number;
  const token = data.tokens[place], loops = depths[place];
  const most = Math.max(...token.influences.map((pair) => pair[1]));
  spans.forEach((span) => { span.style.outline = ''; });
  spans[place].style.outline = '2px solid';
  for (const [where, share] of token.influences)
    if (where !== place) spans[where].style.outline = `${1 + 2 * share / most}px solid #d2431c`;
  panel.replaceChildren();
  const line = document.createElement('p');
  line.textContent = `After ${JSON.stringify(token.text)}: ${loops} loop${loops === 1 ? '' : 's'}` +
    (token.next === null ? '.' : `; what came was ${JSON.stringify(token.next)}.`);
  const table = document.createElement('table'), head = table.insertRow();
  for (const name of ['loop', 'confidence', 'gain', 'likeliest next tokens']) cell(head, name);
  head.lastChild.colSpan = 3;
  token.top.forEach((tops, loop) => {
    const row = table.insertRow();
    if (loop + 1 === loops) row.className = 'exit';
    cell(row, `${loop + 1}${loop + 1 === loops ? ' exit' : ''}`);
    cell(row, `${(100 * token.signals.confidence[loop]).toFixed(0)} %`);
    cell(row, short(token.signals.gain[loop]));
    tops.slice(0, 3).forEach(([word, share], rank) => cell(row, `${JSON.stringify(word)} ` +
      `${(100 * share).toFixed(0)}%`, rank === 0 && token.flips.includes(loop + 1) ? 'flip' : ''));
  });
  panel.append(line, table);
}
for (const name of Object.keys(data.stops)) rule.append(new Option(name));
slider.oninput = stop; rule.onchange = () => choose(rule.value);
at('back').onclick = () => choose(data.first);
choose(data.first); show(data.tokens.length - 1);
"""

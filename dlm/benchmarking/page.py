"""A page that holds everything, with no script, style or font from elsewhere: sections, sortable tables, and a box that
the mouse brings up."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dlm.utils.jsonio import to_json

STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1280px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p.quiet, .facts { color: #5f6368; margin: .2rem 0 .8rem; } li { margin: .25rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: flex-start; }
.charts svg { max-width: 100%; height: auto; } [data-i] { cursor: help; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
table { overflow-wrap: normal; }
th, td { padding: .2rem .45rem; text-align: right; border-bottom: 1px solid #eceff1; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.degenerate td { color: #b00020; }
th { position: sticky; top: 0; background: #fff; cursor: pointer; border-bottom: 2px solid #9aa0a6; }
th[aria-sort=ascending]::after { content: " \\25b2"; } th[aria-sort=descending]::after { content: " \\25bc"; }
tbody tr:hover { background: #f1f6fb; }
#tip { position: fixed; display: none; max-width: 30rem; background: #fff; border: 1px solid #9aa0a6;
  border-radius: 6px; box-shadow: 0 4px 16px #0003; padding: .6rem .8rem; font-size: 13px; pointer-events: none;
  z-index: 9; }
#tip q { display: block; max-height: 13em; overflow: hidden; margin: .1rem 0 .5rem; quotes: none;
  border-left: 3px solid #dadce0; padding-left: .5rem; white-space: pre-wrap; }
#tip i { color: #5f6368; font-style: normal; } #tip b.bad { color: #b00020; }
"""
SCRIPT = """
const tip = document.getElementById("tip");
const put = (parent, name, words, kind) => {
  const made = document.createElement(name); made.textContent = words; if (kind) made.className = kind;
  parent.append(made); return made; };
document.addEventListener("mousemove", event => {
  const at = event.target.closest("[data-i]");
  if (!at) { tip.style.display = "none"; return; }
  const found = DATA[at.dataset.i]; tip.replaceChildren();
  put(tip, "b", found.head); if (found.degenerate) put(tip, "b", " · degenerate", "bad");
  put(tip, "div", found.facts);
  for (const one of found.answers) { put(tip, "i", one.question + (one.note ? " · " + one.note : ""));
    put(tip, "q", one.answer || "(nothing written)"); }
  tip.style.display = "block";
  tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)) + "px";
});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  const value = (row, k) => { const v = row.cells[k].dataset.v; return v === "" ? null : isNaN(v) ? v : +v; };
  heads.forEach(head => head.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.click(); } }));
  heads.forEach((head, k) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => { const x = value(a, k), y = value(b, k);
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); };
    body.append(...[...body.rows].sort(order)); }));
}
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], data: Sequence[dict]) -> str:
    """The whole page: (heading, HTML) sections; data: what the mouse brings up for each data-i."""
    body = "".join(f"<h2>{escape(heading)}</h2>{html}" for heading, html in sections)
    known = to_json(data, ascii_only=False).replace("<", "\\u003c")  # no text of a model ends or opens a script
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1>{lead}{body}<div id="tip"></div>'
        f"<script>const DATA = {known};{SCRIPT}</script></body></html>\n"
    )


def quiet(words: str) -> str:
    """A remark."""
    return f'<p class="quiet">{escape(words)}</p>'


def listed(sentences: Sequence[str]) -> str:
    """Sentences as a list."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def table(headings: Sequence[str], rows: Sequence[tuple[Sequence[tuple[object, str]], bool, int]]) -> str:
    """A table that sorts where a heading is clicked. A row: its (value to sort by, words), whether it is marked, and
    its number in the page's data."""
    head = "".join(f'<th tabindex="0">{escape(heading)}</th>' for heading in headings)
    body = []
    for cells, marked, number in rows:
        kind = ' class="degenerate"' if marked else ""
        inside = "".join(
            f'<td data-v="{"" if value is None else escape(str(value))}">{escape(words)}</td>' for value, words in cells
        )
        body.append(f'<tr data-i="{number}"{kind}>{inside}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )

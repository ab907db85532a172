"""Pictures and words of a grid: heat maps, the front of latency against quality, one page that holds everything.

    dlm bench plot runs/grid.json                     (writes runs/grid.html; the numbers in words are printed)
    dlm bench plot runs/grid.json --svg pictures/     (each picture as a file, too)

FILE may also be JSON of the same shape from elsewhere, or CSV with method, question, block_length, steps, latency_s
and perplexity: what a file does not say is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.benchmarking.findings import sentences
from dlm.benchmarking.page import listed, page, quiet
from dlm.benchmarking.report import front_chart, maps, pass_chart, table_of, tips
from dlm.benchmarking.results import Grid, read_grid
from dlm.cli.parser import Parser


def facts(grid: Grid) -> str:
    """Where the numbers come from, for the top of the page."""
    said = [f"{len(grid.cells)} cells"]
    questions = len({cell["question"] for cell in grid.cells})
    said.append(f"{questions} question{'s' if questions > 1 else ''}")
    if settings := grid.meta.get("settings"):
        said.insert(0, f"{settings['model']} in {settings['dtype']}")
        repeats = settings["repeats"]
        said.append("one run a cell" if repeats == 1 else f"median of {repeats} runs a cell")
        judge = settings["judge"]
        said.append(f"judge {Path(str(judge.get('id'))).name} ({judge.get('revision')})" if judge else "no judge")
    for launch in grid.meta.get("launches", [])[:1]:
        said += [launch["hardware"], f"torch {launch['versions']['torch']}", f"commit {launch['commit']}"]
    remarks = quiet(" · ".join(said))
    machines = {launch["hardware"] for launch in grid.meta.get("launches", [])}
    if len(machines) > 1:
        remarks += quiet(f"Measured on {len(machines)} different machines: compare “÷ reference”, not seconds.")
    if rule := grid.meta.get("degenerate_rule"):
        remarks += quiet(f"The rule: {rule}.")
    elif not any("degenerate" in cell for cell in grid.cells):
        remarks += quiet("This file does not say which answers are degenerate.")
    missing = grid.meta.get("cells", 0) - grid.meta.get("measured", 0)
    return remarks + (quiet(f"{missing} cells are still to be measured.") if missing else "")


def left_out(grid: Grid) -> str:
    """The settings that were not measured, by their reason."""
    reasons: dict[str, list[str]] = {}
    for one in grid.meta.get("infeasible", []):
        steps = "" if one["steps"] is None else f" and {one['steps']} steps"
        reason = re.sub(r"\d+", "…", one["reason"])
        reasons.setdefault(reason, []).append(f"{one['method']}: block {one['block_length']}{steps}")
    items = "".join(
        f"<li>{escape(reason)} ({len(which)})<br><span class=quiet>{escape('; '.join(which))}</span></li>"
        for reason, which in reasons.items()
    )
    return f"<details><summary>{sum(map(len, reasons.values()))} settings</summary><ul>{items}</ul></details>"


def aup_list(curves: Sequence[dict]) -> str:
    """The areas under the curves of each method and block length."""
    remark = (
        "The area under accuracy (%) against tokens a pass, over the steps of a method and block length; what is below "
        "the best of all weighs less, points that lose more than 5 points count nothing (d3LLM, arXiv:2601.07568)."
    )
    return quiet(remark) + listed([f"{one['aup']:.1f}: {one['method']}, block {one['block_length']}" for one in curves])


def pictures(grid: Grid) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(heading, remark, [(name, drawing)]) of everything that a grid can show."""
    sections = maps(grid)
    if drawn := front_chart([grid], "Latency against quality", [0]):
        sections.insert(0, ("Latency against quality", "", [("front", drawn)]))
    if drawn := pass_chart(grid):
        sections.append(("What a pass costs", "", [("passes", drawn)]))
    return sections


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench plot", "FILE [options]", __doc__)
    parser.add_argument("file", metavar="FILE", help="what dlm bench grid wrote")
    parser.add_argument("--out", metavar="FILE", help="the page (default: FILE with .html)")
    parser.writes(out="html")
    parser.add_argument("--svg", metavar="FOLDER", help="write each picture there as well")
    args = parser.parse(argv)
    source = Path(args.file)
    grid = read_grid(source)
    drawn, said = pictures(grid), sentences(grid)
    sections = [("In short", listed(said))]
    for heading, remark, charts in drawn:
        sections.append((heading, quiet(remark) + f'<div class="charts">{"".join(one for _, one in charts)}</div>'))
    if curves := grid.meta.get("aup"):
        sections.append(("Accuracy under parallelism", aup_list(curves)))
    sections.append(("All settings", quiet("Click a heading to sort.") + table_of(grid)))
    if grid.meta.get("infeasible"):
        sections.append(("Not measured", left_out(grid)))
    out = Path(args.out) if args.out else source.with_suffix(".html")
    out.write_text(page(f"{grid.name}: the grid", facts(grid), sections, tips(grid)), encoding="utf-8")
    if args.svg:
        folder = Path(args.svg)
        folder.mkdir(parents=True, exist_ok=True)
        for heading, _, charts in drawn:
            for name, one in charts:
                stem = re.sub(r"\W+", "-", f"{grid.name} {heading} {name}".lower()).strip("-")
                (folder / f"{stem}.svg").write_text(one, encoding="utf-8")
    print("\n".join(said))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "plot", *sys.argv[1:]]))

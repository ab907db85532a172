"""Two grids side by side: both fronts in one picture, and the settings that both have measured, setting by setting.

    dlm bench compare runs/before.json runs/after.json         (writes compare.html; the numbers in words are printed)
    dlm bench compare runs/grid.json reference.csv --out both.html

The files are of the kinds that dlm bench plot reads. Seconds of different machines cannot be compared; what each
method gains over none can.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.benchmarking.charts import significant
from dlm.benchmarking.findings import REFERENCE, noise_sentences, sentences, speedups
from dlm.benchmarking.page import listed, page, quiet, table
from dlm.benchmarking.report import front_chart, tips
from dlm.benchmarking.results import Grid, Setting, read_grid
from dlm.cli.parser import Parser
from dlm.utils.stats import geometric_mean


def length(grid: Grid) -> int:
    """Tokens that a grid's answers have: what stands beside it, else its largest block, which is the whole answer."""
    settings = grid.meta.get("settings")
    return settings["sampling"]["gen_length"] if settings else max(s.block_length for s in grid.settings())


def shared(first: Grid, second: Grid) -> list[tuple[Setting, Setting]]:
    """The settings of the same method, block length and steps in both; none where the answers' lengths differ."""
    if length(first) != length(second):
        return []
    other = {(s.method, *s.place): s for s in second.settings()}
    return [(s, other[s.method, *s.place]) for s in first.settings() if (s.method, *s.place) in other]


def differences(first: Grid, second: Grid) -> list[str]:
    """The second grid against the first over the settings that both have, in sentences."""
    pairs = shared(first, second)
    if length(first) != length(second):
        return [
            f"The answers of {first.name} have {length(first)} tokens and those of {second.name} {length(second)}, so "
            "that no setting is the same in both: compare their fronts, and what each method gains over none."
        ]
    if not pairs:
        return ["The two grids have no setting in common: compare their fronts and gains."]
    rate = geometric_mean([b.latency / a.latency for a, b in pairs])
    said = [f"{second.name} takes {rate:.2f} times the seconds of {first.name} over {len(pairs)} settings of both."]
    judged = [(a.perplexity, b.perplexity) for a, b in pairs if a.perplexity and b.perplexity]
    if judged:
        ratio = geometric_mean([b / a for a, b in judged])
        reason = unlike((first, second))
        said.append(f"Its perplexity is {ratio:.2f} times as high{f', but {reason}' if reason else ''}.")
    gains = [speedups(grid.settings()) for grid in (first, second)]
    for method in first.methods:
        both = [key for key in gains[0] if key[0] == method and key in gains[1]]
        if both:
            rates = [geometric_mean([gain[key] for key in both]) for gain in gains]
            said.append(
                f"{method} over {REFERENCE}: {rates[0]:.2f} times as fast in {first.name}, {rates[1]:.2f} times in "
                f"{second.name} (geometric means of the same {len(both)} settings)."
            )
    return said


def unlike(grids: Sequence[Grid]) -> str:
    """Why the perplexities are not known to be of one judge and the same questions; "" where they are."""
    told = [grid.meta.get("settings", {}) for grid in grids]
    if not all(told):
        return "the files do not say which judge read the answers to which questions"
    if told[0]["questions"] != told[1]["questions"]:
        return "the questions are other ones"
    judges = [one["judge"] for one in told]
    if judges[0] == judges[1]:
        return ""
    shown = [f"{Path(str(one.get('id'))).name} ({one.get('revision')})" if one else "none" for one in judges]
    return f"the files do not show that it is one judge: {' and '.join(shown)}"


def slowest(grid: Grid) -> float:
    """Seconds of a grid's slowest setting of `none`, or of all where it lacks that method."""
    settings = grid.settings()
    return max(s.latency for s in settings if s.method == REFERENCE or REFERENCE not in grid.methods)


def side_by_side(first: Grid, second: Grid) -> str:
    """The settings of both as a table."""
    headings = ["method", "block", "steps", *(f"seconds · {grid.name}" for grid in (first, second)), "ratio"]
    headings += [*(f"perplexity · {grid.name}" for grid in (first, second)), "ratio"]
    index = {(s.method, *s.place): i for i, s in enumerate(first.settings())}
    rows = []
    for a, b in shared(first, second):
        cells: list[tuple[object, str]] = [(value, str(value)) for value in (a.method, a.block_length, a.steps)]
        for x, y in ((a.latency, b.latency), (a.perplexity, b.perplexity)):
            both = (x, y, None if x is None or y is None else y / x)
            cells += [(value, "" if value is None else significant(value)) for value in both]
        rows.append((cells, bool(a.degenerate or b.degenerate), index[a.method, *a.place]))
    return table(headings, rows)


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench compare", "FILE FILE [options]", __doc__)
    parser.add_argument("first", metavar="FILE")
    parser.add_argument("second", metavar="FILE")
    parser.add_argument("--out", default="compare.html", metavar="FILE", help="the page (default: compare.html)")
    parser.writes(out="html")
    args = parser.parse(argv)
    first, second = read_grid(args.first), read_grid(args.second)
    if first.name == second.name:
        first, second = (
            replace(grid, name=f"{Path(name).parent.name}/{grid.name}" if Path(name).parent.name else name)
            for grid, name in ((first, args.first), (second, args.second))
        )
    grids, starts = (first, second), (0, len(first.settings()))
    said, base = differences(first, second), [slowest(grid) for grid in grids]
    said += [f"{grid.name}: {warning}" for grid in grids for warning in noise_sentences(grid)]

    def relative(grid: Grid, setting: Setting) -> float:
        return setting.latency / base[0 if grid is first else 1]

    absolute = front_chart(grids, "Both in seconds", starts)
    shares = front_chart(
        grids, "Both relative to their slowest setting of none", starts, relative, "latency / slowest setting of none"
    )
    sections = [("In short", listed(said))]
    if absolute and shares:
        sections.append(("Latency against quality", f'<div class="charts">{absolute}{shares}</div>'))
    sections += [(grid.name, listed(sentences(grid))) for grid in grids]
    if shared(first, second):
        sections.append(("Settings of both", side_by_side(first, second)))
    data = [tip | {"head": f"{grid.name}: {tip['head']}"} for grid in grids for tip in tips(grid)]
    lead = quiet(f"{args.first} (dots) and {args.second} (rings).")
    if reason := unlike(grids):
        lead += quiet(f"Perplexities: {reason}.")
    out = Path(args.out)
    out.write_text(page(f"{first.name} and {second.name}", lead, sections, data), encoding="utf-8")
    print("\n".join(said))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "compare", *sys.argv[1:]]))

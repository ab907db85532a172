"""Draw the curves of training runs: loss, validation bound, learning rate, and what rewards and preferences log.

    dlm train curves runs/sft                              (writes curves.svg)
    dlm train curves runs/a runs/b --out both.svg          (in one picture, with a legend)

A run is its output folder or its metrics.jsonl, of a run that goes on too. Curves that vary are means over the last
steps, with each record faint behind them. A validation has its standard error as a bar.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.benchmarking.charts import SERIES, Axis, Point, Series, scatter
from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded

WIDTH, GAP, COLUMNS = 600, 24, 2  # pixels; panels side by side
# For readers who ask for dark pages: the colours of `charts`, by what they are there.
DARK = (
    "<style>@media (prefers-color-scheme: dark){svg{color-scheme:dark}[fill='#ffffff']{fill:#14161a}"
    "[fill='#1a1a1a']{fill:#e8e8e4}[fill='#5f6368']{fill:#a5abb3}[stroke='#dadce0']{stroke:#33373d}"
    "[stroke='#ffffff']{stroke:#14161a}[stroke='#0072b2']{stroke:#4ba3e0}[fill='#0072b2']{fill:#4ba3e0}"
    "[stroke='#7a5195']{stroke:#b48ed0}[fill='#7a5195']{fill:#b48ed0}"
    "[stroke='#555555']{stroke:#a0a0a0}[fill='#555555']{fill:#a0a0a0}}</style>"
)


@dataclass(frozen=True)
class Panel:
    """A chart: a number of the records of a kind. error: the number that is its standard error; varies: whether records
    differ by chance, so that a mean is drawn; zero: whether the axis shows 0."""

    title: str
    kind: str
    key: str
    error: str = ""
    varies: bool = True
    zero: bool = False


PANELS = (
    Panel("Loss", "train", "loss"),
    Panel("Validation: bound, nats a token", "valid", "bound", "error", varies=False),
    Panel("Reward", "rollouts", "reward"),
    Panel("KL to the reference", "train", "kl", zero=True),
    Panel("Entropy of the answers, nats a token", "train", "entropy"),
    Panel("Share of tokens whose ratio is clipped", "train", "clip_share", zero=True),
    Panel("Tokens a pass of the answers", "rollouts", "tokens_per_pass"),
    Panel("Pairs in the right order (accuracy)", "train", "accuracy"),
    Panel("Margin of the pairs (beta times delta)", "train", "margin"),
    Panel("Gradient norm, before it is clipped", "train", "grad_norm"),
    Panel("Learning rate", "train", "learning_rate", varies=False, zero=True),
)


def read_run(path: str) -> list[dict]:
    """The records of a run, from its folder or its metrics.jsonl.

    Raises ValueError, with file and line, where there is none or a line is no record; the last line may be torn.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the output folder of a run that has logged its first steps")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text: give the metrics.jsonl of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["kind"], str) or type(record["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines) and records:  # it is being written
                break
            raise ValueError(
                f"{file}: line {number} is no record of a run: give a metrics.jsonl as it was written"
            ) from None
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no record yet: wait for the first steps (--log-every of the run)")
    return records


def points(records: Sequence[dict], kind: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of the records of a kind that have this number."""
    found = ((r["step"], r.get(key)) for r in records if r["kind"] == kind)
    return [(step, float(y)) for step, y in found if type(y) in (int, float) and math.isfinite(y)]


def smoothed(places: Sequence[tuple[int, float]], steps: int) -> list[tuple[int, float]]:
    """The mean of each record and those of the `steps` steps before it."""
    means, first, total = [], 0, 0.0
    for at, (step, value) in enumerate(places):
        total += value
        while places[first][0] <= step - steps:
            total -= places[first][1]
            first += 1
        means.append((step, total / (at - first + 1)))
    return means


def draw(panel: Panel, runs: dict[str, list[dict]], smooth: int | None) -> str | None:
    """One panel of all runs; None where no run has its numbers."""
    behind, front = [], []
    for number, (name, records) in enumerate(runs.items()):
        colour, values = SERIES[number % len(SERIES)], points(records, panel.kind, panel.key)
        if not values:
            continue
        curve = values
        if panel.varies:
            behind.append(Series("", [], values, colour=colour, faint=True))
            curve = smoothed(values, smooth or max(1, (values[-1][0] - values[0][0]) // 20))
        errors = dict(points(records, panel.kind, panel.error))
        bars = [(x, y, errors[x]) for x, y in values if x in errors]
        behind += [Series("", [], [(x, y - e), (x, y + e)], colour=colour) for x, y, e in bars]
        dots = [Point(x, y) for x, y in curve] if len(curve) == 1 or panel.error else []
        front.append(Series(name, dots, curve, colour=colour))
    if not front:
        return None
    return scatter(panel.title, behind + front, Axis("step", log=False), Axis("", log=False, zero=panel.zero),
                   width=WIDTH, height=340)  # fmt: skip


def picture(runs: dict[str, list[dict]], smooth: int | None = None) -> str:
    """All panels that the runs have numbers for, as one SVG. Raises ValueError where there are none."""
    drawn = [panel for panel in (draw(panel, runs, smooth) for panel in PANELS) if panel is not None]
    if not drawn:
        raise ValueError(f"no numbers to draw in {', '.join(runs)}: wait for the first steps (--log-every of the run)")
    heights = [float(re.search(r' height="(\d+)"', panel)[1]) for panel in drawn]
    columns, parts, y = min(COLUMNS, len(drawn)), [], 0.0
    for first in range(0, len(drawn), columns):
        for i, panel in enumerate(drawn[first : first + columns]):
            parts.append(panel.replace("<svg ", f'<svg x="{i * (WIDTH + GAP)}" y="{y:.0f}" ', 1))
        y += max(heights[first : first + columns]) + GAP
    width, height = columns * (WIDTH + GAP) - GAP, y - GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" viewBox="0 0 {width} '
        f'{height:.0f}" role="img" aria-label="Training curves">{DARK}<rect width="100%" height="100%" '
        f'fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def names_of(paths: Sequence[str]) -> list[str]:
    """A name for each run: the last part of its path, or the whole where two have the same."""
    last = [Path(path).parent.name if Path(path).name == "metrics.jsonl" else Path(path).name for path in paths]
    return [short if short and last.count(short) == 1 else path for path, short in zip(paths, last, strict=True)]


def run(argv: list[str]) -> int:
    """Draw the runs that the command line names."""
    parser = Parser("train curves", "RUN [RUN ...] [options]", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folder of a run, or its metrics.jsonl")
    add("--out", default="curves.svg", metavar="FILE", help="the picture, an SVG (default: curves.svg)")
    parser.writes(out="svg")
    add("--smooth", type=int, metavar="N", help="steps that a mean is taken over (default: a twentieth of the run)")
    args = parser.parse(argv)
    check_least(args, 1, "smooth")
    if len(set(args.runs)) < len(args.runs):
        raise ValueError(f"{max(args.runs, key=args.runs.count)} is named twice: give each run once")
    runs = dict(zip(names_of(args.runs), map(read_run, args.runs), strict=True))
    Path(args.out).write_text(picture(runs, args.smooth), encoding="utf-8")
    said = [f"{name} to step {max(r['step'] for r in records):,}" for name, records in runs.items()]
    print(f"wrote {args.out}: {', '.join(said)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; a user's mistake is one line and exit code 2."""
    return guarded("dlm train curves", run, argv)


if __name__ == "__main__":
    sys.exit(main())

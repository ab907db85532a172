"""How the cost of a pass grows with the canvas: a block with a cache, and the whole canvas without one.

    dlm bench growth --config 25m --canvas 256 512 1024 2048 4096 8192 --threads 2 --plot growth.svg

A canvas of T slots is T - K given tokens and one block of K to fill, one token a pass. With `dual` the passes after the
first compute K slots, which look at T keys; with `none` each computes T slots. What is timed is a turn of the sampler's
own loop, medians over the later passes of a block and over --repeats passes of the whole canvas. The floor is the
larger of a pass's operations over the rate of matrix products and its bytes over the bandwidth, both measured in the
same run.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import dlm
from dlm.benchmarking.charts import Axis, Point, Series, scatter
from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.cli.workload import clock_of, model_options, open_model
from dlm.models.flops import parameters
from dlm.utils.files import write_json
from dlm.utils.hardware import synchronise

if TYPE_CHECKING:
    from dlm.benchmarking.roofline import Limits

NAMES = {"block": "block pass", "full": "full pass"}


def options() -> Parser:
    """The command line."""
    parser = Parser("bench growth", "[options]", __doc__)
    model_options(parser)
    add = parser.add_argument
    add("--canvas", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192], metavar="T", help="slots in all")
    add("--block", type=int, default=32, metavar="K", help="slots of the block, 3 or more (default: 32)")
    add("--repeats", type=int, default=3, metavar="N", help="timed passes of the whole canvas (default: 3)")
    add("--plot", metavar="FILE", help="write a chart there, an SVG")
    parser.writes(json="json", plot="svg")
    return parser


def check(args: Namespace) -> None:
    """Errors (ValueError): numbers that are too small, a canvas without a given token."""
    check_least(args, 3, "block")
    check_least(args, 1, "repeats", "threads")
    for slots in args.canvas:
        if slots <= args.block:
            raise ValueError(f"--canvas has {slots}, which a block of {args.block} leaves no room in: give more")


def turns(model, slots: int, block: int, method: str, passes: int, clock, seed: int) -> list[float]:
    """Seconds of the first `passes` turns of the sampler on a canvas of `slots`, with a block at its end."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    given = torch.randint(0, max(1, model.config.vocab_size - 8), (1, slots - block), generator=generator)
    canvas = dlm.Canvas.from_prompts(given, block, model.config.mask_token_id, device=model.device)
    config = dlm.SamplingConfig(gen_length=block, block_length=block, steps=block, method=method)
    states, times = dlm.denoise(model, canvas, config), []
    for _ in range(passes):
        synchronise(model.device)
        began = clock()
        next(states)
        synchronise(model.device)
        times.append(clock() - began)
    states.close()
    return times


def measure(model, slots: int, block: int, repeats: int, limit: Limits, clock, seed: int = 0) -> dict:
    """One canvas: median seconds of a later pass of the block and of a pass of everything, and their floors."""
    from dlm.benchmarking.roofline import Pass

    later = turns(model, slots, block, "dual", block, clock, seed)[1:]  # the first fills the cache
    repeats = min(repeats, block - 1)
    whole = turns(model, slots, block, "none", repeats + 1, clock, seed)[1:]  # the first meets cold memory

    def least(computed: int, asked: int) -> float:
        return limit.floor(model.config, [Pass(1, computed, slots, asked)])

    return {
        "canvas": slots, "computed": block, "keys": slots,
        "block_seconds": statistics.median(later),
        "block_floor": statistics.median(least(block, asked) for asked in range(1, block)),
        "full_seconds": statistics.median(whole),
        "full_floor": statistics.median(least(slots, block - 1 - n) for n in range(repeats)),
    }  # fmt: skip


def line(row: dict) -> str:
    """A canvas for people, in milliseconds."""
    parts = [f"{row['canvas']:>7,} slots"]
    for key, name in NAMES.items():
        seconds, least = row[f"{key}_seconds"], row[f"{key}_floor"]
        parts.append(f"{name} {1e3 * seconds:10.2f} ms, floor {1e3 * least:9.2f} ({seconds / least:4.2f}x)")
    return "   ".join(parts)


def straight(rows: Sequence[dict], key: str) -> tuple[float, float, float]:
    """Milliseconds (at no slots, for every 1,000 of them) of the line through a pass's costs with the least squares of
    relative errors, and the largest of those."""
    slots = np.array([row["canvas"] for row in rows]) / 1e3
    costs = np.array([1e3 * row[key] for row in rows])
    slope, start = np.polyfit(slots, costs, 1, w=1 / costs)
    return float(start), float(slope), float(np.abs((start + slope * slots) / costs - 1).max())


def summary(rows: Sequence[dict]) -> str:
    """How many times more the longest canvas costs than the shortest, and how well a straight line says it."""
    short, long = rows[0], rows[-1]
    lines = []
    for key, name in NAMES.items():
        times, least = (long[f"{key}_{kind}"] / short[f"{key}_{kind}"] for kind in ("seconds", "floor"))
        words = f"{name}: {long['canvas'] / short['canvas']:g}x the slots, {times:.1f}x the time (floor {least:.1f}x)"
        if len(rows) > 2:
            start, slope, off = straight(rows, f"{key}_seconds")
            words += f"; {start:.2f} ms and {slope:.2f} ms for every 1,000 slots, within {off:.0%}"
        lines.append(words)
    return "\n".join(lines)


def chart(rows: Sequence[dict], title: str, note: str) -> str:
    """Both passes over the canvas as SVG, log axes, their floors dashed."""
    series = []
    for (key, name), colour in zip(NAMES.items(), ("#0072b2", "#d55e00"), strict=True):
        measured = [(row["canvas"], 1e3 * row[f"{key}_seconds"]) for row in rows]
        least = [(row["canvas"], 1e3 * row[f"{key}_floor"]) for row in rows]
        series.append(Series(name, [Point(*place) for place in measured], path=measured, colour=colour))
        series.append(Series(f"{name}, floor", (), path=least, dash="5 4", colour=colour))
    return scatter(title, series, Axis("slots of the canvas"), Axis("milliseconds a pass"), note=note)


def run(argv: Sequence[str]) -> int:
    """Measure the canvases, the shortest first; rows and chart are on the disk before the next one begins."""
    args = options().parse(argv)
    check(args)
    import torch

    from dlm.benchmarking.roofline import limits

    lengths, clock = sorted(set(args.canvas)), clock_of(args)
    model, device = open_model(args, lengths[-1]), torch.device(args.device)  # which `open_model` chose
    limit = limits(args.dtype, device, clock)
    name = args.model or args.config
    print(
        f"{name}: {parameters(model.config) / 1e6:.0f}M parameters, block of {args.block}, {device}, {limit}",
        flush=True,
    )
    turns(model, args.block + 1, args.block, "dual", args.block, clock, args.seed)  # what is made once
    rows, machine = [], limit.record()
    for slots in lengths:
        rows.append(measure(model, slots, args.block, args.repeats, limit, clock, args.seed))
        print(line(rows[-1]), flush=True)
        if args.json:
            write_json(Path(args.json), {"machine": machine, "rows": rows}, indent=1)
        if args.plot:
            title = f"{name}: a block of {args.block} with a cache, and the whole canvas"
            Path(args.plot).write_text(chart(rows, title, str(limit)), encoding="utf-8")
    if len(rows) > 1:
        print(summary(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench growth", run, argv)


if __name__ == "__main__":
    sys.exit(main())

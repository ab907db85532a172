"""Latency, tokens per second and distance from the machine's limit of generation, for a model or a shape.

    dlm bench speed --config 25m --cells none:32:64 dual:32:64 --threads 2 --profile

The limit ("floor") is what the passes of a generation need at least: for each the larger of its operations over the
rate of matrix products and its bytes over the bandwidth, both measured in the same run, at this type and number of
threads. Times are medians of `--repeats` runs after `--warm-up` runs that are not counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import dlm
from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.cli.workload import open_workload, workload_options
from dlm.models.flops import parameters, pass_bytes, pass_flops
from dlm.utils.files import write_json
from dlm.utils.hardware import PeakMemory, synchronise

if TYPE_CHECKING:
    import torch

    from dlm.benchmarking.roofline import Limits, Pass

# ---------------------------------------------------------------- one cell


class Recorder:
    """The predictor that `denoise` uses, with a note of every call in `passes`."""

    def __init__(self, inner, passes: list[Pass]):
        self.inner, self.passes = inner, passes

    def __call__(self, tokens, positions=None, *, cache=None, logits_to_keep=None, **more):
        from dlm.benchmarking.roofline import Pass

        rows, computed = tokens.shape
        asked = computed if logits_to_keep is None else logits_to_keep.shape[1]
        self.passes.append(Pass(rows, computed, computed if cache is None else cache.length, asked))
        return self.inner(tokens, positions, cache=cache, logits_to_keep=logits_to_keep, **more)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


def measure(model, prompts, config, warm_up: int, repeats: int, limit: Limits, clock) -> dict:
    """One cell: the median latency of `generate` and what it follows from."""
    from dlm.kernels.packing import packed
    from dlm.models.predictor import as_predictor

    device, times, passes = model.device, [], []
    for _ in range(warm_up):
        dlm.generate(model, prompts, config)
    watched = Recorder(as_predictor(packed(model)), passes)
    with PeakMemory(device) as memory:
        for _ in range(repeats):
            passes.clear()
            synchronise(device)
            began = clock()
            out = dlm.generate(watched, prompts, config)
            synchronise(device)
            times.append(clock() - began)
    seconds = statistics.median(times)
    flops = sum(p.rows * pass_flops(model.config, p.computed, p.keys, p.asked) for p in passes)
    read = sum(pass_bytes(model.config, p.rows, p.keys, limit.itemsize) for p in passes)
    least = limit.floor(model.config, passes)
    return {
        "method": config.method, "block": config.block_length, "steps": config.steps, "batch": len(prompts),
        "seconds": seconds, "seconds_per_pass": seconds / len(passes), "passes": len(passes),
        "tokens_per_second": len(prompts) * config.gen_length / seconds,
        "positions_computed": int(out.positions_computed.sum()),
        "flops_per_second": flops / seconds, "bytes_per_second": read / seconds,
        "floor": least, "ratio": seconds / least, "peak_memory": memory.bytes,
    }  # fmt: skip


# ---------------------------------------------------------------- where the time goes


class Stopwatch:
    """Seconds by name; time spent in a name within another is the inner one's alone."""

    def __init__(self, device: torch.device, clock):
        self.device, self.clock, self.seconds, self._stack = device, clock, {}, []

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        began = self.clock()
        self._stack.append(0.0)
        try:
            yield
        finally:
            synchronise(self.device)
            took = self.clock() - began
            inside = self._stack.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + took - inside
            if self._stack:
                self._stack[-1] += took

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self.timing(name):
                return function(*args, **kwargs)

        return timed


class _Kernels:
    """transformers' table of attention kernels, each timed."""

    def __init__(self, table, watch: Stopwatch):
        self.table, self.watch = table, watch

    def get_interface(self, *args):
        return self.watch.around("attention", self.table.get_interface(*args))


def profile(model, prompts, config, clock=time.perf_counter) -> dict[str, float]:
    """Shares of one generation's time: body, attention, head, confidence, commit, cache, and host (all the rest); of
    passes that are replayed, which hold attention, head and cache, the pass in their place."""
    from dlm.kernels.cuda_graphs import Graphs
    from dlm.kernels.packing import packed
    from dlm.sampling import step
    from dlm.sampling.commit import COMMITS

    watch = Stopwatch(model.device, clock)
    predictor = packed(model)
    dlm.generate(model, prompts, config)
    commits = {name: watch.around("commit", rule) for name, rule in COMMITS.items()}
    patches = [
        mock.patch.object(step, "decide", watch.around("confidence", step.decide)),
        mock.patch.dict(COMMITS, commits),
    ]
    if isinstance(predictor, Graphs):  # nothing may wait inside of a recording
        patches.append(mock.patch.object(Graphs, "__call__", watch.around("pass", Graphs.__call__)))
    else:
        patches += _inside(model, predictor, watch)
    for patch in patches:
        patch.start()
    try:
        with watch.timing("host"):
            dlm.generate(model, prompts, config)
    finally:
        for patch in reversed(patches):
            patch.stop()
    total = sum(watch.seconds.values())
    return {name: seconds / total for name, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1])}


def _inside(model, predictor, watch: Stopwatch) -> list:
    """What times the parts of a pass: patches."""
    from dlm.kernels import packed as copies
    from dlm.kernels.packing import Direct
    from dlm.models import transformer
    from dlm.models.kv_cache import KVCache

    table = _Kernels(transformer.ALL_ATTENTION_FUNCTIONS, watch)
    patches = [
        mock.patch.object(copies, "attention", watch.around("attention", copies.attention)),
        mock.patch.object(transformer, "ALL_ATTENTION_FUNCTIONS", table),
        mock.patch.object(KVCache, "update", watch.around("cache", KVCache.update)),
    ]
    if isinstance(predictor, Direct):
        table = model.get_output_embeddings()
        if not model.config.weight_tying:
            patches.append(mock.patch.object(table, "forward", watch.around("head", table.forward)))
        patches.append(mock.patch.object(type(model), "forward", watch.around("body", type(model).forward)))
    else:
        patches.append(mock.patch.object(predictor, "head", watch.around("head", predictor.head)))
        patches.append(mock.patch.object(copies.Packed, "__call__", watch.around("body", copies.Packed.__call__)))
    return patches


# ---------------------------------------------------------------- the command


def _line(row: dict) -> str:
    return (
        f"{row['method']:<12} {row['block']:>4} x {row['steps']:<4} {row['seconds']:8.3f} s {row['passes']:>5} passes "
        f"{1e3 * row['seconds_per_pass']:8.2f} ms {row['tokens_per_second']:8.0f} tokens/s "
        f"{row['flops_per_second'] / 1e9:8.0f} GFLOP/s   floor {row['floor']:.3f} s, {row['ratio']:.2f}x"
    )


def run(argv: Sequence[str]) -> int:
    """Measure the cells and print a line for each; the rows are on the disk before the next one begins."""
    parser = Parser("bench speed", "[options]", __doc__)
    workload_options(parser)
    parser.add_argument(
        "--warm-up", type=int, default=1, metavar="N", help="generations a cell that are not counted (default: 1)"
    )
    parser.add_argument("--profile", action="store_true", help="also where the time of each cell goes")
    parser.add_argument(
        "--equal-quality", metavar="FILE",
        help="measure nothing: of a grid's results, the fastest setting within 2%% of the quality of one token a pass",
    )  # fmt: skip
    parser.writes(json="json")
    args = parser.parse(argv)
    check_least(args, 0, "warm_up")
    if args.equal_quality:
        from dlm.benchmarking.equal import equal_quality
        from dlm.benchmarking.results import read_grid

        grid = read_grid(args.equal_quality)
        places = max((cell.get("nfe", 0) * cell.get("tokens_per_forward", 0) for cell in grid.cells), default=0)
        print("\n".join(equal_quality(grid).lines(places)))
        return 0
    import torch

    from dlm.benchmarking.roofline import limits

    work = open_workload(args)
    model, prompts, clock = work.model, work.prompts.tolist(), work.clock
    limit = limits(args.dtype, torch.device(args.device), clock)
    print(f"{parameters(model.config) / 1e6:.0f}M parameters, {args.device}, {limit}", flush=True)
    rows, machine = [], limit.record()
    for method, block, steps in work.cells:
        config = dlm.SamplingConfig(gen_length=args.gen_length, block_length=block, steps=steps, method=method)
        row = measure(model, prompts, config, args.warm_up, args.repeats, limit, clock)
        print(_line(row), flush=True)
        if args.profile:
            row["profile"] = profile(model, prompts, config, clock)
            print("    " + "  ".join(f"{name} {share:.0%}" for name, share in row["profile"].items()), flush=True)
        rows.append(row)
        if args.json:
            write_json(Path(args.json), {"machine": machine, "rows": rows}, indent=1)
    if len(rows) > 1:
        seconds, least = sum(row["seconds"] for row in rows), sum(row["floor"] for row in rows)
        print(f"{len(rows)} cells: {seconds:.3f} s   floor {least:.3f} s, {seconds / least:.2f}x")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench speed", run, argv)


if __name__ == "__main__":
    sys.exit(main())

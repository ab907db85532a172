"""What the parts of `benchmarks.gpu` measure with: the model that they share, and times of a generation's turns.

Shapes: B rows, T slots. A turn of the loop is one pass of every row. Times are of the device, by events.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import cached_property

import torch

import dlm
from dlm import SamplingConfig
from dlm.benchmarking.roofline import Pass, limits
from dlm.kernels.cuda_graphs import Graphs
from dlm.kernels.packing import packed
from dlm.models.shapes import random_model
from dlm.utils.hardware import synchronise
from dlm.utils.jsonio import to_json

PROMPT = 32


class Bench:
    """What the parts share: the options, the file of results, the model and its predictors."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.results = (args.out / "results.jsonl").open("a")
        self.part = ""

    def write(self, **fields) -> None:
        """A line of results, on the disk and on the screen."""
        record = {"part": self.part, **fields}
        self.results.write(to_json(record) + "\n")
        self.results.flush()
        os.fsync(self.results.fileno())
        print(to_json(record), flush=True)

    @cached_property
    def limit(self):
        return limits(self.args.dtype, self.device)

    @cached_property
    def model(self):
        return random_model(self.args.config, dtype=getattr(torch, self.args.dtype), device=self.device, length=4096)

    @cached_property
    def replayed(self) -> Graphs:
        """The model's passes, replayed; on a CPU by a stand-in that runs them again."""
        plain = packed(self.model)
        if self.args.torch_kernels:
            plain.kernels = None
        return Graphs(plain) if self.cuda else Graphs(plain, again)

    def prompts(self, batch: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.model.config.vocab_size - 8, (batch, PROMPT), generator=generator).tolist()

    def free(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()


def again(function, pool):
    """A recorder for a processor: what is replayed is run again, and its result lies where it lay."""
    result = function().clone()
    return lambda: result.copy_(function()), result


class Ticks:
    """Points in time on the device."""

    def __init__(self, cuda: bool):
        self.cuda, self.points = cuda, []

    def tick(self) -> None:
        if self.cuda:
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each and the next."""
        pairs = list(zip(self.points, self.points[1:], strict=False))
        if not self.cuda:
            return [1e3 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def run(bench: Bench, predictor, batch: int, config: SamplingConfig, turns: int | None = None) -> dict:
    """A generation, or its first turns: milliseconds of each turn by the slots that a row computes in it."""
    prompts = bench.prompts(batch)
    canvas = dlm.Canvas.from_prompts(prompts, config.gen_length, bench.model.config.mask_token_id, device=bench.device)
    ticks, computed, before = Ticks(bench.cuda), [], 0
    synchronise(bench.device)
    began = time.perf_counter()
    ticks.tick()
    for state in dlm.denoise(predictor, canvas, config):
        ticks.tick()
        total = int(state.positions_computed[0])
        computed.append(total - before)
        before = total
        if state.step == turns:
            break
    host = time.perf_counter() - began
    synchronise(bench.device)
    seconds = time.perf_counter() - began
    kinds: dict[int, list[float]] = {}
    for slots, each in zip(computed, ticks.milliseconds(), strict=True):
        kinds.setdefault(slots, []).append(each)
    return {
        "seconds": seconds, "host_seconds": host, "turns": len(computed),
        "ms": {str(slots): round(statistics.median(each), 3) for slots, each in kinds.items()},
        "ms_mean": {str(slots): round(statistics.fmean(each), 3) for slots, each in kinds.items()},
    }  # fmt: skip


def whole(bench: Bench, config: SamplingConfig, found: dict, batch: int) -> dict:
    """What a whole generation takes by the turns that were timed, and its floor. One prompt of PROMPT tokens."""
    slots, blocks = PROMPT + config.gen_length, config.gen_length // config.block_length
    cached = config.method != "none"
    steps = config.steps or config.gen_length
    firsts = blocks if cached else steps
    asked = config.block_length
    kinds = [(slots, firsts)] + ([(asked, steps - blocks)] if cached and steps > blocks else [])
    seconds = sum(count * found["ms_mean"].get(str(computed), float("nan")) for computed, count in kinds) / 1e3
    passes = [Pass(batch, computed, slots, asked) for computed, count in kinds for _ in range(count)]
    floor = bench.limit.floor(bench.model.config, passes)
    floors = {
        str(c): round(1e3 * bench.limit.floor(bench.model.config, [Pass(batch, c, slots, asked)]), 3) for c, _ in kinds
    }
    return {
        "estimated_seconds": round(seconds, 3), "floor_seconds": round(floor, 3), "ratio": round(seconds / floor, 3),
        "floor_ms": floors, "tokens_per_second": round(batch * config.gen_length / seconds, 1),
    }  # fmt: skip


def cell(
    bench: Bench,
    name: str,
    predictor,
    method: str,
    batch: int,
    steps: int,
    *,
    turns: int | None,
    warm: int,
    block: int = 32,
) -> None:
    """One line of results: warm-up turns, then the turns that are timed (None: the whole generation)."""
    length = bench.args.gen_length
    config = SamplingConfig(gen_length=length, block_length=min(block, length), steps=steps, method=method)
    run(bench, predictor, batch, config, warm)
    timing = run(bench, predictor, batch, config, turns)
    bench.write(
        name=name, method=method, batch=batch, steps=steps, block=config.block_length, whole=turns is None,
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in timing.items()},
        **whole(bench, config, timing, batch),
    )  # fmt: skip


def timed(bench: Bench, work: Callable[[], object], calls: int = 20) -> float:
    """Microseconds of one call: the median over replays of a recording of `calls`, which no launch holds up."""

    def several() -> None:
        for _ in range(calls):
            work()

    work()
    if bench.cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        several = graph.replay
    ticks = Ticks(bench.cuda)
    for _ in range(8):
        ticks.tick()
        several()
    ticks.tick()
    return round(1e3 * statistics.median(ticks.milliseconds()) / calls, 2)

"""The parts of `benchmarks.gpu`, in one process: each is a function of a `Bench`, which holds the model they share.

Shapes: B rows, T slots. A turn of the loop is one pass of every row. Times are of the device, by events.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from unittest import mock

import torch

import dlm
from dlm import SamplingConfig
from dlm.benchmarking.roofline import Pass, limits
from dlm.kernels import packed as packing
from dlm.kernels.available import triton_kernels
from dlm.kernels.cuda_graphs import Graphs
from dlm.kernels.linear import quantize_
from dlm.kernels.packed import Packed, packed
from dlm.models.shapes import random_model
from dlm.sampling import denoise as loop
from dlm.utils.hardware import commit, hardware, synchronise, versions

PROMPT = 32


class Late(Exception):
    """A part is not done in its time."""


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
        self.results.write(json.dumps(record) + "\n")
        self.results.flush()
        os.fsync(self.results.fileno())
        print(json.dumps(record), flush=True)

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


def using(predictor):
    """`denoise` with that predictor, whatever the model's packed copy is."""
    return mock.patch.object(loop, "packed", lambda model: predictor)


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
    with using(predictor):
        ticks.tick()
        for state in dlm.denoise(bench.model, canvas, config):
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
    floors = {str(c): round(1e3 * bench.limit.floor(bench.model.config, [Pass(batch, c, slots, asked)]), 3) for c, _ in kinds}
    return {
        "estimated_seconds": round(seconds, 3), "floor_seconds": round(floor, 3), "ratio": round(seconds / floor, 3),
        "floor_ms": floors, "tokens_per_second": round(batch * config.gen_length / seconds, 1),
    }  # fmt: skip


def cell(
    bench: Bench, name: str, predictor, method: str, batch: int, steps: int, *, turns: int | None, warm: int, block: int = 32
) -> None:
    """One line of results: warm-up turns, then the turns that are timed (None: the whole generation)."""
    length = bench.args.gen_length
    config = SamplingConfig(gen_length=length, block_length=min(block, length), steps=steps, method=method)
    run(bench, predictor, batch, config, warm)
    found = run(bench, predictor, batch, config, turns)
    bench.write(
        name=name, method=method, batch=batch, steps=steps, block=config.block_length, whole=turns is None,
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()},
        **whole(bench, config, found, batch),
    )  # fmt: skip


# ---------------------------------------------------------------- parts


def machine(bench: Bench) -> None:
    bench.write(hardware=hardware(), commit=commit(), **versions())
    bench.write(triton=triton_kernels(bench.device) is not None)


def equal(bench: Bench) -> None:
    """Tokens of the plain model, of its packed copy and of replayed passes, and the logits' errors."""
    shapes = [("small", None, torch.float32, (64, 16, 16))]
    shapes += [(bench.args.config, 2, dtype, (64, 32, 16)) for dtype in (torch.float32, torch.bfloat16)]
    for name, layers, dtype, (length, block, steps) in shapes:
        model = random_model(name, dtype=dtype, device=bench.device, length=1024, layers=layers)
        copy = packed(model)
        graphs = Graphs(copy) if bench.cuda else Graphs(copy, again)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(0, 1000, (n,), generator=generator).tolist() for n in (32, 17, 9)]
        tokens = torch.tensor([prompts[0] + [model.config.mask_token_id] * 32], device=bench.device)
        with torch.inference_mode():
            want, got = model(tokens).double(), copy(tokens).double()
        apart = float(((got - want).square().mean() / want.square().mean()).sqrt())
        bench.write(shape=name, layers=model.config.n_layers, dtype=str(dtype), logits_apart=apart, packed=type(copy).__name__)
        for method in ("none", "dual", "c2f"):
            config = SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
            same, plain_same = [], []
            for rows in ([prompts[0]], [prompts[0][::-1]], prompts, prompts[::-1]):
                answers = []
                for predictor in (model, copy, graphs):
                    with using(predictor):
                        answers.append(dlm.generate(model, rows, config).sequences)
                plain_same.append(float((answers[0] == answers[1]).float().mean()))
                same.append(float((answers[1] == answers[2]).float().mean()))
            bench.write(shape=name, dtype=str(dtype), method=method, packed_as_plain=plain_same, graphs_as_packed=same)
        del model, copy, graphs
        packing._COPIES.clear()
        bench.free()


def dual(bench: Bench) -> None:
    bench.write(limit=str(bench.limit), rate=bench.limit.rate, bandwidth=bench.limit.width)
    began = time.perf_counter()
    model = bench.model
    synchronise(bench.device)
    made = time.perf_counter()
    replayed = bench.replayed
    synchronise(bench.device)
    memory = torch.cuda.memory_allocated() / 1e9 if bench.cuda else None
    bench.write(model_seconds=made - began, packing_seconds=time.perf_counter() - made, memory_gb=memory,
                parameters=sum(w.numel() for w in model.parameters()))  # fmt: skip
    length = bench.args.gen_length
    cell(bench, "graphs", replayed, "dual", 1, length, turns=None, warm=40)
    cell(bench, "graphs", replayed, "dual", 1, length // 8, turns=None, warm=1)


def none(bench: Bench) -> None:
    cell(bench, "graphs", bench.replayed, "none", 1, bench.args.gen_length, turns=64, warm=4)


def c2f(bench: Bench) -> None:
    cell(bench, "graphs", bench.replayed, "c2f", 1, bench.args.gen_length, turns=None, warm=4)


def eager(bench: Bench) -> None:
    plain = bench.replayed.predictor
    cell(bench, "eager", plain, "dual", 1, bench.args.gen_length, turns=64, warm=36)
    cell(bench, "eager", plain, "none", 1, bench.args.gen_length, turns=12, warm=2)
    if isinstance(plain, Packed):
        kernels, plain.kernels = plain.kernels, None
        try:
            cell(bench, "eager, torch's kernels", plain, "dual", 1, bench.args.gen_length, turns=64, warm=36)
        finally:
            plain.kernels = kernels
    cell(bench, "plain model", bench.model, "dual", 1, bench.args.gen_length, turns=40, warm=3)


def batch(bench: Bench) -> None:
    for rows in (8, 32):
        cell(bench, "graphs", bench.replayed, "dual", rows, bench.args.gen_length, turns=66, warm=34)
        bench.free()


def profile(bench: Bench) -> None:
    """Of eight turns of `dual`: launches, waits of the host, and the device's time by kernel."""
    length = bench.args.gen_length
    config = SamplingConfig(gen_length=length, block_length=min(32, length), steps=length, method="dual")
    predictors = {"graphs": bench.replayed, "eager": bench.replayed.predictor}
    for name, predictor in predictors.items():
        bench.write(name=name, waits=waits(bench, predictor, config))
    for name, predictor in predictors.items():
        bench.write(name=name, **profiled(bench, predictor, config))


def waits(bench: Bench, predictor, config: SamplingConfig) -> dict:
    """Where the host waited for the device, by line, in turns 10 to 25 of a generation."""
    if not bench.cuda:
        return {}
    canvas = dlm.Canvas.from_prompts(
        bench.prompts(1), config.gen_length, bench.model.config.mask_token_id, device=bench.device
    )
    found = Counter()
    with using(predictor), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for state in dlm.denoise(bench.model, canvas, config):
            if state.step == 10:
                seen.clear()
                torch.cuda.set_sync_debug_mode("warn")
            if state.step == 25:
                break
        torch.cuda.set_sync_debug_mode("default")
    for each in seen:
        if "synchroniz" in str(each.message):
            found[f"{Path(each.filename).name}:{each.lineno}"] += 1
    return {"turns": 15, **found}


def profiled(bench: Bench, predictor, config: SamplingConfig) -> dict:
    from torch.profiler import ProfilerActivity

    canvas = dlm.Canvas.from_prompts(
        bench.prompts(1), config.gen_length, bench.model.config.mask_token_id, device=bench.device
    )
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    turns, profiler = 8, torch.profiler.profile(activities=activities)
    with using(predictor):
        for state in dlm.denoise(bench.model, canvas, config):
            if state.step == 10:
                synchronise(bench.device)
                profiler.start()
            if state.step == 10 + turns:
                synchronise(bench.device)
                profiler.stop()
                break
    rows = profiler.key_averages()
    called = {row.key: row.count / turns for row in rows if row.key.startswith("cu") or "Synchronize" in row.key}
    kernels = [
        (row.key, row.count / turns, row.self_device_time_total / turns / 1e3)
        for row in rows
        if "CUDA" in str(row.device_type)
    ]
    kernels.sort(key=lambda each: -each[2])
    return {
        "turns": turns, "calls_a_turn": called, "kernels_a_turn": sum(count for _, count, _ in kernels),
        "device_ms_a_turn": round(sum(ms for _, _, ms in kernels), 3),
        "kernels": [[key[:90], count, round(ms, 4)] for key, count, ms in kernels[:40]],
    }  # fmt: skip


def pieces(bench: Bench) -> None:
    """What one way or another of a pass takes: torch's kernels in place of ours, ways of attention, products."""
    plain, length = bench.replayed.predictor, bench.args.gen_length
    if isinstance(plain, Packed):
        kernels, plain.kernels = plain.kernels, None
        try:
            graphs = Graphs(plain) if bench.cuda else Graphs(plain, again)
            cell(bench, "graphs, torch's kernels", graphs, "dual", 1, length, turns=64, warm=36)
        finally:
            plain.kernels = kernels
            del graphs
    if not bench.cuda:
        return
    config, dtype = bench.model.config, getattr(torch, bench.args.dtype)
    keys, heads, size = PROMPT + length, config.n_heads, config.head_dim
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def randn(*shape):
        return torch.randn(*shape, device=bench.device, dtype=dtype)

    for rows, queries in ((1, 32), (1, keys), (32, 32), (32, keys)):
        q = randn(rows, queries, heads, size).transpose(1, 2)
        k, v = (randn(rows, config.n_kv_heads, keys, size) for _ in range(2))
        mask = torch.zeros(rows, 1, queries, keys, device=bench.device, dtype=dtype)
        found = {}
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "default"):
            for masked in (None, mask):
                try:
                    if backend == "default":
                        took = timed(bench, lambda masked=masked: packing.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), masked))
                    else:
                        with sdpa_kernel(getattr(SDPBackend, backend)):
                            took = timed(bench, lambda masked=masked: torch.nn.functional.scaled_dot_product_attention(q, k, v, masked))
                    found[f"{backend}{'' if masked is None else ' masked'}"] = took
                except RuntimeError as error:
                    found[f"{backend}{'' if masked is None else ' masked'}"] = str(error)[:80]
        bench.write(attention=[rows, queries, keys], microseconds=found)
    width, hidden = config.d_model, config.mlp_hidden_size
    for rows in (32, keys, 1024):
        found = {}
        for name, outputs, inputs in (("qkv", 3 * width, width), ("out", width, width), ("gate_up", 2 * hidden, width), ("down", width, hidden), ("head", config.embedding_size, width)):
            weights = [randn(outputs, inputs) for _ in range(max(1, int(2e8 / outputs / inputs)))]
            x, turn = randn(rows, inputs), [0]

            def product(x=x, weights=weights, turn=turn):
                turn[0] += 1
                return torch.nn.functional.linear(x, weights[turn[0] % len(weights)])

            took = timed(bench, product)
            found[name] = [took, round(outputs * inputs * 2 / took / 1e6, 3)]
        bench.write(products=rows, microseconds_and_tb_per_second=found)


def timed(bench: Bench, work: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds of one call, the median, by events around each."""
    ticks = Ticks(bench.cuda)
    for _ in range(3):
        work()
    for _ in range(repeats):
        ticks.tick()
        work()
    ticks.tick()
    return round(1e3 * statistics.median(ticks.milliseconds()), 2)


def eight_bits(bench: Bench) -> None:
    """fp8: which products of the real sizes have a scale a row, what they take, and a generation. Changes the model."""
    from dlm.kernels import fp8

    config, few = bench.model.config, "fp8" if bench.cuda else "int8"
    width, hidden = config.d_model, config.mlp_hidden_size
    if bench.cuda:
        for outputs, inputs in ((3 * width, width), (width, width), (2 * hidden, width), (width, hidden)):
            weight, scale = fp8.quantise(torch.randn(outputs, inputs, device=bench.device, dtype=torch.bfloat16))
            found = {}
            for rows in (1, 17, 32, 544, 1024):
                x, x_scale = fp8.quantise(torch.randn(rows, inputs, device=bench.device, dtype=torch.bfloat16))
                try:
                    took = timed(bench, lambda: fp8._product(x, x_scale, weight, scale[:, 0], None))
                    found[rows] = [took, "afterwards" if fp8.REFUSED else "a row"]
                    fp8.REFUSED.clear()
                except RuntimeError as error:
                    found[rows] = str(error)[:120]
            bench.write(outputs=outputs, inputs=inputs, microseconds_and_scales=found)
            del weight, scale
    packing._COPIES.clear()
    bench.__dict__.pop("replayed", None)
    bench.free()
    if few == "int8" and bench.model.dtype != torch.float32:
        return
    quantize_(bench.model, few)
    bench.free()
    length = bench.args.gen_length
    cell(bench, few, bench.replayed, "dual", 1, length, turns=None, warm=36)
    cell(bench, few, bench.replayed, "none", 1, length, turns=24, warm=4)
    if bench.cuda:
        bench.write(refused=[str(each) for each in sorted(fp8.REFUSED, key=str)])


def grid(bench: Bench) -> None:
    """One question of the grid (none, dual, c2f; blocks and steps of powers of two): passes of every kind are timed, and
    the cells' times are added up from them; three cells are run as a whole beside that."""
    length = bench.args.gen_length
    powers = [2**i for i in range(length.bit_length()) if 2**i <= length]
    kinds, total, floor, cells = {}, 0.0, 0.0, 0
    for method in ("none", "dual", "c2f"):
        for block in reversed(powers if method != "none" else [length]):
            config = SamplingConfig(gen_length=length, block_length=block, method=method)
            run(bench, bench.replayed, 1, config, min(length, block + 2))  # both kinds are recorded by their second time
            run(bench, bench.replayed, 1, config, 1)
            kinds[method, block] = run(bench, bench.replayed, 1, config, min(length, block + 4))["ms_mean"]
    for method in ("none", "dual", "c2f"):
        for block in powers:
            for steps in powers:
                if steps < length // block:
                    continue
                ms = kinds[method, block if method != "none" else length]
                found = {"ms_mean": ms, "ms": ms}
                config = SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
                ours = whole(bench, config, found, 1)
                total, floor, cells = total + ours["estimated_seconds"], floor + ours["floor_seconds"], cells + 1
    bench.write(cells=cells, estimated_seconds=round(total, 1), floor_seconds=round(floor, 1),
                ms={f"{method}:{block}": ms for (method, block), ms in kinds.items()})  # fmt: skip
    for method, block in (("none", 8), ("dual", 8), ("c2f", 64)):
        cell(bench, "whole cell", bench.replayed, method, 1, max(64, length // block), turns=None, warm=1, block=block)


def peers(bench: Bench) -> None:
    """Fast-dLLM beside us, warmed up at the measured shape."""
    if not bench.args.fast_dllm:
        return
    from benchmarks import peers as side

    model = bench.model
    samplers = side.load_peers([f"fast-dllm={bench.args.fast_dllm}"], model)["fast-dllm"]
    prompt = torch.tensor(bench.prompts(1), device=bench.device)
    length, block = bench.args.gen_length, min(32, bench.args.gen_length)

    def ours(prompt, length, block, steps, method="dual"):
        config = SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
        with using(bench.replayed):
            return dlm.generate(model, prompt, config).canvas.tokens

    both = {"fast-dllm": samplers["dual"], "ours": ours}
    for steps in (length // 8, length):
        side.compare(both, prompt, length, block, 2 * length // block, 1, time.perf_counter)  # warm, every shape
        found = side.compare(both, prompt, length, block, steps, 1, time.perf_counter)
        bench.write(**side.report(("dual", block, steps), found))


def training(bench: Bench) -> None:
    """Steps of the trainer at a shape of its own."""
    from benchmarks import training as steps

    for name in ("model", "replayed"):
        bench.__dict__.pop(name, None)
    packing._COPIES.clear()
    bench.free()
    argv = ["--config", bench.args.train_config, "--device", bench.args.device, "--json", str(bench.args.out / "training.json")]
    if bench.cuda:
        argv += ["--length", "2048", "--batch", "8", "--precision", "bf16", "--compile", "both"]
        argv += ["--attn-implementation", "flex_attention"]
    else:
        argv += ["--length", "64", "--batch", "2", "--steps", "2", "--warm-up", "1"]
    steps.run(argv)


PARTS: dict[str, Callable[[Bench], None]] = {
    "machine": machine, "equal": equal, "dual": dual, "none": none, "eager": eager, "batch": batch,
    "profile": profile, "pieces": pieces, "c2f": c2f, "grid": grid, "peers": peers, "eight_bits": eight_bits,
    "training": training,
}  # fmt: skip


def after_tests(bench: Bench, until: float) -> None:
    """Waits for the tests, which use the same GPU."""
    while not (bench.args.out / ".tests_done").exists() and time.time() < until:
        time.sleep(0.2)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_parts")
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--device", required=True)
    add("--config", required=True)
    add("--dtype", required=True)
    add("--gen-length", type=int, required=True)
    add("--train-config", required=True)
    add("--fast-dllm")
    add("--until", type=float, required=True)
    add("--parts", nargs="+", required=True)
    args = parser.parse_args(argv)
    bench = Bench(args)

    def late(*_):
        raise Late

    signal.signal(signal.SIGALRM, late)
    for word in args.parts:
        name, seconds = word.split(":")
        if name not in ("machine", "equal"):
            after_tests(bench, args.until)
        left = min(float(seconds), args.until - time.time() - 1)
        if left < 2:
            print(f"no time for {name}", flush=True)
            break
        bench.part = name
        bench.write(state="begun")
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            PARTS[name](bench)
            synchronise(bench.device)
            signal.setitimer(signal.ITIMER_REAL, 0)
            bench.write(state="done", took=round(time.perf_counter() - began, 2))
        except Late:
            bench.write(state="late", took=round(time.perf_counter() - began, 2))
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            bench.write(state="failed", error=f"{type(error).__name__}: {error}"[:500], at=traceback.format_exc()[-1500:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if bench.cuda and not alive(bench):
            return 3
    return 0


def alive(bench: Bench) -> bool:
    """Whether the device still computes: a fault in a kernel is for good."""
    try:
        torch.cuda.synchronize()
        return int(torch.ones(2, device=bench.device).sum()) == 2
    except RuntimeError:
        return False


if __name__ == "__main__":
    sys.exit(main())

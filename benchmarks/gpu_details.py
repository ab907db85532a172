"""Parts of `benchmarks.gpu` that look inside of a pass: launches and waits, ways of attention, products, eight bits.

Shapes: B rows, Q queries, T keys, H heads, D head size; N rows of a product.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity

import dlm
from benchmarks.gpu_bench import PROMPT, Bench, again, cell, timed
from dlm import Canvas, SamplingConfig
from dlm.benchmarking.roofline import limits
from dlm.kernels import fp8, packing
from dlm.kernels.cuda_graphs import Graphs
from dlm.kernels.linear import quantize_
from dlm.kernels.packed import Packed, attention
from dlm.utils.hardware import synchronise


def profile(bench: Bench) -> None:
    """Of eight turns of `dual`: launches, waits of the host, and the device's time by kernel."""
    length = bench.args.gen_length
    config = SamplingConfig(gen_length=length, block_length=min(32, length), steps=length, method="dual")
    predictors = {"graphs": bench.replayed, "eager": bench.replayed.predictor}
    for name, predictor in predictors.items():
        bench.write(name=name, waits=waits(bench, predictor, config))
    for name, predictor in predictors.items():
        bench.write(name=name, method="dual", **profiled(bench, predictor, config))
    config = SamplingConfig(gen_length=length, block_length=min(32, length), steps=length, method="none")
    bench.write(name="graphs", method="none", **profiled(bench, bench.replayed, config))


def waits(bench: Bench, predictor, config: SamplingConfig) -> dict:
    """Where the host waited for the device, by line, in turns 10 to 25 of a generation."""
    if not bench.cuda:
        return {}
    canvas = Canvas.from_prompts(
        bench.prompts(1), config.gen_length, bench.model.config.mask_token_id, device=bench.device
    )
    places = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for state in dlm.denoise(predictor, canvas, config):
            if state.step == 10:
                seen.clear()
                torch.cuda.set_sync_debug_mode("warn")
            if state.step == 25:
                break
        torch.cuda.set_sync_debug_mode("default")
    for each in seen:
        if "synchroniz" in str(each.message):
            places[f"{Path(each.filename).name}:{each.lineno}"] += 1
    return {"turns": 15, **places}


def profiled(bench: Bench, predictor, config: SamplingConfig) -> dict:
    canvas = Canvas.from_prompts(
        bench.prompts(1), config.gen_length, bench.model.config.mask_token_id, device=bench.device
    )
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    turns, profiler = 8, torch.profiler.profile(activities=activities)
    for state in dlm.denoise(predictor, canvas, config):
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
    plain = bench.replayed.predictor
    if isinstance(plain, Packed):
        kernels, plain.kernels = plain.kernels, None
        try:
            graphs = Graphs(plain) if bench.cuda else Graphs(plain, again)
            cell(bench, "graphs, torch's kernels", graphs, "dual", 1, bench.args.gen_length, turns=64, warm=36)
            del graphs
        finally:
            plain.kernels = kernels
    if bench.cuda:
        _attention(bench)
        _products(bench)


def _randn(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device, dtype=getattr(torch, bench.args.dtype))


def _attention(bench: Bench) -> None:
    config, keys = bench.model.config, PROMPT + bench.args.gen_length
    for rows, queries in ((1, 32), (1, keys), (32, 32), (32, keys)):
        q = _randn(bench, rows, queries, config.n_heads, config.head_dim).transpose(1, 2)
        k, v = (_randn(bench, rows, config.n_kv_heads, keys, config.head_dim) for _ in range(2))
        mask, times = _randn(bench, rows, 1, queries, keys), {}
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "default"):
            for name, bias in ((backend, None), (f"{backend} masked", mask)):
                try:
                    if backend == "default":
                        ours = partial(attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
                        times[name] = timed(bench, ours)
                    else:
                        with sdpa_kernel(getattr(SDPBackend, backend)):
                            times[name] = timed(bench, partial(F.scaled_dot_product_attention, q, k, v, bias))
                except RuntimeError as error:
                    times[name] = str(error)[:80]
        bench.write(attention=[rows, queries, keys], microseconds=times)


def _products(bench: Bench) -> None:
    """Of N rows with each of a layer's weights; several copies in turn, so that none is in the cache."""
    config = bench.model.config
    width, hidden = config.d_model, config.mlp_hidden_size
    sizes = {"qkv": (3 * width, width), "out": (width, width), "gate_up": (2 * hidden, width)}
    sizes |= {"down": (width, hidden), "head": (config.embedding_size, width)}
    for rows in (32, PROMPT + bench.args.gen_length, 1024):
        times = {}
        for name, (outputs, inputs) in sizes.items():
            copies = max(2, int(2e8 / outputs / inputs))
            ways = [_randn(bench, outputs, inputs) for _ in range(copies)]
            x, turn = _randn(bench, rows, inputs), iter(range(10**9))
            took = timed(bench, partial(_next_product, x, ways, turn))
            times[name] = [took, round(outputs * inputs * 2 / took / 1e6, 3)]
        bench.write(products=rows, microseconds_and_tb_per_second=times)


def _next_product(x, weights, turn):
    return F.linear(x, weights[next(turn) % len(weights)])


def eight_bits(bench: Bench) -> None:
    """fp8: which products of the real sizes have a scale a row, what they take, and a generation. Changes the model."""
    config = bench.model.config
    width, hidden = config.d_model, config.mlp_hidden_size
    if not bench.cuda:
        return
    for outputs, inputs in ((3 * width, width), (width, width), (2 * hidden, width), (width, hidden)):
        weight, scale = fp8.quantise(_randn(bench, outputs, inputs))
        times = {}
        for rows in (1, 17, 32, 544, 1024):
            x, x_scale = fp8.quantise(_randn(bench, rows, inputs))
            try:
                took = timed(bench, partial(fp8._product, x, x_scale, weight, scale[:, 0], None))
                times[rows] = [took, "scales afterwards" if fp8.REFUSED else "a scale a row"]
            except RuntimeError as error:
                times[rows] = str(error)[:120]
            fp8.REFUSED.clear()
        bench.write(outputs=outputs, inputs=inputs, microseconds=times)
        del weight, scale
    packing._COPIES.clear()
    bench.__dict__.pop("replayed", None)
    bench.free()
    quantize_(bench.model, "fp8")
    bench.free()
    bench.__dict__["limit"] = limits("fp8", bench.device)  # for floors; it takes the head's weights for fp8 too
    bench.write(limit=str(bench.limit))
    length = bench.args.gen_length
    cell(bench, "fp8", bench.replayed, "dual", 1, length, turns=None, warm=36)
    cell(bench, "fp8", bench.replayed, "none", 1, length, turns=24, warm=4)
    bench.write(refused=[str(each) for each in sorted(fp8.REFUSED, key=str)])

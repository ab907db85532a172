"""The parts of `benchmarks.gpu`, in one process: each is a function of a `Bench`, which holds the model they share."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import dlm
from benchmarks.gpu_bench import Bench, again, cell, run, whole
from benchmarks.gpu_details import eight_bits, pieces, profile
from dlm import SamplingConfig
from dlm.kernels import packing
from dlm.kernels.available import triton_kernels
from dlm.kernels.cuda_graphs import Graphs
from dlm.kernels.packed import Packed
from dlm.kernels.packing import Direct, packed
from dlm.models.shapes import random_model
from dlm.utils.hardware import commit, hardware, synchronise, versions


class Late(Exception):
    """A part is not done in its time."""


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
            want, got = model.predict(tokens).double(), copy(tokens).double()
        apart = float(((got - want).square().mean() / want.square().mean()).sqrt())
        bench.write(
            shape=name, layers=model.config.n_layers, dtype=str(dtype), logits_apart=apart, packed=type(copy).__name__
        )
        for method in ("none", "dual", "c2f"):
            config = SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
            same, plain_same = [], []
            for rows in ([prompts[0]], [prompts[0][::-1]], prompts, prompts[::-1]):
                answers = []
                for predictor in (Direct(model), copy, graphs):
                    answers.append(dlm.generate(predictor, rows, config).sequences)
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


def grid(bench: Bench) -> None:
    """One question of the grid (none, dual, c2f; blocks and steps are powers of two): passes of every kind are timed,
    and the cells' times are added up from them; three cells are run as a whole beside that."""
    length = bench.args.gen_length
    powers = [2**i for i in range(length.bit_length()) if 2**i <= length]
    kinds, total, floor, cells = {}, 0.0, 0.0, 0
    for method in ("none", "dual", "c2f"):
        for block in reversed(powers if method != "none" else [length]):
            passes = min(length, max(2 * length // block, 2))  # two a block: both kinds come again and again
            config = SamplingConfig(gen_length=length, block_length=block, steps=passes, method=method)
            for _ in range(2):  # what comes a second time is recorded
                run(bench, bench.replayed, 1, config, min(passes, 4))
            kinds[method, block] = run(bench, bench.replayed, 1, config, min(passes, 8))["ms_mean"]
    for method in ("none", "dual", "c2f"):
        for block in powers:
            for steps in powers:
                if steps < length // block:
                    continue
                ms = kinds[method, block if method != "none" else length]
                timing = {"ms_mean": ms, "ms": ms}
                config = SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
                ours = whole(bench, config, timing, 1)
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
        return dlm.generate(bench.replayed, prompt, config).canvas.tokens

    both = {"fast-dllm": samplers["dual"], "ours": ours}
    for steps in (length // 8, length):
        side.compare(both, prompt, length, block, 2 * length // block, 1, time.perf_counter)  # warm, every shape
        cells = side.compare(both, prompt, length, block, steps, 1, time.perf_counter)
        bench.write(**side.report(("dual", block, steps), cells))


def training(bench: Bench) -> None:
    """Steps of the trainer at a shape of its own."""
    from benchmarks import training as trainer

    for name in ("model", "replayed"):
        bench.__dict__.pop(name, None)
    packing._COPIES.clear()
    bench.free()
    argv = [
        "--config",
        bench.args.train_config,
        "--device",
        bench.args.device,
        "--json",
        str(bench.args.out / "training.json"),
    ]
    if bench.cuda:
        argv += ["--length", "2048", "--batch", "8", "--precision", "bf16", "--compile", "both"]
        argv += ["--attn-implementation", "flex_attention"]
    else:
        argv += ["--length", "64", "--batch", "2", "--steps", "2", "--warm-up", "1"]
    trainer.run(argv)


PARTS: dict[str, Callable[[Bench], None]] = {
    "machine": machine, "equal": equal, "dual": dual, "none": none, "eager": eager, "batch": batch,
    "profile": profile, "pieces": pieces, "c2f": c2f, "grid": grid, "peers": peers, "eight_bits": eight_bits,
    "training": training,
}  # fmt: skip


def after_tests(bench: Bench, until: float) -> None:
    """Waits for the tests, which use the same GPU."""
    while not (bench.args.out / ".tests_done").exists() and time.time() < until:
        time.sleep(0.2)


def perform(argv=None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_parts")
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--device", required=True)
    add("--config", required=True)
    add("--dtype", required=True)
    add("--gen-length", type=int, required=True)
    add("--train-config", required=True)
    add("--fast-dllm")
    add("--torch-kernels", action="store_true", help="passes in torch's kernels alone, where ours broke")
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
            bench.write(
                state="failed", error=f"{type(error).__name__}: {error}"[:500], at=traceback.format_exc()[-1500:]
            )
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
    sys.exit(perform())

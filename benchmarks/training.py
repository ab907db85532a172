"""Tokens per second and share of the machine's peak (MFU) of training steps, for a shape with random weights.

    dlm bench training --config 25m --length 256 --batch 16 --precision bf16 --loss-chunk auto 0 --threads 2

A step is the trainer's own: rows fetched, noise drawn, forward, backward, gradients clipped, optimizer (and moving
average with --ema). MFU counts what the model needs (`flops.training_flops`), not what activation checkpointing
computes again, against the data sheet's peak on a GPU that has one, else against the rate of matrix products measured
in the same run. A line for each pair of --compile and --loss-chunk; times are medians over --steps after --warm-up.
Peak memory on a CPU is the process's, which keeps some of what the line before took: compare it one line at a time.
--beside plain dllm=PATH times a plain loop and dllm's trainer (a clone) after them, from the same weights and rows.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.models.choices import ATTENTION, float_name
from dlm.models.flops import peak_flops
from dlm.models.shapes import SHAPES, random_model
from dlm.objectives.config import OBJECTIVE_NAMES
from dlm.training.config import TrainingConfig
from dlm.training.options import OPTIMIZERS, PRECISIONS
from dlm.utils.files import write_json
from dlm.utils.hardware import PeakMemory, synchronise
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.data.examples import Examples

COMPILE = {"off": (False,), "on": (True,), "both": (False, True)}


def options() -> Parser:
    """The command line."""
    parser = Parser("bench training", "[options]", __doc__)
    add = parser.add_argument
    add("--config", default="25m", metavar="NAME", help=f"{', '.join(SHAPES)} (default: 25m)")
    add("--objective", default="diffusion", metavar="NAME", help=f"{', '.join(OBJECTIVE_NAMES)} (default: diffusion)")
    add("--block-length", type=int, default=32, metavar="N", help="of block_diffusion (default: 32)")
    add("--length", type=int, default=256, metavar="N", help="tokens in a row (default: 256)")
    add("--batch", type=int, default=8, metavar="N", help="rows in a step (default: 8)")
    add("--accumulation", type=int, default=1, metavar="N", help="micro-batches in a step (default: 1)")
    add("--precision", default="fp32", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: fp32)")
    add("--optimizer", default="adamw", metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (default: adamw)")
    add("--ema", type=float, default=0.0, metavar="X", help="decay of a moving average (default: 0, none)")
    add("--compile", default="off", metavar="NAME", help="off, on or both: torch.compile of each layer (default: off)")
    add("--loss-chunk", nargs="+", default=["auto"], metavar="N", help="places with logits at a time; auto, 0 for all")
    add("--activation-checkpointing", action="store_true", help="compute each layer again in the backward pass")
    add("--attn-implementation", default="sdpa", metavar="NAME", help=f"{', '.join(ATTENTION)} (default: sdpa)")
    add("--steps", type=int, default=10, metavar="N", help="timed steps (default: 10)")
    add("--warm-up", type=int, default=2, metavar="N", help="steps after the first that are not timed (default: 2)")
    add("--threads", type=int, metavar="N", help="of torch on a CPU")
    add("--device", metavar="NAME", help="cpu or cuda (default: a GPU where there is one)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights, the tokens and the noise")
    add("--beside", nargs="+", default=[], metavar="NAME[=PATH]", help="plain, dllm=PATH: others' steps, of diffusion")
    add("--json", metavar="FILE", help="write the rows there")
    parser.writes(json="json")
    return parser


def check(args: Namespace) -> None:
    """Errors (ValueError): names that are none, numbers below 1, a device that is not there."""
    import torch

    for name, allowed in (("config", SHAPES), ("compile", COMPILE), ("attn_implementation", ATTENTION)):
        check_name(name, getattr(args, name), allowed)
    check_least(args, 2, "length")
    check_least(args, 1, "steps", "threads", "batch")
    check_least(args, 0, "warm_up")
    for value in args.loss_chunk:
        if value != "auto" and not value.isdigit():
            raise ValueError(f"--loss-chunk has {value!r}: give auto, 0 for all places, or a number of them")
    if args.beside and (args.objective != "diffusion" or args.accumulation > 1 or args.optimizer != "adamw"):
        raise ValueError("--beside compares steps of diffusion with adamw and no accumulation: leave the others out")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {args.device} cannot be used here: give cpu, or cuda where there is a GPU")


def settings(args: Namespace, folder: str, compiled: bool, chunk: str) -> TrainingConfig:
    """The trainer's settings of one variant."""
    return TrainingConfig(
        output=folder, max_steps=args.steps + args.warm_up + 1, batch_size=args.batch, accumulation=args.accumulation,
        learning_rate=1e-4, optimizer=args.optimizer, ema=args.ema, objective=args.objective,
        block_length=args.block_length if args.objective == "block_diffusion" else None, precision=args.precision,
        activation_checkpointing=args.activation_checkpointing, compile=compiled, seed=args.seed,
        loss_chunk=None if chunk == "auto" else int(chunk),
    )  # fmt: skip


def random_ids(vocabulary: int, rows: int, length: int, seed: int) -> np.ndarray:
    """Ids (rows, length); the last ids are special ones and left out."""
    return np.random.default_rng(seed).integers(0, max(1, vocabulary - 8), (rows, length))


def random_rows(vocabulary: int, rows: int, length: int, seed: int) -> Examples:
    """Examples of exactly `length` random tokens, each a row."""
    from dlm.data.documents import Documents
    from dlm.data.examples import Examples

    tokens = random_ids(vocabulary, rows, length, seed).reshape(-1).astype(np.uint32)
    starts = np.arange(rows + 1) * length
    return Examples([Documents(tokens, starts, np.ones(len(tokens), dtype=bool), None, len(tokens))], length)


def measure(args: Namespace, config: TrainingConfig, peak: float) -> dict:
    """One variant: seconds of its first step (with compilation), the median of the others, and what follows."""
    import torch
    from accelerate import Accelerator

    from dlm.training.trainer import Run

    device = torch.device(args.device)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=config.precision)
    model = random_model(args.config, device=device, seed=args.seed, length=args.length)
    model.set_attn_implementation(args.attn_implementation)
    data = random_rows(model.config.vocab_size, 4 * config.batch_size, args.length, args.seed)
    run = Run(model, None, data, None, config, model.config.mask_token_id, accelerator, lambda line: None)
    times, operations = [], []
    with PeakMemory(device) as memory:
        for _ in range(1 + args.warm_up + args.steps):
            synchronise(device)
            began = time.perf_counter()
            made = run.batches.next(run.step)
            run.train_step(made)
            synchronise(device)
            times.append(time.perf_counter() - began)
            operations.append(run.operations(made.parts))
            run.step += 1
    seconds = statistics.median(times[1 + args.warm_up :])
    return {
        "seconds": seconds, "tokens_per_second": config.batch_size * args.length / seconds,
        "mfu": statistics.mean(operations) / seconds / peak, "peak_memory": memory.bytes, "first_step": times[0],
        "chunk": run.chunk,
    }  # fmt: skip


def line(row: dict) -> str:
    """A variant for people."""
    at_a_time = "all logits" if row.get("chunk") is None else f"logits of {row['chunk']:,}"
    name = f"compile {'on' if row['compile'] else 'off':<3}  loss chunk {row['loss_chunk']:>5}"
    if "error" in row:
        return f"{name}  {row['error']}"
    memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e9:6.2f} GB  "
    return (
        f"{name} ({at_a_time})  {row['tokens_per_second']:>10,.0f} tokens/s  {1e3 * row['seconds']:9.1f} ms a step  "
        f"{row['mfu']:6.1%} MFU  {memory}first step {row['first_step']:.1f} s"
    )


def other_line(row: dict) -> str:
    """Another's steps for people."""
    return (
        f"{row['beside']:<40} {row['tokens_per_second']:>10,.0f} tokens/s  {1e3 * row['seconds']:9.1f} ms a step  "
        f"{row['ratio']:.2f} times ours"
    )


def run(argv: Sequence[str]) -> int:
    """Measure the variants and print a line for each; the rows are on the disk before the next one begins."""
    args = options().parse(argv)
    import torch

    from dlm.benchmarking.roofline import matmul_rate

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(args)
    from benchmarks.trainers import check_others  # with torch, which help does without

    others = check_others(args.beside)
    variants = list(itertools.product(COMPILE[args.compile], dict.fromkeys(args.loss_chunk)))
    with tempfile.TemporaryDirectory() as folder:
        configs = [settings(args, folder, *variant) for variant in variants]  # all are checked before any runs
        if args.threads:
            torch.set_num_threads(args.threads)
        device = torch.device(args.device)
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        source = "measured in matrix products" if peak is None else "by the data sheet"
        peak = peak or matmul_rate(getattr(torch, float_name(args.precision)), device)
        print(
            f"{args.config}, {args.objective}, {args.batch} rows of {args.length}, precision {args.precision}, "
            f"{args.optimizer}, {device}, {torch.get_num_threads()} threads: {peak / 1e9:,.0f} GFLOP/s {source}",
            flush=True,
        )
        rows: list[dict] = []

        def keep(row: dict, told: str) -> None:
            print(told, flush=True)
            rows.append(row)
            if args.json:
                write_json(Path(args.json), {"options": vars(args), "peak": peak, "rows": rows}, indent=1)

        for (compiled, chunk), config in zip(variants, configs, strict=True):
            row = {"compile": compiled, "loss_chunk": chunk}
            try:
                row |= measure(args, config, peak)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            torch.compiler.reset()
            gc.collect()  # a run and its model refer to each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
            keep(row, line(row))
    ours = next((row["seconds"] for row in rows if "seconds" in row), math.nan)
    for name, path in others.items():
        row = beside(args, name, path, ours)
        keep(row, other_line(row))
    return 0


def beside(args: Namespace, name: str, path: Path | None, ours: float) -> dict:
    """Another's steps: the median after the first and the warm-up, and its ratio to the first variant's."""
    import torch

    from benchmarks.trainers import other_steps

    model = random_model(args.config, device=torch.device(args.device), seed=args.seed, length=args.length)
    rows = torch.from_numpy(random_ids(model.config.vocab_size, 4 * args.batch, args.length, args.seed)).to(
        model.device
    )
    times = other_steps(name, path, model, rows, args.batch, 1 + args.warm_up + args.steps, args.precision == "bf16")
    seconds = statistics.median(times[1 + args.warm_up :])
    return {
        "beside": name, "seconds": seconds, "tokens_per_second": args.batch * args.length / seconds,
        "ratio": seconds / ours, "first_step": times[0],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench training", run, argv)


if __name__ == "__main__":
    sys.exit(main())

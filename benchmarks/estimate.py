"""What a generation would take on a machine: latency, tokens a second and memory, from the floors of its operations.

    dlm bench estimate --config llada-8b --machine h100 h200 b200 --cells none:32:512 dual:32:512 --batch 1 8 32
    dlm bench estimate --config 25m --machine this --threads 2 --dtype float32 --gen-length 256 --cells dual:8:256
    dlm bench estimate --check benchmarks/results/llada_8b_h100.jsonl

`this` is the machine at hand, measured in some seconds: the products of the configuration's layers at eleven numbers of
rows, attention, an operation on nothing, and one pass, to which the constant is fitted. --check compares the model with
the passes in a file of `benchmarks.gpu`, after one constant for all of them. No weight of the model is made, but for
`this`.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dlm.benchmarking.cost import (
    ITEMSIZE,
    MACHINES,
    OPERATIONS,
    Machine,
    Shape,
    fitted,
    generation,
    memory,
    pass_seconds,
)
from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.cli.workload import clock_of, parse_cell
from dlm.models.flops import parameters
from dlm.models.shapes import SHAPES, random_model, shape_config
from dlm.utils.files import write_json
from dlm.utils.hardware import hardware
from dlm.utils.names import check_name

PROMPT = 32  # tokens, of the runs of `benchmarks.gpu`
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 1024)  # at which products of `this` are measured
KEYS = 1024  # of its attention


def options() -> Parser:
    """The command line."""
    parser = Parser("bench estimate", "[options]", __doc__)
    add = parser.add_argument
    add("--config", default="llada-8b", metavar="NAME", help=f"{', '.join(SHAPES)} (default: llada-8b)")
    add("--machine", nargs="+", default=["h100"], metavar="NAME", help=f"{', '.join(MACHINES)}, this (default: h100)")
    add("--dtype", default="bfloat16", metavar="NAME", help=f"{', '.join(ITEMSIZE)} (default: bfloat16)")
    add("--cells", nargs="+", default=["none:32:512", "dual:32:512"], metavar="METHOD:BLOCK:STEPS")
    add("--prompt-length", type=int, default=PROMPT, metavar="N", help="tokens of the prompt (default: 32)")
    add("--gen-length", type=int, default=512, metavar="N", help="tokens to generate (default: 512)")
    add("--batch", type=int, nargs="+", default=[1], metavar="N", help="prompts at a time (default: 1)")
    add("--threads", type=int, metavar="N", help="of torch, for `this`")
    add("--clock", default="wall", choices=("wall", "cpu"), help="of `this`: cpu for a machine in use, with one thread")
    add("--check", metavar="FILE", help="compare with the passes that benchmarks.gpu measured, results.jsonl")
    add("--json", metavar="FILE", help="write the rows there")
    parser.writes(json="json")
    return parser


def this(config_name: str, dtype: str, clock) -> Machine:
    """The machine at hand, by measurements on a processor: products of the configuration's layers at several numbers of
    rows, attention, an operation on nothing; the constant is fitted to a pass over 32 slots of 288."""
    import torch

    from dlm.benchmarking.roofline import best
    from dlm.kernels.packing import packed
    from dlm.models.kv_cache import KVCache

    device, kind = torch.device("cpu"), getattr(torch, dtype)
    model = random_model(config_name, dtype=kind, length=max(ROWS))
    with torch.inference_mode():
        products = _products(model.config, kind, device, clock)
        attention = _attention(model.config, kind, device, clock)
        tiny = torch.randn(1, 8, dtype=kind)
        begin = best(lambda: tiny.mul(tiny), device, clock) * 5  # an operation of a layer is a handful of torch's
        rate, width = 2 / products[-1][1], ITEMSIZE[dtype] / products[0][1]  # of the most rows, and of one
        machine = Machine(hardware(), {dtype: rate}, width, begin, float("inf"), products=products, attention=attention)
        predictor, cache = packed(model), KVCache(1, 288)
        positions = torch.arange(100, 132)[None]
        tokens = torch.randint(0, 99, (1, 32))
        predictor(torch.randint(0, 99, (1, 288)), torch.arange(288)[None], cache=cache)
        asked = torch.arange(32)[None]
        took = best(lambda: predictor(tokens, positions, cache=cache, logits_to_keep=asked), device, clock, seconds=1.0)
    return replace(machine, factor=took / pass_seconds(model.config, machine, dtype, 1, 32, 288, 32))


def _products(config, kind, device, clock) -> tuple[tuple[int, float], ...]:
    """(rows, seconds for each weight and row) of the layers' products, all of them one after another, as a pass has
    them: weights come from memory where a cache does not hold them all."""
    import torch

    from dlm.benchmarking.roofline import best
    from dlm.kernels.linear import kind_for

    d, width, hidden = config.d_model, config.n_heads * config.head_dim, config.mlp_hidden_size
    shapes = [(width + 2 * config.n_kv_heads * config.head_dim, d), (d, width), (2 * hidden, d), (d, hidden)]
    weights = [torch.randn(shape, dtype=kind) / 32 for _ in range(config.layers_applied) for shape in shapes]
    made = kind_for(device, kind)
    ways = [made.of([each], [None]) if made else partial(torch.nn.functional.linear, weight=each) for each in weights]
    count, found = sum(each.numel() for each in weights), []
    for rows in ROWS:
        inputs = {each.shape[1]: torch.randn(rows, each.shape[1], dtype=kind) for each in weights}

        def all_of_them(inputs=inputs) -> None:
            for way, each in zip(ways, weights, strict=True):
                way(inputs[each.shape[1]])

        found.append((rows, best(all_of_them, device, clock, seconds=0.5) / count / rows))
    return tuple(found)


def _attention(config, kind, device, clock) -> tuple[tuple[int, float], ...]:
    """(queries, seconds for each query, key and number of a head) of attention over KEYS keys."""
    import torch

    from dlm.benchmarking.roofline import best

    found, size = [], (1, config.n_heads, KEYS, config.head_dim)
    keys, values = torch.randn(size, dtype=kind), torch.randn(size, dtype=kind)
    for queries in (1, 8, 32, 256, 1024):
        asked = torch.randn(1, config.n_heads, queries, config.head_dim, dtype=kind)
        took = best(partial(torch.nn.functional.scaled_dot_product_attention, asked, keys, values), device, clock)
        found.append((queries, took / (queries * KEYS * config.n_heads * config.head_dim)))
    return tuple(found)


def check(file: str) -> list[str]:
    """Lines: every kind of pass in a file of `benchmarks.gpu`, predicted and measured."""
    config, pairs, names = shape_config("llada-8b"), [], []
    plain = replace(MACHINES["h100"], factor=1.0)
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{file}, line {number}: no JSON; give results.jsonl of benchmarks.gpu") from None
        if row.get("name") != "graphs" or "ms_mean" not in row:
            continue
        keys = max(map(int, row["ms_mean"]))
        for computed, ms in row["ms_mean"].items():
            pairs.append(
                (pass_seconds(config, plain, "bfloat16", row["batch"], int(computed), keys, row["block"]), ms / 1e3)
            )
            names.append(f"{row['method']} of {row['steps']} steps, {row['batch']} x {computed} slots")
    if not pairs:
        raise ValueError(f"{file} holds no replayed passes: give results.jsonl of benchmarks.gpu")
    constant, left = fitted(pairs)
    lines = [
        f"{name:<36} predicted {1e3 * constant * predicted:8.2f} ms  measured {1e3 * measured:8.2f} ms  {rest - 1:+.0%}"
        for name, (predicted, measured), rest in zip(names, pairs, left, strict=True)
    ]
    worst = max(abs(each - 1) for each in left)
    return [*lines, f"constant {constant:.2f}; at most {worst:.0%} apart"]


def estimates(args: Namespace) -> list[dict]:
    """A row for each machine, cell and batch."""
    config, rows = shape_config(args.config), []
    count = parameters(config)
    for name in args.machine:
        machine = this(args.config, args.dtype, clock_of(args)) if name == "this" else MACHINES[name]
        if args.dtype not in machine.rate:
            raise ValueError(f"--dtype {args.dtype} has no rate on {name}: use {', '.join(machine.rate)}")
        for cell in args.cells:
            method, block, steps = parse_cell(cell)
            for batch in args.batch:
                shape = Shape(batch, args.prompt_length, args.gen_length, min(block, args.gen_length), steps, method)
                seconds = generation(config, machine, args.dtype, shape)
                needed = memory(config, args.dtype, shape, count)
                rows.append({
                    "machine": machine.name, "source": machine.source, "cell": cell, "batch": batch,
                    "seconds": seconds, "tokens_per_second": batch * args.gen_length / seconds,
                    "memory": needed, "fits": needed <= machine.memory,
                })  # fmt: skip
    return rows


def run(argv: Sequence[str]) -> int:
    """Print a line for each estimate, or for each pass that is checked."""
    args = options().parse(argv)
    import torch

    check_least(args, 1, "prompt_length", "gen_length", "threads")
    if args.check:
        print("\n".join(check(args.check)))
        return 0
    for name in args.machine:
        check_name("machine", name, (*MACHINES, "this"))
    check_name("dtype", args.dtype, ITEMSIZE)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = estimates(args)
    for row in rows:
        room = "" if row["fits"] else "  does not fit"
        print(
            f"{row['machine']:<16} {row['cell']:<16} batch {row['batch']:<4} {row['seconds']:9.3f} s "
            f"{row['tokens_per_second']:9.0f} tokens/s {row['memory'] / 1e9:8.1f} GB{room}   ({row['source']})"
        )
    if args.json:
        write_json(Path(args.json), {"operations_a_layer": OPERATIONS, "rows": rows}, indent=1)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench estimate", run, argv)


if __name__ == "__main__":
    sys.exit(main())

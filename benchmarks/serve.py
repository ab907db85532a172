"""Latency, time to first text and throughput of the engine under load, against one request at a time.

    dlm bench serve --requests 64 --loads 0.3 0.7 1.0 --prompt-tokens 8:64 --output-tokens 16:64 --json serve.json

Requests have random prompts and do not stop at the end of text, so that every run has the same work. They arrive as a
Poisson process: at --rates requests a second, or at --loads times what the engine does when it is never idle, which is
measured first. Before that: the same requests one after the other in a plain loop without the engine, and a batch of
equally long ones, whose throughput over a single one is the machine's own limit for batches.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.scripts import guarded
from dlm.cli.session import announce, check_region, settings
from dlm.cli.workload import clock_of
from dlm.utils.files import write_json
from dlm.utils.hardware import commit, hardware, versions
from dlm.utils.launch import typed_command

FIXED = ("gen_length", "seed", "stop_at_eos", "regex", "json_schema", "choices")  # what a load itself says


def options(argv: Sequence[str]) -> Parser:
    """The command line."""
    parser = Parser("bench serve", "[options]", __doc__)
    add = parser.add_argument
    add("--requests", type=int, default=64, metavar="N", help="of each load (default: 64)")
    add("--prompt-tokens", default="8:64", metavar="N[:M]", help="of a request, from N to M (default: 8:64)")
    add("--output-tokens", default="16:64", metavar="N[:M]", help="(default: 16:64)")
    add("--concurrency", type=int, default=16, metavar="N", help="rows of the engine's batch (default: 16)")
    add("--rates", type=float, nargs="+", default=[], metavar="R", help="arrivals a second")
    add("--loads", type=float, nargs="+", metavar="X", help="arrivals in shares of the full load (default: 0.3 0.7)")
    add("--alone", type=int, default=12, metavar="N", help="requests that are measured one at a time (default: 12)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts, lengths, arrivals and texts")
    add("--clock", default="wall", choices=("wall", "cpu"), help="of throughput; cpu on a machine in use")
    add("--threads", type=int, metavar="N", help="of torch on a CPU")
    add("--json", metavar="FILE", help="write the rows there")
    parser.writes(json="json")
    parser.add_model()
    parser.add_sampling(shown_defaults(argv), leave_out=FIXED)
    return parser


def check(args: Namespace) -> None:
    """Raises ValueError for numbers that are too small."""
    check_least(args, 1, "requests", "concurrency", "alone", "threads")
    for name in ("rates", "loads"):
        for value in getattr(args, name) or ():
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name} has {value}: give numbers above 0")


def measure(opened, config, args: Namespace, needs: Sequence, equal: Sequence, say) -> list[dict]:
    """The rows of all loads, each handed to `say` as it comes."""
    from dlm.benchmarking import load
    from dlm.serving.engine import Engine, EngineSettings

    rows: list[dict] = []

    def add(row: dict) -> dict:
        rows.append(row)
        say(rows)
        return row

    known = load.known_of(opened.tokenizer, opened.end_ids)
    clock = clock_of(args)
    plain = opened.predictor, config, known, opened.mask_id, clock
    few = needs[: args.alone]
    load.alone(plain[0], few[:1], *plain[1:])  # what is made once
    add(load.alone(plain[0], few, *plain[1:]))
    load.together(plain[0], equal, *plain[1:])
    single = add({**load.alone(plain[0], equal[:3], *plain[1:]), "load": "plain loop, one at a time, equally long"})
    batch = add(load.together(plain[0], equal, *plain[1:]))
    batch["speedup"] = batch["tokens_per_second"] / single["tokens_per_second"]
    limits = EngineSettings(max_rows=args.concurrency, max_waiting=len(needs), timeout=None)
    engine = Engine(opened, limits)
    try:
        engine.wait_until_loaded()
        add(load.at_once(engine, few, config, 1, "engine, one at a time", clock))
        full = load.at_once(engine, needs, config, args.concurrency, f"engine, {args.concurrency} at a time", clock)
        full["speedup"] = full["tokens_per_second"] / rows[0]["tokens_per_second"]
        add(full)
        rates = [(f"engine, {rate:g} a second", rate) for rate in args.rates]
        if args.loads or not args.rates:
            whole = full["requests"] / full["wall_seconds"]
            rates += [(f"engine, {share:.0%} load", share * whole) for share in args.loads or (0.3, 0.7)]
        for name, rate in rates:
            at = load.poisson(len(needs), rate, args.seed)
            add({**load.in_turn(engine, needs, config, at, name, clock), "rate": rate})
    finally:
        engine.close()
    return rows


def summary(rows: Sequence[dict]) -> str:
    """What the rows say, in three lines."""
    by = {row["load"]: row for row in rows}
    full = next(row for row in rows if "speedup" in row and row["load"].startswith("engine"))
    batch = next(row for row in rows if row["load"].startswith("plain loop, a batch"))
    idle, loaded = by["engine, one at a time"], [row for row in rows if "rate" in row]
    lines = [
        f"throughput: {full['speedup']:.2f} times one request at a time; the machine's own limit, a batch of "
        f"{batch['requests']} equally long requests: {batch['speedup']:.2f} times one of them alone "
        f"({batch['speedup'] / full['speedup']:.2f} times the engine's)",
        f"the engine's own work: {full['engine_overhead']:.1%} of the loop's",
    ]
    for row in loaded:
        ratio = row["first_text_p99"] / idle["first_text_p99"]
        lines.append(f"{row['load']}: p99 of the time to first text is {ratio:.1f} times what it is unloaded")
    return "\n".join(lines)


def run(argv: Sequence[str]) -> int:
    """Measure; the rows are on the disk after each load."""
    args = options(argv).parse(argv)
    check(args)
    from dlm.benchmarking import load

    prompts = load.Lengths.parse(args.prompt_tokens, "--prompt-tokens")
    outputs = load.Lengths.parse(args.output_tokens, "--output-tokens")
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    file, args.json = args.json, None
    opened = announce(args)
    config = settings(args, opened.defaults, gen_length=outputs.most, stop_at_eos=False)
    check_region(opened, prompts.most + outputs.most, "--prompt-tokens and --output-tokens together")
    size = load.vocabulary_of(opened.tokenizer, opened.mask_id)
    needs = load.demands(args.requests, prompts, outputs, size, args.seed)
    equal = load.demands(args.concurrency, prompts.middle, outputs.middle, size, args.seed)
    head: dict[str, Any] = {
        "command": typed_command(argv, "dlm bench serve"), "commit": commit(), "hardware": hardware(),
        "versions": versions(), "model": opened.digest, "seed": args.seed,
    }  # fmt: skip
    print(f"{opened.name}: {head['hardware']}", flush=True)

    def say(rows: list[dict]) -> None:
        print(rows[-1]["load"], "...", f"{rows[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
        if file:
            write_json(Path(file), {**head, "rows": rows}, indent=1)

    rows = measure(opened, config, args, needs, equal, say)
    print(load.table(rows))
    print(summary(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench serve", run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Seconds a Sudoku at equal quality: settings that write several cells a pass beside one cell a pass.

    dlm bench sudoku --model my-sudoku --puzzles 40 --threads 1 --clock cpu --peer PATH     (a clone of dllm)

Every puzzle is solved alone by every setting before the next one comes, so that a machine that is slower for a while is
slower for all. One cell a pass, the most probable first, is LLaDA's own rule; its own code takes no givens behind
masks. That of dllm does (`infill`). No class of its own has heads that see a grid, or layers that are repeated: it
calls our model, so that the sampler is theirs and a pass is ours.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.peers import OursForThem, imports
from dlm.benchmarking.equal import WITHIN
from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.cli.workload import clock_of
from dlm.evaluation import sudoku
from dlm.utils.files import write_json
from dlm.utils.progress import counted
from dlm.utils.stats import proportion

ONE = "one cell a pass"
Solver = Callable[[np.ndarray], tuple[np.ndarray, int]]  # a puzzle (81,) -> its answer (81,) and the passes it took


def solvers(model, thresholds: Sequence[float], steps: Sequence[int]) -> dict[str, Solver]:
    """What is compared, by name: one cell a pass, all cells above a threshold, and a number of passes."""
    from dlm import Canvas, SamplingConfig, generate

    whole = {"block_length": 81}
    configs = {ONE: SamplingConfig(**whole)}
    for threshold in thresholds:
        configs[f"all above {threshold:g}"] = SamplingConfig(**whole, commit="threshold", threshold=threshold)
    configs |= {f"{count} passes": SamplingConfig(**whole, steps=count) for count in steps}

    def solver(config) -> Solver:
        def solve(puzzle: np.ndarray) -> tuple[np.ndarray, int]:
            canvas = Canvas.from_templates(sudoku.to_ids(puzzle[None]).tolist(), model.config.mask_token_id)
            out = generate(model, canvas, config)
            return out.canvas.tokens[0].numpy()[sudoku.CELLS], int(out.nfe)

        return solve

    return {name: solver(config) for name, config in configs.items()}


def peer(path: Path, model) -> Solver:
    """dllm's sampler, one cell a pass. Raises ValueError where `path` is no clone of it."""
    if not (path / "dllm/core/samplers/mdlm.py").is_file():
        raise ValueError(f"--peer: {path} has no dllm/core/samplers/mdlm.py; give the root of a clone of dllm")
    with imports(path.resolve(), ("dllm", "dllm.core")):
        theirs = importlib.import_module("dllm.core.samplers.mdlm")
    ids = SimpleNamespace(mask_token_id=model.config.mask_token_id, bos_token_id=0, eos_token_id=0)
    sampler, settings = theirs.MDLMSampler(OursForThem(model), ids), theirs.MDLMSamplerConfig()

    def solve(puzzle: np.ndarray) -> tuple[np.ndarray, int]:
        tokens, count = sudoku.to_ids(puzzle[None])[0].tolist(), int((puzzle == 0).sum())
        filled = sampler.infill([tokens], settings, steps=count)[0].numpy()
        return filled[sudoku.CELLS], count

    return solve


def compare(found: dict[str, Solver], puzzles: np.ndarray, clock: Callable[[], float]) -> list[dict]:
    """A record for each solver, all of them in turn over each puzzle."""
    seconds, right, passes = ({name: [] for name in found} for _ in range(3))
    for puzzle in counted(puzzles, len(puzzles), "puzzles"):
        for name, solve in found.items():
            began = clock()
            answer, count = solve(puzzle)
            seconds[name].append(clock() - began)
            passes[name].append(count)
            right[name].append(sudoku.is_solution(answer, puzzle))
    records = []
    for name in found:
        share, error = proportion(right[name])
        records.append({
            "setting": name, "puzzles": len(puzzles), "solved": share, "error": error,
            "passes": float(np.mean(passes[name])), "seconds": float(np.mean(seconds[name])),
            "times_faster": sum(seconds[ONE]) / sum(seconds[name]),
        })  # fmt: skip
    return records


def fastest(records: Sequence[dict]) -> dict:
    """The fastest of the records that solve as many as one cell a pass, within 2%."""
    [slow] = [record for record in records if record["setting"] == ONE]
    good = [record for record in records if record["solved"] >= (1 - WITHIN) * slow["solved"]]
    return min(good, key=lambda record: record["seconds"])


def print_table(records: Sequence[dict]) -> None:
    """The records, and the fastest of those that are as good."""
    print(f"{'setting':<28} | solved, %   | passes | s a puzzle | times as fast")
    for record in records:
        error = f"± {100 * record['error']:.1f}" if record["error"] is not None else ""
        print(
            f"{record['setting']:<28} | {100 * record['solved']:5.1f} {error:<5} | {record['passes']:6.1f} | "
            f"{record['seconds']:10.3f} | {record['times_faster']:.2f}"
        )
    best = fastest(records)
    print(f"fastest within {WITHIN:.0%} of {ONE}: {best['setting']}, {best['times_faster']:.2f} times as fast")


def parse(argv: Sequence[str]):
    """The options of a command line. Errors: values out of range."""
    parser = Parser("bench sudoku", "--model PATH [options]", __doc__)
    parser.add_argument("--model", metavar="PATH", help="a model of dlm train sudoku")
    parser.add_argument("--puzzles", type=int, default=40, metavar="N", help="puzzles to solve (default: 40)")
    parser.add_argument("--clues", default="17-26", metavar="A-B", help="numbers of givens (default: 17-26)")
    parser.add_argument("--thresholds", default="0.99,0.9", metavar="X,X", help="confidences (default: 0.99,0.9)")
    parser.add_argument("--steps", default="", metavar="N,N", help="numbers of passes (default: none)")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="a clone of dllm, whose sampler is compared")
    parser.add_argument("--seed", type=int, default=1_000_000, metavar="N", help="of the puzzles (default: 1000000)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on a CPU")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the process's own time")
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.writes(json="json")
    args = parser.parse(list(argv))
    if not args.model:
        raise ValueError("no model: give --model a folder that dlm train sudoku wrote")
    check_least(args, 1, "puzzles", "threads")
    args.clues = sudoku.parse_clues(args.clues)
    try:
        args.thresholds = [float(word) for word in args.thresholds.split(",") if word]
        args.steps = [int(word) for word in args.steps.split(",") if word]
    except ValueError:
        raise ValueError("--thresholds and --steps are numbers with commas between them") from None
    return args


def run(argv: Sequence[str]) -> int:
    """Compare the settings and print the table."""
    args = parse(argv)
    import torch

    import dlm

    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = dlm.load(args.model)
    sudoku.check_model(args.model, tokenizer)
    found = solvers(model, args.thresholds, args.steps)
    if args.peer is not None:
        found[f"dllm's sampler, {ONE}"] = peer(args.peer, model)
    puzzles = sudoku.test_puzzles(args.puzzles, args.clues, args.seed)
    for solve in found.values():
        solve(puzzles[0])  # warm
    records = compare(found, puzzles, clock_of(args))
    print_table(records)
    if args.json:
        write_json(Path(args.json), records, indent=1)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench sudoku", run, argv)


if __name__ == "__main__":
    sys.exit(main())

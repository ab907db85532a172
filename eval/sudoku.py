"""How many Sudokus a model solves by infilling, by the order it writes in, the passes it takes and the givens.

dlm eval sudoku --model my-sudoku                 (a model of `dlm train sudoku`)
dlm eval sudoku --model my-sudoku --puzzle TEXT         (81 cells, empty ones as dots)
dlm eval sudoku --model my-sudoku --tries 16            (several answers, one chosen by the model's own likelihood)
dlm eval sudoku --model my-sudoku --tries 16 --judge rules --forms         (until one obeys the rules, turned each time)
dlm eval sudoku --model my-sudoku --mean-over 8         (each pass is the mean over eight forms of the puzzle)

A puzzle counts as solved where every row, column and box of the answer is right. No solver is asked: that an answer is
doubtful shows in the probability that the model itself gives to its cells, or in a row, column or box that is wrong.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.evaluation import sudoku
from dlm.evaluation.rules import fields_of
from dlm.sampling.config import METHOD_NAMES
from dlm.utils.files import write_json
from dlm.utils.names import check_name

ORDERS = {  # name: fields of SamplingConfig. One block holds the whole grid, but for the last two.
    "margin": {"confidence": "margin"},
    "probability": {"confidence": "probability"},
    "entropy": {"confidence": "entropy"},
    "random": {"confidence": "random"},
    "row by row": {"confidence": "margin", "block_length": 9},
    "left to right": {"block_length": 1},
}
ONE_BLOCK = 81
PARTS = 6  # of an answer's cells: each is masked in turn, and judged given the others


@dataclass(frozen=True)
class Setting:
    """A row of the table: its order, how many cells a pass, and the configuration."""

    order: str
    rule: str
    config: object


@dataclass(frozen=True)
class Tries:
    """How often an answer is tried: at most `count` times, the first as the row of the table says, the others at
    `temperature`, until the judge is content: the `model`, where every cell that was written has a probability of
    `accept` or more given the others, or the `rules`. forms: every try after the first is of another form of the puzzle
    under the symmetries of the rules, and its answer is turned back."""

    count: int = 1
    temperature: float = 1.0
    accept: float = 0.5
    judge: str = "model"
    forms: bool = False


def settings(
    orders: list[str],
    steps: list[int],
    thresholds: list[float],
    methods: Sequence[str] = (),
    rules: Sequence[str] = (),
):
    """The Settings to try: the orders at one cell a pass, those of one block at fewer passes, thresholds, and rules.

    methods: cached ones, for the orders with blocks to cache, of more than one cell. rules: as `evaluation.rules` names
    them, most probable cell first, at one cell a pass and at each of the steps, but those that decide themselves when a
    block is done; `pipeline` has the grid's rows as blocks.
    """
    from dlm import SamplingConfig

    rows = []
    for order in orders:
        config = SamplingConfig(**{"block_length": ONE_BLOCK} | ORDERS[order])
        rows.append(Setting(order, "one cell a pass", config))
        if config.block_length == ONE_BLOCK:
            rows += [Setting(order, f"{count} passes", replace(config, steps=count)) for count in steps]
        elif config.block_length > 1:
            rows += [Setting(order, name, replace(config, method=name)) for name in methods]
    for threshold in thresholds:
        config = SamplingConfig(block_length=ONE_BLOCK, commit="threshold", threshold=threshold)
        rows.append(Setting("probability", f"all above {threshold:g}", config))
    for rule in rules:
        fields = {"block_length": 9 if rule.startswith("pipeline") else ONE_BLOCK} | fields_of(rule)
        config = SamplingConfig(**fields)
        counted_out = config.commit in ("quota", "ancestral")
        rows.append(Setting(rule, "one cell a pass" if counted_out else "by its threshold", config))
        rows += [Setting(rule, f"{count} passes", replace(config, steps=count)) for count in steps if counted_out]
    return rows


def solve(model, puzzles: np.ndarray, config, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers (P, 81) to puzzles (P, 81), the passes and the positions computed (P,) that each took; a pass of a mean
    over N forms counts as N."""
    from dlm import Canvas, generate

    mask, forms = model.config.mask_token_id, getattr(model, "forms", 1)
    answers, passes, computed = puzzles.copy(), [], []
    for first in range(0, len(puzzles), batch):
        part = puzzles[first : first + batch]
        out = generate(model, Canvas.from_templates(sudoku.to_ids(part).tolist(), mask), config)
        for row, ids in zip(range(first, first + len(part)), out.sequences.tolist(), strict=True):
            empty = puzzles[row] == 0
            answers[row, empty] = [token if 1 <= token <= 9 else 0 for token in ids[: int(empty.sum())]]
        passes += out.nfe.tolist()
        computed += out.positions_computed.tolist()
    return answers, forms * np.array(passes), forms * np.array(computed)


def doubt(model, puzzles: np.ndarray, answers: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """How well the model likes whole answers (P, 81) to puzzles: the sum over the cells that were written of the log
    probability given the others (P,), a part of them masked at a time, and the smallest probability of a cell (P,)."""
    import torch

    mask, tokens = model.config.mask_token_id, torch.from_numpy(sudoku.to_ids(answers)).long()
    part = np.random.default_rng(0).integers(PARTS, size=answers.shape)
    log_p = torch.zeros(answers.shape)
    for number in range(PARTS):
        asked = torch.from_numpy((puzzles == 0) & (part == number))
        for first in range(0, len(answers), batch):
            some = slice(first, first + batch)
            hidden = torch.zeros_like(tokens[some], dtype=torch.bool)
            hidden[:, sudoku.CELLS] = asked[some]
            with torch.inference_mode():
                logits = model.predict(tokens[some].masked_fill(hidden, mask))[:, sudoku.CELLS, 1:10].float()
            written = torch.from_numpy(answers[some]).long()
            own = logits.log_softmax(-1).gather(-1, (written - 1).clamp_min(0)[..., None])[..., 0]
            own = own.masked_fill(written == 0, -100.0)  # no digit: as good as impossible
            log_p[some] += torch.where(asked[some], own, 0.0)
    return log_p.sum(1).numpy(), log_p.min(1).values.exp().numpy()


def by_rules(model, puzzles: np.ndarray, answers: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """1 for an answer that obeys the rules, else 0, in the shape of `doubt`; the model is not asked."""
    right = np.array([sudoku.is_solution(a, p) for a, p in zip(answers, puzzles, strict=True)], float)
    return right, right.copy()


JUDGES = {"model": doubt, "rules": by_rules}


def solve_often(model, puzzles: np.ndarray, config, batch: int, tries: Tries):
    """As `solve`, and of at most `tries.count` answers the one that the judge likes best; passes and positions count
    all tries, but not the judging, PARTS passes a try of the model and none of the rules."""
    answers, passes, computed = solve(model, puzzles, config, batch)
    if tries.count == 1:
        return answers, passes, computed
    judge = JUDGES[tries.judge]
    liked, least = judge(model, puzzles, answers, batch)
    for number in range(1, tries.count):
        open_ = np.flatnonzero(least < tries.accept)
        if not len(open_):
            break
        drawn = replace(config, temperature=tries.temperature, seed=number * 1_000_003)
        shown, symmetry = puzzles[open_], None
        if tries.forms:
            symmetry = sudoku.random_symmetries(len(open_), np.random.default_rng([2, number]))
            shown = sudoku.transform(shown, symmetry)
        again, more, cost = solve(model, shown, drawn, batch)
        again = again if symmetry is None else sudoku.restore(again, symmetry)
        passes[open_] += more
        computed[open_] += cost
        score, smallest = judge(model, puzzles[open_], again, batch)
        better = score > liked[open_]
        taken = open_[better]
        answers[taken], liked[taken], least[taken] = again[better], score[better], smallest[better]
    return answers, passes, computed


def accuracy(right: np.ndarray) -> str:
    """Share of the right ones in percent ± its standard error (of the Wald form), or a dash."""
    if not len(right):
        return "-"
    share = right.mean()
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / len(right)):.1f}"


def table(model, puzzles: np.ndarray, rows: list[Setting], batch: int, show, tries: Tries = Tries()) -> list[dict]:
    """One record for each setting; `show` prints it."""
    clues = (puzzles > 0).sum(axis=1)
    records = []
    for row in rows:
        began = time.perf_counter()
        answers, passes, computed = solve_often(model, puzzles, row.config, batch, tries)
        right = np.array([sudoku.is_solution(a, p) for a, p in zip(answers, puzzles, strict=True)])
        cells = float((answers == 0).sum())
        record = {
            "order": row.order, "rule": row.rule, "puzzles": len(puzzles), "solved": float(right.mean()),
            "all": accuracy(right), **{name: accuracy(right[here]) for name, here in buckets(clues)},
            "passes": float(passes.mean()), "positions": float(computed.mean()), "seconds": time.perf_counter() - began,
            "not_digits": cells,
        }  # fmt: skip
        records.append(record)
        show(record)
    return records


def buckets(clues: np.ndarray):
    """(name, which puzzles) by number of givens."""
    edges = [(17, 26), (27, 31), (32, 40), (41, 80)]
    return [(f"{low}-{high} givens", (clues >= low) & (clues <= high)) for low, high in edges]


def print_row(record: dict) -> None:
    """A line of the table."""
    names = [name for name in record if name.endswith("givens")]
    cells = [
        f"{record['order']:<13}",
        f"{record['rule']:<16}",
        f"{record['passes']:6.1f}",
        f"{record['positions']:9.0f}",
        f"{record['all']:>11}",
    ]
    print(" | ".join([*cells, *(f"{record[name]:>12}" for name in names)]), flush=True)


def print_head(count: int) -> None:
    """The table's head."""
    names = [f"{name:>12}" for name, _ in buckets(np.array([]))]
    print(f"{count} puzzles with one solution, solved in percent ± standard error; passes and positions: averages")
    print(" | ".join([f"{'order':<13}", f"{'rule':<16}", "passes", "positions", f"{'all':>11}", *names]))


def solve_one(model, text: str, order: str, tries: Tries) -> int:
    """Print the answer to one puzzle; exit code 1 where it is wrong."""
    puzzle = sudoku.from_text(text)
    solved = sudoku.solutions(puzzle)
    [row] = [row for row in settings([order], [], []) if row.rule == "one cell a pass"]
    answers, passes, _ = solve_often(model, puzzle[None], row.config, 1, tries)
    right = sudoku.is_solution(answers[0], puzzle)
    print(sudoku.pretty(answers[0]))
    known = {0: "the puzzle has no solution", 1: "the only solution"}.get(len(solved), "one of several solutions")
    print(f"{known if right or not solved else 'not a solution'}, {int(passes[0])} passes, order {order}")
    return 0 if right else 1


def parse(argv: list[str]):
    """The options of a command line. Errors: values out of range."""
    parser = Parser("eval sudoku", "--model PATH [options]", __doc__)
    parser.add_argument("--model", metavar="PATH", help="a model of dlm train sudoku")
    parser.add_argument("--puzzle", metavar="TEXT", help="solve this one: 81 cells, empty ones as dots or zeros")
    parser.add_argument("--order", default="margin", choices=list(ORDERS), help="for --puzzle (default: margin)")
    parser.add_argument("--puzzles", type=int, default=500, metavar="N", help="puzzles to test (default: 500)")
    parser.add_argument("--clues", default="24-45", metavar="A-B", help="numbers of givens (default: 24-45)")
    parser.add_argument("--orders", default=",".join(ORDERS), metavar="NAME,NAME", help=f"default: {','.join(ORDERS)}")
    parser.add_argument("--steps", default="24,12,6,3,1", metavar="N,N", help="passes (default: 24,12,6,3,1)")
    parser.add_argument("--thresholds", default="0.99,0.9", metavar="X,X", help="confidences (default: 0.99,0.9)")
    parser.add_argument("--methods", default="prefix,dual,c2f", metavar="NAME,NAME", help=(
        "cached ones, for the order row by row (default: prefix,dual,c2f)"))  # fmt: skip
    parser.add_argument("--rules", default="", metavar="NAME,NAME:X", help=(
        "rules of decoding beside the orders, as dlm eval revision names them, and stable and pipeline"))  # fmt: skip
    parser.add_argument("--tries", type=int, default=Tries.count, metavar="N", help=(
        "answers of a doubtful puzzle, of which the model's likelihood chooses one (default: 1)"))  # fmt: skip
    parser.add_argument("--try-temperature", type=float, default=Tries.temperature, metavar="T", help=(
        "of the tries after the first (default: 1)"))  # fmt: skip
    parser.add_argument("--accept", type=float, default=Tries.accept, metavar="P", help=(
        "no more tries where every cell has this probability given the others (default: 0.5)"))  # fmt: skip
    parser.add_argument("--judge", default=Tries.judge, choices=list(JUDGES), help=(
        "of the tries: the model's likelihood, or the rules of the game (default: model)"))  # fmt: skip
    parser.add_argument("--forms", action="store_true", help=(
        "try other forms of the puzzle: digits, rows, columns, bands and stacks exchanged"))  # fmt: skip
    parser.add_argument("--mean-over", type=int, default=1, metavar="N", help=(
        "forms of the puzzle whose mean prediction decides; a pass counts as N (default: 1)"))  # fmt: skip
    parser.add_argument("--repeats", type=int, metavar="N", help=(
        "rounds of a model whose layers are repeated (default: as it was trained)"))  # fmt: skip
    parser.add_argument("--seed", type=int, default=1_000_000, metavar="N", help="of the puzzles (default: 1000000)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="puzzles at a time (default: 100)")
    parser.add_argument("--out", "--output", metavar="FILE", help="write the table as JSON")
    parser.writes(out="json")
    args = parser.parse(argv)
    if not args.model:
        raise ValueError("no model: give --model a folder that dlm train sudoku wrote")
    check_least(args, 1, "puzzles", "batch_size", "tries", "mean_over")
    if not args.try_temperature >= (0 if args.forms else 1e-9) or not 0 <= args.accept <= 1:
        raise ValueError(
            f"--try-temperature is {args.try_temperature:g} and --accept {args.accept:g}: give a temperature above 0 "
            f"(or 0 with --forms, whose tries differ without one), and a probability"
        )
    if args.repeats is not None:
        check_least(args, 1, "repeats")
    args.orders = [name for name in args.orders.split(",") if name]
    args.rules = [rule for rule in args.rules.split(",") if rule]
    for name in args.orders:
        check_name("--orders", name, list(ORDERS))
    args.methods = [name for name in args.methods.split(",") if name]
    for name in args.methods:
        check_name("--methods", name, METHOD_NAMES)
    for rule in args.rules:
        fields_of(rule)
    args.clues = sudoku.parse_clues(args.clues)
    try:
        args.steps = [int(word) for word in args.steps.split(",") if word]
        args.thresholds = [float(word) for word in args.thresholds.split(",") if word]
        assert all(count > 0 for count in args.steps)
    except (ValueError, AssertionError):
        raise ValueError("--steps and --thresholds are numbers with commas between them") from None
    if not args.orders + args.rules + args.thresholds:
        raise ValueError("--orders, --rules and --thresholds are all empty: name at least one")
    return args


def run(argv: list[str]) -> int:
    """Load the model and print the table, or one answer."""
    args = parse(argv)
    import dlm

    model, tokenizer = dlm.load(args.model)
    sudoku.check_model(args.model, tokenizer)
    tries = Tries(args.tries, args.try_temperature, args.accept, args.judge, args.forms)
    if args.repeats and not hasattr(model.config, "layer_repeats"):
        raise ValueError(f"--repeats is {args.repeats}, and {args.model} has no layers to repeat: leave it out")
    if args.repeats:
        model.config.layer_repeats = args.repeats
    if args.mean_over > 1:
        from dlm.evaluation.sudoku_forms import MeanOverForms
        from dlm.kernels.packing import packed

        model = MeanOverForms(packed(model), args.mean_over)
    if args.puzzle:
        return solve_one(model, args.puzzle, args.order, tries)
    puzzles = sudoku.test_puzzles(args.puzzles, args.clues, args.seed)
    print_head(len(puzzles))
    rows = settings(args.orders, args.steps, args.thresholds, args.methods, args.rules)
    records = table(model, puzzles, rows, args.batch_size, print_row, tries)
    if args.out:
        write_json(Path(args.out), {"command": argv, "rows": records}, indent=1)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval sudoku", run, argv)


if __name__ == "__main__":
    sys.exit(main())

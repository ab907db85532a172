"""Write problems with a checkable answer to train on: 4 by 4 Sudoku, or Countdown with three numbers.

dlm train puzzles --kind sudoku4x4 --count 20000 --output puzzles.jsonl
dlm train sft --data puzzles.jsonl --format plain ...          (reads prompt and response)
dlm train grpo --data puzzles.jsonl --rewards sudoku4x4 ...    (reads prompt, and the columns of the reward)

Problem number i is a function of (seed, i) alone. --without FILE leaves out the prompts of a file, such as a test set.
With --careless 0.6 so many of the responses of Sudoku are of a solver that looks at rows alone: demonstrations of mixed
quality, from which rewards pick the better ones.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.cli.parser import Parser
from dlm.cli.scripts import guarded
from dlm.data.prompts import read_prompts
from dlm.rewards.puzzles import value_of
from dlm.utils.jsonio import to_json
from dlm.utils.names import check_name
from dlm.utils.random import example_generator

EMPTY_CELLS = (8, 8)  # of a 4 by 4 puzzle, least and most; d1's test set has 8
LARGEST = 99  # of Countdown's numbers and targets


def grids4x4() -> list[str]:
    """All 288 solved 4 by 4 grids, each as 16 digits, row by row."""
    rows, found = ["".join(row) for row in itertools.permutations("1234")], [""]
    for number in range(4):
        found = [above + row for above in found for row in rows if _fits(above, row, number)]
    return found


def _fits(above: str, row: str, number: int) -> bool:
    """Whether row `number` repeats no digit of its columns, and in rows 1 and 3 none of its boxes."""
    pairs = all(digit not in above[column::4] for column, digit in enumerate(row))
    return pairs and (number % 2 == 0 or all(not {*row[c : c + 2]} & {*above[-4:][c : c + 2]} for c in (0, 2)))


def by_rows_alone(puzzle: str) -> str:
    """A careless answer: each row's missing digits in ascending order, whatever columns and boxes hold."""
    answer = ""
    for start in range(0, 16, 4):
        row = puzzle[start : start + 4]
        missing = iter(sorted(set("1234") - set(row)))
        answer += "".join(next(missing) if digit == "0" else digit for digit in row)
    return answer


def careless(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The rows, of which so large a share has an answer by rows alone as its response."""
    if not 0 <= share <= 1 or (share and "puzzle" not in rows[0]):
        raise ValueError(f"--careless is {share}: a share of the responses of sudoku4x4, from 0 to 1")
    drawn = [example_generator(seed, 1, number).random() < share for number in range(len(rows))]
    return [
        row | {"response": by_rows_alone(row["puzzle"])} if less else row for row, less in zip(rows, drawn, strict=True)
    ]


class Sudoku4x4:
    """Puzzles with one solution."""

    def __init__(self):
        self.grids = grids4x4()

    def __call__(self, rng: np.random.Generator) -> dict:
        while True:
            solution = self.grids[rng.integers(len(self.grids))]
            empty = set(rng.permutation(16)[: rng.integers(EMPTY_CELLS[0], EMPTY_CELLS[1] + 1)].tolist())
            puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(solution))
            given = [cell for cell in range(16) if cell not in empty]
            if sum(all(grid[cell] == solution[cell] for cell in given) for grid in self.grids) == 1:
                return {"prompt": puzzle, "response": solution, "puzzle": puzzle, "solution": solution}


def countdown3(rng: np.random.Generator) -> dict:
    """Three numbers, and a target that an equation over all of them reaches."""
    while True:
        numbers = rng.integers(1, LARGEST + 1, size=3).tolist()
        signs = [str(sign) for sign in rng.choice(list("+-*/"), size=2)]
        a, b, c = (numbers[place] for place in rng.permutation(3))
        equation = f"{a}{signs[0]}{b}{signs[1]}{c}" if rng.random() < 0.5 else f"{a}{signs[0]}({b}{signs[1]}{c})"
        value = value_of(equation)
        if value is not None and value.denominator == 1 and 1 <= value <= LARGEST:
            prompt = f"{','.join(map(str, numbers))}={value}"
            return {"prompt": prompt, "response": equation, "numbers": numbers, "target": int(value)}


KINDS: dict[str, Callable[[], Callable[[np.random.Generator], dict]]] = {
    "sudoku4x4": Sudoku4x4,
    "countdown3": lambda: countdown3,
}


def problems(kind: str, count: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict]:
    """`count` problems with prompts that differ from one another and from `without`."""
    make, seen, puzzles = KINDS[kind](), set(without), []
    for index in itertools.count():
        if len(puzzles) == count:
            return puzzles
        if index > 100 * count + 1000:
            raise ValueError(
                f"only {len(puzzles)} different problems of kind {kind} were found: give a smaller --count"
            )
        row = make(example_generator(seed, 0, index))
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            puzzles.append(row)


def run(argv: list[str]) -> int:
    """Write one JSON object a line."""
    parser = Parser("train puzzles", "--kind NAME --output FILE [options]", __doc__)
    parser.add_argument("--kind", default="sudoku4x4", metavar="NAME", help=f"{', '.join(KINDS)} (sudoku4x4)")
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="how many (20000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems (0)")
    parser.add_argument("--careless", type=float, default=0.0, metavar="X", help="share of careless responses (0)")
    parser.add_argument("--without", metavar="FILE", help="prompts that are left out: one a line, or JSONL")
    parser.add_argument("--output", metavar="FILE", help="where the JSONL goes")
    parser.writes(output="jsonl")
    args = parser.parse(argv)
    check_name("kind", args.kind, KINDS)
    if not args.output or args.count < 1:
        raise ValueError("give --output FILE and a --count of 1 or more")
    without = frozenset(read_prompts(args.without)) if args.without else frozenset()
    rows = careless(problems(args.kind, args.count, args.seed, without), args.careless, args.seed)
    Path(args.output).write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {len(rows):,} problems to {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run it; a user's mistake is one line and exit code 2."""
    return guarded("dlm train puzzles", run, argv)


if __name__ == "__main__":
    sys.exit(main())

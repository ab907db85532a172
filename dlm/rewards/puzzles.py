"""Rewards of puzzles with a checkable answer: Sudoku by its cells, Countdown by its equation.

Both are those of d1 (arXiv:2504.12216, appendix on reward functions).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

from dlm.rewards.texts import last_part, text_of

__all__ = ["countdown", "sudoku4x4", "sudoku9x9", "sudoku_solved", "value_of"]

NUMBERS_RIGHT = 0.1  # of an equation that has the right numbers and another value
LONGEST_EQUATION = 200
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def sudoku4x4(prompts, completions, solution: Sequence[str], puzzle: Sequence[str] | None = None, **columns):
    """The share of the empty cells of 4 by 4 puzzles that hold the solution's digit.

    solution: 16 digits a row; puzzle: 16 digits, 0 for an empty cell, by default the digits of the prompt.
    Raises ValueError for a puzzle or a solution of another size.
    """
    return _cells(16, prompts, completions, solution, puzzle)


def sudoku9x9(prompts, completions, solution: Sequence[str], puzzle: Sequence[str] | None = None, **columns):
    """As `sudoku4x4`, of 81 cells."""
    return _cells(81, prompts, completions, solution, puzzle)


def sudoku_solved(prompts, completions, solution: Sequence[str], puzzle: Sequence[str] | None = None, **columns):
    """1 where every empty cell of a puzzle of either size is right, else 0."""
    sizes = [len(_digits(right)) for right in solution]
    puzzles = prompts if puzzle is None else puzzle
    return [
        float(_cells(size, [given], [completion], [right], [text_of(given)])[0] == 1)
        for size, given, completion, right in zip(sizes, puzzles, completions, solution, strict=True)
    ]


def _cells(size: int, prompts, completions, solution, puzzle) -> list[float]:
    scores = []
    for number, (completion, right) in enumerate(zip(completions, solution, strict=True)):
        given = _digits(text_of(prompts[number]) if puzzle is None else puzzle[number])
        right, written = _digits(right), _digits(text_of(completion))
        if len(given) != size or len(right) != size:
            raise ValueError(
                f"puzzle {number} has {len(given)} cells and its solution {len(right)}: give columns puzzle and "
                f"solution of {size} digits, 0 for an empty cell"
            )
        empty = [cell for cell in range(size) if given[cell] == "0"]
        hits = sum(written[cell : cell + 1] == right[cell] for cell in empty)
        scores.append(hits / len(empty) if empty else 1.0)
    return scores


def _digits(text: str) -> str:
    return re.sub(r"[._]", "0", re.sub(r"[^0-9._]", "", str(text)))


def countdown(prompts, completions, numbers: Sequence, target: Sequence, **columns) -> list[float]:
    """1 for an equation that takes every number once and reaches the target, 0.1 for the right numbers and another
    value, else 0.

    numbers: a list, or a text with commas, a row; target: a number a row. The equation is what stands in <answer> tags,
    else the last line; `= 23` at its end is left out.
    """
    scores = []
    for completion, given, wanted in zip(completions, numbers, target, strict=True):
        given = given.split(",") if isinstance(given, str) else given
        equation = last_part(text_of(completion)).split("=")[0].strip()
        if sorted(re.findall(r"\d+", equation)) != sorted(str(int(number)) for number in given):
            scores.append(0.0)
            continue
        value = value_of(equation)
        scores.append(0.0 if value is None else 1.0 if value == Fraction(str(wanted)) else NUMBERS_RIGHT)
    return scores


def value_of(equation: str) -> Fraction | None:
    """The value of whole numbers with + - * / and brackets; None for anything else."""
    if len(equation) > LONGEST_EQUATION:
        return None
    try:
        return _value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no equation")

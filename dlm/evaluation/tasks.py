"""Tasks: questions to generate from, and where an answer can be checked, how.

A task makes Questions; a Question makes its canvas and says whether an answer is right. Grids and evaluations read
nothing else, so a new task is a function here and a row of TASKS.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np

from dlm.chat_template import chat_ids
from dlm.data.prompts import read_prompts
from dlm.data.sources import HUB, read_rows
from dlm.rewards.texts import final_number
from dlm.sampling.canvas import Canvas
from dlm.tokenizer import BLANK, encode_prompt, template
from dlm.utils.jsonio import to_json
from dlm.utils.names import nearest

GSM8K = HUB + "openai/gsm8k/main"
BLANK_LENGTH = 8  # tokens of a blank ___ without a number
SUDOKUS, SUDOKU_SEED, SUDOKU_CLUES = 25, 1_000_000, (24, 45)  # puzzles, their seed, least and most givens
CHECK_SECONDS = 30  # that a checker may take for an answer
Check = Callable[[str], bool]


@dataclass(frozen=True)
class Question:
    """text: what a person reads, one of its kind in a task. prompt: what is continued, or a text with blanks ___
    or ids with the mask id in the slots to fill (`infill`). check: whether an answer is right; None: no check.
    prose: whether answers are free text, so that repetition in them is a fault."""

    text: str
    prompt: str | tuple[int, ...]
    check: Check | None = None
    infill: bool = False
    prose: bool = True

    def canvas(self, tokenizer, gen_length: int, mask_id: int, *, chat: bool = False, device=None) -> Canvas:
        """One row: the prompt and `gen_length` masks, or the text with its blanks. Errors: as `encode_prompt`."""
        if not isinstance(self.prompt, str):
            return Canvas.from_templates([self.prompt], mask_id, device=device)
        if self.infill:
            ids = template(tokenizer, self.prompt, BLANK_LENGTH, mask_id)
            return Canvas.from_templates([ids], mask_id, device=device)
        if chat:
            ids = chat_ids(tokenizer, [{"role": "user", "content": self.prompt}], mask_id)
        else:
            ids = encode_prompt(tokenizer, self.prompt, mask_id)
        return Canvas.from_prompts([ids], gen_length, mask_id, device=device)

    def written(self, canvas: Canvas, ends: Sequence[int]) -> list[int]:
        """The ids that were written on a filled canvas: in a continuation those before its first end-of-text."""
        ids = canvas.region(pad_id=0)[0].tolist()
        return ids if self.infill else list(takewhile(lambda token: token not in ends, ids))

    def answer(self, tokenizer, canvas: Canvas, ends: Sequence[int]) -> str:
        """The answer as text: what was written; where blanks were filled, the whole text."""
        ids = canvas.tokens[0, canvas.valid[0]].tolist() if self.infill else self.written(canvas, ends)
        return tokenizer.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------- checks


def exact(*accepted: str) -> Check:
    """Right where an answer is one of these, runs of white space taken as one space."""
    wanted = {" ".join(text.split()) for text in accepted}
    return lambda answer: " ".join(answer.split()) in wanted


def same_number(solution: str) -> Check:
    """Right where an answer's final number is the solution's."""
    wanted = final_number(solution)
    if wanted is None:
        raise ValueError(f"the solution {solution[-60:]!r} has no number to compare answers with")
    return lambda answer: final_number(answer) == wanted


def by_program(command: Sequence[str], record: dict) -> Check:
    """Right where the program says so: it reads one JSON object, the question's record with the model's "output",
    from standard input, and the last word it prints is true or false.

    Errors (when an answer is checked): a program that cannot be run, takes too long or says neither.
    """

    def check(answer: str) -> bool:
        given = to_json(record | {"output": answer}, ascii_only=False)
        name = shlex.join(command)
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"the checker {name} took more than {CHECK_SECONDS} s for one answer: make it end"
            ) from None
        said = (done.stdout.split() or [""])[-1].lower()
        if done.returncode or said not in ("true", "false"):
            reason = (done.stderr.strip() or done.stdout.strip() or "nothing printed").splitlines()[-1]
            raise ValueError(
                f"the checker {name} ended with code {done.returncode} and said neither true nor false ({reason})"
            )
        return said == "true"

    return check


# ---------------------------------------------------------------- tasks


def prompts(path: str) -> list[Question]:
    """Questions without a check, from a file of prompts (`read_prompts`)."""
    return [Question(text, text) for text in read_prompts(path)]


def gsm8k(source: str | None, limit: int | None) -> list[Question]:
    """Grade school mathematics (Cobbe et al., arXiv:2110.14168): rows with question and answer, the test split."""
    source = source or GSM8K
    questions = []
    for where, row in read_rows(source, "test"):
        if not all(isinstance(row.get(name), str) for name in ("question", "answer")):
            raise ValueError(f"{where}: a row of gsm8k has the texts question and answer, this one {sorted(row)}")
        text = row["question"].strip()
        questions.append(Question(text, f"Question: {text}\nAnswer:", same_number(row["answer"])))
        if limit is not None and len(questions) == limit:
            break
    return questions


def from_rows(path: str, command: Sequence[str] | None) -> list[Question]:
    """Questions of a JSONL file: "prompt", with blanks ___ to fill or not, and "answer" (a text, or a list of texts
    of which one will do), or a checker's command that says whether an answer is right.

    Errors: a line without a prompt, or without an answer where no checker is given.
    """
    questions = []
    for where, row in read_rows(path):
        prompt, wanted = row.get("prompt"), row.get("answer")
        accepted = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{where}: no text "prompt"')
        if command is not None:
            check = by_program(command, row)
        elif isinstance(accepted, list) and accepted and all(isinstance(text, str) for text in accepted):
            check = exact(*accepted)
        else:
            raise ValueError(f'{where}: no "answer" to compare with; add one, or give --checker COMMAND')
        questions.append(Question(prompt, prompt, check, infill=bool(BLANK.search(prompt))))
    return questions


def sudoku(source: str | None, limit: int | None) -> list[Question]:
    """Puzzles to fill in: of a file, one a line, else generated, others than `dlm train sudoku` learns from.

    Errors: a line that is no puzzle, or that has no solution or several.
    """
    from dlm.evaluation import sudoku as rules

    if source is None:
        count = limit or SUDOKUS
        made = list(rules.random_puzzles(count, SUDOKU_SEED))
        rng = np.random.default_rng([SUDOKU_SEED, 1])
        clues = rng.integers(SUDOKU_CLUES[0], SUDOKU_CLUES[1] + 1, size=count)
        puzzles = rules.add_givens(np.array([p for p, _ in made]), np.array([grid for _, grid in made]), clues, rng)
    else:
        puzzles = [rules.from_text(line) for line in read_prompts(source)[:limit]]
        for number, puzzle in enumerate(puzzles, 1):
            if len(found := rules.solutions(puzzle)) != 1:
                raise ValueError(f"{source}, puzzle {number} has {'several solutions' if found else 'no solution'}")

    def check(puzzle) -> Check:
        def right(answer: str) -> bool:
            try:
                return rules.is_solution(rules.from_text(answer), puzzle)
            except ValueError:  # something other than 81 cells
                return False

        return right

    return [
        Question(rules.to_text(puzzle), tuple(rules.to_ids(puzzle[None])[0].tolist()), check(puzzle), True, prose=False)
        for puzzle in puzzles
    ]


# Each makes the first `limit` (None: its own choice) questions from a source (None: its own).
TASKS: dict[str, Callable[[str | None, int | None], list[Question]]] = {"gsm8k": gsm8k, "sudoku": sudoku}


def open_task(name: str, *, limit: int | None = None, command: Sequence[str] | None = None) -> list[Question]:
    """The first `limit` questions of a task: one of TASKS, perhaps with its data (`gsm8k:test.jsonl`), or a JSONL file.

    command: a program that checks answers of a JSONL file. Errors: an unknown name; no question at all.
    """
    kind, _, source = name.partition(":")
    if kind in TASKS:
        if command is not None:
            raise ValueError(f"--checker is for a task of your own in a JSONL file: {kind} checks its answers itself")
        questions = TASKS[kind](source or None, limit)
    elif name.endswith((".jsonl", ".jsonl.xz")) or Path(name).exists():
        questions = from_rows(name, command)[:limit]
    else:
        raise ValueError(
            f"no task {name!r}: the nearest is {nearest(name, TASKS)!r} (one of {', '.join(TASKS)}, or a JSONL file)"
        )
    if not questions:
        raise ValueError(f"the task {name} has no question")
    return tell_apart(questions)


def tell_apart(questions: Sequence[Question]) -> list[Question]:
    """The questions, those with the same text numbered from the second on, so that a text names one of them."""
    seen: dict[str, int] = {}
    named = []
    for question in questions:
        number = seen[question.text] = seen.get(question.text, 0) + 1
        named.append(question if number == 1 else replace(question, text=f"{question.text} ({number})"))
    return named

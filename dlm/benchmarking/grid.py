"""The grid: methods x commit rules x questions x block lengths x steps, and the measurement of one of its cells.

A cell is one question under one setting. What is measured here is what must be timed; how good the answers are is
found out afterwards (`appraisal`), so that no judge works while the clock runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median

import torch

from dlm.checkpoints.generation import generate
from dlm.evaluation.tasks import Question
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import COMMIT_NAMES, SamplingConfig, as_ids
from dlm.sampling.generate import GenerationOutput
from dlm.sampling.methods import METHODS, visibility
from dlm.sampling.options import NEEDS
from dlm.sampling.schedule import lay_out, schedule
from dlm.sampling.telemetry import Telemetry
from dlm.tokenizer import EOT, mask_id
from dlm.utils.hardware import PeakMemory, synchronise
from dlm.utils.names import check_name, name_and_number


@dataclass(frozen=True)
class Cell:
    """A question (its number) under a setting. commit: a rule, with its value after a colon (`threshold:0.9`).
    steps: passes in all; None: the commit rule decides."""

    method: str
    commit: str
    question: int
    block_length: int
    steps: int | None

    @property
    def key(self) -> str:
        """The cell's name in a journal."""
        return f"{self.column}|{self.question}|{self.block_length}|{self.steps or 'own'}"

    @property
    def column(self) -> str:
        """The method's name in the results file: with its commit rule, where that is not `quota`."""
        return self.method if self.commit == "quota" else f"{self.method} {self.commit}"


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4 ... up to `limit`."""
    return tuple(2**k for k in range(max(limit, 0).bit_length()))


@dataclass(frozen=True)
class GridConfig:
    """What is swept and how often it is measured.

    methods, commits, block_lengths, steps: the axes; sampling: everything else about a generation, and the seed of
    question 0 (question i has the seed i after it). repeats: timed generations of a cell.
    """

    methods: tuple[str, ...]
    block_lengths: tuple[int, ...]
    steps: tuple[int, ...]
    commits: tuple[str, ...] = ("quota",)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    repeats: int = 3

    def __post_init__(self):
        for method in self.methods:
            check_name("method", method, METHODS)
        for name in ("methods", "commits", "block_lengths", "steps"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} is {', '.join(map(str, values)) or 'empty'}: give each value once, at least one"
                )
        for name in ("block_lengths", "steps"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} holds {value}: it counts tokens or passes; give whole numbers, 1 or more")
        for commit in self.commits:
            commit_fields(commit)
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: a cell is measured at least once; give 1 or more")

    def sampling_of(self, cell: Cell) -> SamplingConfig:
        """How a cell is generated. Errors: settings that do not go together."""
        return replace(
            self.sampling,
            method=cell.method,
            block_length=cell.block_length,
            steps=cell.steps,
            seed=self.sampling.seed + cell.question,
            **commit_fields(cell.commit),
        )


# What a number behind a commit rule sets (`threshold:0.9`), None where it takes none.
COMMIT_NUMBERS: dict[str, str | None] = dict.fromkeys(COMMIT_NAMES) | {
    rule: field for field in ("threshold", "factor", "entropy_bound") for rule in NEEDS[field][1]
}


def commit_fields(commit: str) -> dict:
    """`threshold:0.9` -> the fields of SamplingConfig. Raises ValueError as `name_and_number`."""
    name, number = name_and_number("commit", commit, COMMIT_NUMBERS)
    return {"commit": name} | number


# ---------------------------------------------------------------- which cells there are


def block_sizes(model, canvas: Canvas, sampling: SamplingConfig) -> list[int]:
    """The masked places of each block of a canvas of one row. Errors: a method that does not suit the model."""
    _, sizes = lay_out(canvas, *visibility(model, sampling.method, sampling.block_length))
    return sizes[0]


def places_asked(sizes: Sequence[int], quotas: Sequence[Sequence[int]], coarse: bool) -> int:
    """The masked places for which all passes together compute logits, from the blocks' sizes and their quotas.

    A pass asks about what is still masked in its block; coarse to fine's first pass of a block, about the whole region.
    """
    total = 0
    for block, shares in enumerate(quotas):
        left = sizes[block]
        for turn, quota in enumerate(shares):
            total += sum(sizes[block:]) if coarse and turn == 0 else left
            left -= quota
    return total


def infeasible(model, canvas: Canvas, config: GridConfig, cell: Cell) -> str | None:
    """Why a cell cannot be measured; None where it can."""
    limit = getattr(getattr(model, "config", None), "max_sequence_length", None)
    places, slots = int(canvas.masked.sum()), canvas.tokens.shape[1]
    if limit is not None and slots > limit:
        return f"prompt and region are {slots} tokens together, above the model's max_sequence_length {limit}"
    try:
        sizes = block_sizes(model, canvas, config.sampling_of(cell))
        if cell.steps is not None:
            schedule(cell.steps, sizes)
            if cell.steps > places:
                return f"steps is {cell.steps} but there are {places} places to fill, and every pass fills one or more"
    except ValueError as error:
        return str(error)
    return None


def plan(model, canvases: Sequence[Canvas], config: GridConfig) -> tuple[list[Cell], list[dict]]:
    """The cells to measure, and the settings that are left out with their reasons and the questions that have them.

    A setting is measured on all questions or on none, so that settings can be compared.
    Errors: there is no cell to measure.
    """
    cells, left_out = [], []
    most = max(int(canvas.masked.sum()) for canvas in canvases)
    for method, commit, length in product(config.methods, config.commits, config.block_lengths):
        for steps in config.steps if commit == "quota" else (None,):
            group = [Cell(method, commit, question, length, steps) for question in range(len(canvases))]
            reasons = [infeasible(model, canvas, config, one) for canvas, one in zip(canvases, group, strict=True)]
            if length > most and getattr(getattr(model, "config", None), "block_length", None) is None:
                reasons = [f"block_length is {length} but at most {most} places are to be filled: the same as {most}"]
            if not any(reasons):
                cells += group
                continue
            reason = next(filter(None, reasons))
            questions = [number for number, why in enumerate(reasons) if why]
            setting = {"method": group[0].column, "block_length": length, "steps": steps}
            left_out.append(setting | {"reason": reason, "questions": questions})
    if not cells:
        raise ValueError(f"none of the {len(left_out)} settings can be measured; the first: {left_out[0]['reason']}")
    return cells, left_out


def reference_cell(cells: Sequence[Cell]) -> Cell:
    """The cell that is measured again and again: of the first method and question, with about eight passes and the
    largest blocks, so that it is cheap and its passes are like those of others."""
    first = [cell for cell in cells if (cell.column, cell.question) == (cells[0].column, cells[0].question)]
    return min(first, key=lambda cell: (abs((cell.steps or 8) - 8), -cell.block_length))


# ---------------------------------------------------------------- measuring one


class Runner:
    """Measures cells on one model, which stays loaded. canvases: one a question, on the model's device."""

    def __init__(self, model, tokenizer, questions: Sequence[Question], canvases: Sequence[Canvas], config: GridConfig):
        self.model, self.tokenizer, self.questions, self.config = model, tokenizer, questions, config
        self.canvases, self.device = canvases, canvases[0].tokens.device
        self.ends = self.ends_of(tokenizer, model, config.sampling)
        self.mask = mask_id(tokenizer, model.config)
        self._warm: set = set()

    @staticmethod
    def ends_of(tokenizer, model, sampling: SamplingConfig) -> set[int | None]:
        """The ids that end an answer."""
        ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get(EOT), *sampling.eos_ids}
        return ends | set(as_ids(getattr(model.config, "eos_token_id", None)))

    def measure(self, cell: Cell) -> dict:
        """What one cell is: latency over the repeats, passes, positions computed, memory, the answer and its ids."""
        self.warm_up(cell)
        with PeakMemory(self.device) as memory:
            seconds, out = self.timed(cell)
        times, same = [seconds], True
        for _ in range(1, self.config.repeats):
            seconds, again = self.timed(cell)
            times.append(seconds)
            same = same and torch.equal(again.sequences, out.sequences)
        nfe, question = int(out.nfe[0]), self.questions[cell.question]
        ids = question.written(out.canvas, self.ends)
        return {
            "latency": median(times),
            "latency_min": min(times),
            "latency_median": median(times),
            "latency_max": max(times),
            "answer": question.answer(self.tokenizer, out.canvas, self.ends),
            "nfe": nfe,
            "tokens_per_forward": float(out.tokens_per_forward[0]),
            "positions_computed": int(out.positions_computed[0]),
            "places_asked": self.asked(cell) if nfe == cell.steps else None,
            "generated_tokens": len(ids),
            "tokens_per_s": len(ids) / median(times),
            "peak_memory": memory.bytes,
            "repeatable": same,
            "token_ids": ids,
            **(self.watched(cell) if cell.question == 0 else {}),
        }

    def watched(self, cell: Cell) -> dict:
        """Ties and the cache's error, of one more generation without a clock (`sampling.telemetry`)."""
        telemetry = Telemetry()
        canvas, sampling = self.canvases[cell.question], self.config.sampling_of(cell)
        generate(self.model, canvas, sampling, tokenizer=self.tokenizer, telemetry=telemetry)
        return telemetry.facts()

    def asked(self, cell: Cell) -> int:
        """`places_asked` of a cell that takes the passes that were planned."""
        sampling = self.config.sampling_of(cell)
        sizes = block_sizes(self.model, self.canvases[cell.question], sampling)
        quotas = schedule(cell.steps, sizes, sampling.split)
        return (2 if sampling.cfg_scale else 1) * places_asked(sizes, quotas, METHODS[cell.method].coarse)

    def timed(self, cell: Cell) -> tuple[float, GenerationOutput]:
        """Seconds of one generation, from the canvas on the device to the finished one, and what came out."""
        canvas, sampling = self.canvases[cell.question], self.config.sampling_of(cell)
        synchronise(self.device)
        start = time.perf_counter()
        out = generate(self.model, canvas, sampling, tokenizer=self.tokenizer)
        synchronise(self.device)
        return time.perf_counter() - start, out

    def warm_up(self, cell: Cell) -> None:
        """Generate once without a clock for every shape of pass: a method, a block length, a canvas's width.

        Two passes a block meet both kinds, the block's first pass and its later ones.
        """
        canvas = self.canvases[cell.question]
        shape = (cell.method, cell.block_length, canvas.tokens.shape[1])
        if shape in self._warm:
            return
        sizes = block_sizes(self.model, canvas, self.config.sampling_of(cell))
        few = replace(cell, commit="quota", steps=min(sum(sizes), 2 * len(sizes)))
        generate(self.model, canvas, self.config.sampling_of(few), tokenizer=self.tokenizer)
        self._warm.add(shape)

    def reference(self, cell: Cell) -> float:
        """The reference cell's latency now, in seconds: the median of the repeats."""
        self.warm_up(cell)
        return median(self.timed(cell)[0] for _ in range(self.config.repeats))

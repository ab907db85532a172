"""How good a grid's answers are: the judge's perplexity, the model's own bound, variety, right or wrong; and the
results file, put together from the journals' records.

A record is a dict with a "kind" (launch, reference, cell, judgement), a "time" in seconds since 1970, and its numbers.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlm.benchmarking.grid import Cell
from dlm.benchmarking.results import Setting
from dlm.data.examples import Example
from dlm.evaluation.judge import Judge
from dlm.evaluation.metrics import aup, distinct, is_degenerate, repetition, unigram_entropy
from dlm.evaluation.tasks import Question
from dlm.objectives.likelihood import LikelihoodConfig, bound
from dlm.sampling.canvas import Canvas
from dlm.utils.stats import proportion

FIELDS = {  # what the results file holds for each cell: name -> meaning
    "latency": "seconds of one generation, batch of one: median over the repeats",
    "latency_min": "the fastest repeat",
    "latency_median": "the same as latency",
    "latency_max": "the slowest repeat",
    "latency_relative": "latency over the reference cell's, interpolated between its measurements in the same run",
    "answer": "the text, up to its end-of-text; where blanks were filled, the whole text",
    "perplexity": "exp of the judge's mean negative log-likelihood of the answer's tokens given the prompt, "
    "end-of-text not scored; null for an answer without tokens, or without a judge",
    "judge_tokens": "tokens of the answer that the judge scored",
    "nfe": "forward passes",
    "tokens_per_forward": "tokens committed over forward passes, end-of-text and what follows it included",
    "positions_computed": "positions that all forward passes computed together",
    "places_asked": "masked places for which all forward passes together computed logits; null where the commit rule "
    "or an early end decided how many passes there were",
    "generated_tokens": "tokens of the answer, before its end-of-text",
    "tokens_per_s": "generated_tokens over latency",
    "peak_memory": "bytes: most that was allocated on the GPU, or the process's largest resident set on a CPU, "
    "during the first repeat",
    "repeatable": "whether all repeats wrote the same tokens",
    "ties": "share of the commits within rounding of a tie: their token, or that they came now and not later; of the "
    "first question, as all that follows up to cache_places; null where there was nothing to compare",
    "cache_rms": "root mean square of the logits of passes that read a cache minus those of the same passes without "
    "one, each with mean 0 over the vocabulary; one such pass in four is compared",
    "cache_nats": "mean KL divergence of their prediction from that without a cache, nats",
    "cache_same": "share of places where both have the same most probable token",
    "cache_places": "places that were compared",
    "unigram_entropy": "nats, of the answer's own distribution of tokens",
    "distinct_1": "different tokens over tokens",
    "distinct_2": "different pairs over pairs",
    "distinct_3": "different triples over triples",
    "repetition": "share of 4-grams that repeat an earlier one",
    "degenerate": "whether the answer is too repetitive for its perplexity to mean anything: see degenerate_rule",
    "bound_per_token": "nats: the model's own bound on -log p(answer | prompt) over the answer's tokens",
    "bound_error": "standard error of bound_per_token",
    "correct": "whether the task's check accepts the answer",
    "accuracy": "share of the task's questions that are right under this method, block length and steps",
    "accuracy_error": "standard error of accuracy over questions",
}


@dataclass
class Appraiser:
    """Judges cells' records in batches. judge: None for no perplexity; draws: of noise for the bound, 0 for none."""

    model: object
    questions: Sequence[Question]
    canvases: Sequence[Canvas]
    judge: Judge | None
    draws: int
    chat: bool = False

    def appraise(self, records: Sequence[dict]) -> list[dict]:
        """For each cell's record the fields of its judgement."""
        numbers = [record["question"] for record in records]
        columns = [{} for _ in records]
        if self.judge is not None:
            pairs = [
                ("" if self.questions[q].infill else self.questions[q].prompt, record["answer"])
                for q, record in zip(numbers, records, strict=True)
            ]
            for place, score in zip(columns, self.judge.score(pairs, self.chat), strict=True):
                place |= {"perplexity": score.perplexity, "judge_tokens": score.tokens}
        if self.draws:
            for place, nats in zip(columns, self._bounds(records), strict=True):
                place |= nats
        for place, q, record in zip(columns, numbers, records, strict=True):
            if self.questions[q].check is not None:
                place["correct"] = bool(self.questions[q].check(record["answer"]))
        return columns

    def _bounds(self, records: Sequence[dict]) -> list[dict]:
        """The model's own bound a token."""
        bounds = [{"bound_per_token": None, "bound_error": None} for _ in records]
        some = [i for i, record in enumerate(records) if record["token_ids"]]
        examples = [_example(self.canvases[records[i]["question"]], records[i]) for i in some]
        config, mask_id = LikelihoodConfig(draws=self.draws), self.canvases[0].mask_id
        for i, nats in zip(some, bound(self.model, examples, config, mask_id=mask_id), strict=True):
            error = nats.error / nats.tokens
            bounds[i] = {"bound_per_token": nats.nats / nats.tokens, "bound_error": error if error == error else None}
        return bounds


def _example(canvas: Canvas, record: dict) -> Example:
    """The canvas with the answer in it, the answer as the target; what comes after its end-of-text is left out.

    The question's number names the noise, so that all answers of one length to it meet the same.
    """
    row = canvas.tokens[0].cpu().numpy().copy()
    places = np.flatnonzero(canvas.editable[0].cpu().numpy())
    target = np.zeros(len(row), dtype=bool)
    target[places[: len(record["token_ids"])]] = True
    row[target] = record["token_ids"]
    kept = np.ones(len(row), dtype=bool)
    kept[places[len(record["token_ids"]) :]] = False
    return Example(row[kept], target[kept], record["question"])


# ---------------------------------------------------------------- the results file


def finished(records: Sequence[dict], judging: dict) -> dict[str, dict]:
    """Each measured cell by its key, with its judgement where there is one of this kind; of two cells the earlier.

    judging: who judged and how, as judgements say it; those of another judge do not count.
    """
    cells: dict[str, dict] = {}
    judgements: dict[str, dict] = {}
    for record in records:
        if record["kind"] == "cell":
            cells.setdefault(record["key"], record)
        elif record["kind"] == "judgement" and record["judging"] == judging:
            judgements.setdefault(record["key"], record["fields"])
    return {key: record | {"judged": key in judgements} | judgements.get(key, {}) for key, record in cells.items()}


def assemble(records: Sequence[dict], cells: Sequence[Cell], questions: Sequence[Question], judging: dict) -> dict:
    """{method: [{"question", "result": {block: {steps: cell}}}]} of the cells that were measured and judged.

    Where a commit rule decides how many passes there are, `steps` is how many there were.
    """
    done = finished(records, judging)
    relative = _relative(records)
    groups: dict[tuple, list[tuple[Cell, dict]]] = {}
    for cell in cells:
        record = done.get(cell.key)
        if record is not None and record["judged"]:
            groups.setdefault((cell.column, cell.block_length, cell.steps), []).append((cell, record))
    results: dict[str, dict[int, dict]] = {}
    for group in groups.values():
        shared = _accuracy([record for _, record in group])
        for cell, record in group:
            values = (
                record | {"latency_relative": relative[cell.key]} | shared | _variety(record, questions[cell.question])
            )
            steps = str(cell.steps or record["nfe"])
            row = results.setdefault(cell.column, {}).setdefault(cell.question, {})
            row.setdefault(str(cell.block_length), {})[steps] = {
                name: values[name] for name in FIELDS if name in values
            }
    return {
        column: [{"question": questions[q].text, "result": _in_order(rows[q])} for q in sorted(rows)]
        for column, rows in results.items()
    }


def _in_order(row: dict[str, dict]) -> dict[str, dict]:
    return {
        block: {steps: row[block][steps] for steps in sorted(row[block], key=int)} for block in sorted(row, key=int)
    }


def _variety(record: dict, question: Question) -> dict:
    ids = record["token_ids"]
    return {
        "unigram_entropy": unigram_entropy(ids),
        **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
        "repetition": repetition(ids),
        "degenerate": is_degenerate(ids) if question.prose else not ids,
        "perplexity": record.get("perplexity"),
    }


def _accuracy(records: Sequence[dict]) -> dict:
    right = [record["correct"] for record in records if "correct" in record]
    if not right:
        return {}
    share, error = proportion(right)
    return {"accuracy": share, "accuracy_error": error}


def _relative(records: Sequence[dict]) -> dict[str, float]:
    """Each cell's latency over the reference's at that moment, between the measurements before and after it."""
    measured: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record["kind"] == "reference":
            measured.setdefault(record["launch"], []).append((record["time"], record["latency"]))
    relative = {}
    for record in records:
        if record["kind"] == "cell":
            relative.setdefault(record["key"], record["latency"] / _at(measured[record["launch"]], record["time"]))
    return relative


def _at(points: list[tuple[float, float]], time: float) -> float:
    """The value at a time, between points in order of time; outside of them the nearest one's."""
    after = bisect.bisect([when for when, _ in points], time)
    if after in (0, len(points)):
        return points[min(after, len(points) - 1)][1]
    (t0, v0), (t1, v1) = points[after - 1], points[after]
    return v0 + (v1 - v0) * (time - t0) / (t1 - t0)


# ---------------------------------------------------------------- over the whole grid


def aup_by_curve(settings: Sequence[Setting]) -> list[dict]:
    """Accuracy under parallelism of every curve, a method's block length over its steps, the largest first."""
    scored = [setting for setting in settings if setting.accuracy is not None and setting.mean("tokens_per_forward")]
    best = 100 * max((setting.accuracy for setting in scored), default=0.0)
    curves: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for setting in scored:
        point = (setting.mean("tokens_per_forward"), 100 * setting.accuracy)
        curves.setdefault((setting.method, setting.block_length), []).append(point)
    entries = [
        {"method": method, "block_length": block, "aup": aup(points, best)}
        for (method, block), points in curves.items()
    ]
    return sorted(entries, key=lambda entry: -entry["aup"])

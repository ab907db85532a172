"""How good a model's choices are: accuracy, calibration error, Brier score, and the temperature that calibrates.

Shapes: N questions, each with the probabilities of its options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlm.sampling.choose import read_options
from dlm.utils.stats import proportion

__all__ = ["Calibration", "Judged", "Spread", "calibration", "fit_temperature", "read_questions", "spread"]

BINS = 10


@dataclass(frozen=True)
class Judged:
    """logs: log-probabilities of a question's options; right: which one is."""

    logs: tuple[float, ...]
    right: int

    def probabilities(self, temperature: float = 1.0) -> list[float]:
        """softmax(logs / T)."""
        most = max(self.logs)
        weights = [math.exp((x - most) / temperature) for x in self.logs]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Calibration:
    """accuracy and its standard error; ece: mean gap between how sure and how right, over bins of how sure; brier: mean
    squared distance to the truth; nll: nats; bins: (from, to, questions, mean confidence, share right)."""

    questions: int
    accuracy: float
    accuracy_error: float | None
    ece: float
    brier: float
    nll: float
    bins: tuple[tuple[float, float, int, float, float], ...]


def read_questions(path) -> list[tuple[str, tuple[str, ...]]]:
    """(text with options, the right one for each blank) of a JSONL file with "text" and "answer".

    Raises ValueError with the line for one that is none.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, answer = row["text"], row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError):
            example = '{"text": "The sky is ___{blue|green}.", "answer": "blue"}'
            raise ValueError(f"{path}:{number}: not a question, such as {example}") from None
        try:
            options = read_options(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        answers = (answer,) if isinstance(answer, str) else tuple(answer)
        if len(answers) != len(options) or not all(a in o for a, o in zip(answers, options, strict=True)):
            raise ValueError(f"{path}:{number}: the answer {answer!r} is none of the options")
        questions.append((text, answers))
    if not questions:
        raise ValueError(f"{path} has no question: give one JSON object a line")
    return questions


def calibration(judged: Sequence[Judged], temperature: float = 1.0) -> Calibration:
    """What N judged questions say, with probabilities at a temperature."""
    rows = [question.probabilities(temperature) for question in judged]
    sure = [max(p) for p in rows]
    right = [p.index(max(p)) == q.right for p, q in zip(rows, judged, strict=True)]
    bins, gap = [], 0.0
    for i in range(BINS):
        low, high = i / BINS, (i + 1) / BINS
        here = [j for j, c in enumerate(sure) if low < c <= high or (i == 0 and c == 0)]
        if here:
            mean, share = sum(sure[j] for j in here) / len(here), sum(right[j] for j in here) / len(here)
            bins.append((low, high, len(here), mean, share))
            gap += abs(mean - share) * len(here) / len(judged)
    brier = sum(sum((x - (k == q.right)) ** 2 for k, x in enumerate(p)) for p, q in zip(rows, judged, strict=True))
    nll = -sum(math.log(max(p[q.right], 1e-300)) for p, q in zip(rows, judged, strict=True))
    accuracy, error = proportion(right)
    return Calibration(len(judged), accuracy, error, gap, brier / len(judged), nll / len(judged), tuple(bins))


@dataclass(frozen=True)
class Spread:
    """The same questions judged twice, which differ in rounding alone. accuracy: the change; flipped: share of the
    questions with another choice; mean, largest: of the changes of an option's probability; near: share of the
    questions whose two best options are closer than the largest change of a difference of logs, which further rounding
    may flip."""

    questions: int
    accuracy: float
    flipped: float
    mean: float
    largest: float
    near: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:+.4f}, {100 * self.flipped:.2f}% of {self.questions} choices differ, "
            f"{100 * self.near:.2f}% lie within rounding of a tie, probabilities by {self.mean:.1e} "
            f"(at most {self.largest:.1e})"
        )


def spread(judged: Sequence[Judged], again: Sequence[Judged]) -> Spread:
    """The Spread between two judgements of the same questions, the options of each in the same order."""
    best = [[q.logs.index(max(q.logs)) for q in questions] for questions in (judged, again)]
    right = [sum(b == q.right for b, q in zip(row, judged, strict=True)) / len(judged) for row in best]
    changes = [
        abs(p - r)
        for a, b in zip(judged, again, strict=True)
        for p, r in zip(a.probabilities(), b.probabilities(), strict=True)
    ]
    moved, gaps = 0.0, []
    for a, b in zip(judged, again, strict=True):
        away = [x - y for x, y in zip(a.logs, b.logs, strict=True)]
        moved = max(moved, max(away) - min(away))
        first, second = sorted(a.logs, reverse=True)[:2] if len(a.logs) > 1 else (math.inf, -math.inf)
        gaps.append(first - second)
    return Spread(
        len(judged),
        right[1] - right[0],
        sum(a != b for a, b in zip(*best, strict=True)) / len(judged),
        sum(changes) / len(changes),
        max(changes),
        sum(gap <= moved for gap in gaps) / len(gaps),
    )


def fit_temperature(judged: Sequence[Judged]) -> float:
    """The temperature with the least mean negative log-likelihood (Guo et al., arXiv:1706.04599), by golden section."""
    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2

    def loss(x: float) -> float:
        return calibration(judged, math.exp(x)).nll

    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if loss(a) < loss(b):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)

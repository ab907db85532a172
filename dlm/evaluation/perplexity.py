"""A corpus scored by any model: bounds or exact values of all windows, over processes, safe against being stopped.

What is done is kept on disk, a line a window, under a name that says what was asked; a run that was killed, or one
with another number of processes or another batch size, goes on from it. Noise is the window's own, so that neither
changes the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from dlm.checkpoints.pretrained import load_pretrained
from dlm.data.examples import Example
from dlm.data.windows import Corpus
from dlm.evaluation.judge import Judge
from dlm.objectives.likelihood import Bound, LikelihoodConfig, bound, likelihood
from dlm.utils.jsonio import to_json
from dlm.utils.progress import duration
from dlm.utils.stats import ratio

REPORT_SECONDS = 10.0
ROUNDS = 64  # at most so many times the draws, on the way to a target error


@dataclass(frozen=True)
class Scorer:
    """A model that scores windows. exact: autoregressive, -log p itself; otherwise a bound with an error.

    score(examples, config, first_draw) -> a Bound each. limit: most tokens that it reads. digest: of its weights.
    dtype: of the numbers that it computes with.
    """

    name: str
    exact: bool
    score: Callable[[Sequence[Example], LikelihoodConfig, int], list[Bound]]
    tokenizer: object
    limit: int | None
    digest: str
    dtype: str


def open_scorer(path: str | None = None, *, device=None, dtype: str = "auto", revision: str | None = None) -> Scorer:
    """The model in a folder or at a hub id (None: the one that ships): LLaDA's layout, or any AutoModelForCausalLM.

    Errors: as `dlm.load`; a model without a tokenizer.
    """
    opened = load_pretrained(path, device=device, dtype=dtype, revision=revision, causal=True)
    facts = (opened.tokenizer, opened.max_length, opened.digest, opened.number_type)
    if opened.autoregressive:
        judge = Judge.of(opened)

        def exactly(examples, config, first_draw):
            return likelihood(judge.logits, examples, device=judge.device, batch_size=config.batch_size)

        return Scorer(opened.name, True, exactly, *facts)
    mask = opened.mask_id

    def bounded(examples, config, first_draw):
        return bound(opened.model, examples, config, mask_id=mask, first_draw=first_draw)

    return Scorer(opened.name, False, bounded, *facts)


# ------------------------------------------------------------------------------------------------------------ result


@dataclass(frozen=True)
class Score:
    """A corpus under a model, per scored token and in nats where nothing else is said.

    error: of the noise, that a second run with another seed would show (0 where exact). sampling_error: over documents
    (windows, where they were wrapped) as draws from a larger population; it holds the noise's too.
    """

    nats_per_token: float
    error: float
    sampling_error: float
    tokens: int
    bytes: int
    evaluations: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)

    def record(self) -> dict:
        """The JSON object of this result: each number with its errors."""
        per_byte = self.tokens / self.bytes / math.log(2)
        scales = {"nats_per_token": 1.0, "perplexity": self.perplexity, "bits_per_byte": per_byte}
        numbers = {
            name: {
                "value": getattr(self, name),
                "error": self.error * scale,
                "sampling_error": self.sampling_error * scale,
            }
            for name, scale in scales.items()
        }
        counts = ("tokens", "bytes", "evaluations", "seconds")
        return numbers | {name: getattr(self, name) for name in counts}


def summarise(bounds: Sequence[Bound], corpus: Corpus, size: int, seconds: float) -> Score:
    """The Score of the windows' bounds. size: bytes of the text that was scored."""
    nats, tokens = np.array([one.nats for one in bounds]), np.array([one.tokens for one in bounds], dtype=float)
    total, count = math.fsum(nats), int(tokens.sum())
    owners = int(corpus.owners.max()) + 1
    values, sizes = np.bincount(corpus.owners, nats, owners), np.bincount(corpus.owners, tokens, owners)
    _, sampling = ratio(torch.from_numpy(values), torch.from_numpy(sizes))
    error = math.sqrt(math.fsum(one.error**2 for one in bounds)) / count
    evaluations = sum(one.evaluations for one in bounds)
    return Score(total / count, error, sampling, count, size, evaluations, seconds)


def unscored_bytes(scorer: Scorer, corpus: Corpus) -> int:
    """Bytes of text that an autoregressive model does not score: a window's first token, with nothing before it."""
    if not scorer.exact:
        return 0
    first = [int(example.tokens[0]) for example in corpus.examples if example.target[0]]
    texts = scorer.tokenizer.batch_decode([[token] for token in first], skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)


# --------------------------------------------------------------------------------------------------------------- run


@dataclass
class Store:
    """What is done, one JSON line a window and round: [round, index, nats, error, evaluations, tokens].

    A folder of files, one for each process that ever wrote; None: kept in memory alone.
    """

    folder: Path | None
    done: dict[tuple[int, int], Bound] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None) -> Store:
        """Read what earlier runs left; a line that was cut short by a kill is left out."""
        store = cls(folder)
        for file in sorted(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else ():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    turn, index, nats, error, evaluations, tokens = json.loads(line)
                except ValueError:
                    continue
                store.done[turn, index] = Bound(nats, error, evaluations, tokens)
        return store

    def add(self, turn: int, found: Sequence[tuple[int, Bound]], rank: int) -> None:
        """Keep the bounds of some windows."""
        for index, one in found:
            self.done[turn, index] = one
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{rank}.jsonl").open("a", encoding="utf-8") as file:
            rows = [[turn, index, *(getattr(one, name) for name in Bound.__dataclass_fields__)] for index, one in found]
            file.write("\n" + "".join(to_json(row) + "\n" for row in rows))  # the last line may have been cut short


def store_folder(base: str | None, scorer: Scorer, corpus: Corpus, config: LikelihoodConfig) -> Path | None:
    """The folder of what is done of exactly this: weights, their type, tokens, and the settings that change numbers."""
    if base is None:
        return None
    settings = replace(config, batch_size=1)  # which changes nothing
    digest = hashlib.sha256(repr((scorer.digest, scorer.dtype, None if scorer.exact else settings)).encode())
    for example in corpus.examples:
        digest.update(example.tokens.tobytes() + example.target.tobytes())
    return Path(f"{base}.parts") / digest.hexdigest()[:24]


def score_corpus(
    scorer: Scorer, corpus: Corpus, config: LikelihoodConfig, *, state=None, store: Store | None = None,
    target_error: float | None = None, report: Callable[[str], None] | None = None,
) -> list[Bound]:  # fmt: skip
    """The bounds of all windows in order, on every process.

    config.draws for each window in a round; with `target_error` (nats per token, of the whole) rounds follow until it
    is reached. state: Accelerate's, whose processes share the windows; report: takes lines about progress.
    """
    store = Store(None) if store is None else store
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    if state is not None:
        state.wait_for_everyone()  # all have read what is done before any adds to it
    progress = _Progress(scorer.name, report if rank == 0 else None)
    rounds: list[list[Bound]] = []
    while True:
        turn = len(rounds)
        missing = [example for example in corpus.examples if (turn, example.index) not in store.done]
        missing.sort(key=lambda example: -len(example.tokens))
        mine = missing[rank::world]
        progress.start(turn, mine)
        for start in range(0, len(mine), config.batch_size):
            chunk = mine[start : start + config.batch_size]
            chunk_bounds = scorer.score(chunk, config, turn * config.draws)
            store.add(turn, [(one.index, got) for one, got in zip(chunk, chunk_bounds, strict=True)], rank)
            progress.advance(chunk)
        _share(store, turn, mine, world)
        rounds.append([store.done[turn, example.index] for example in corpus.examples])
        together = [merge(parts) for parts in zip(*rounds, strict=True)]
        error = summarise(together, corpus, corpus.bytes, 0.0).error
        if scorer.exact or target_error is None or error <= target_error or len(rounds) == ROUNDS:
            return together


def _share(store: Store, turn: int, mine: Sequence[Example], world: int) -> None:
    """Every process learns what the others found."""
    if world == 1:
        return
    from accelerate.utils import gather_object

    own = [(turn, example.index, store.done[turn, example.index]) for example in mine]
    for number, index, one in gather_object(own):
        store.done[number, index] = one


def merge(parts: Sequence[Bound]) -> Bound:
    """The mean of independent rounds over the same window."""
    if len(parts) == 1:
        return parts[0]
    nats = math.fsum(one.nats for one in parts) / len(parts)
    error = math.sqrt(math.fsum(one.error**2 for one in parts)) / len(parts)
    return Bound(nats, error, sum(one.evaluations for one in parts), parts[0].tokens)


class _Progress:
    """A line now and then: the share of tokens done and the time left."""

    def __init__(self, name: str, report: Callable[[str], None] | None):
        self.name, self.report = name, report
        self.live = report is not None and sys.stderr.isatty()

    def start(self, turn: int, mine: Sequence[Example]) -> None:
        self.turn, self.total, self.done = turn, sum(len(example.tokens) for example in mine), 0
        self.began = self.shown = time.perf_counter()

    def advance(self, chunk: Sequence[Example]) -> None:
        self.done += sum(len(example.tokens) for example in chunk)
        now = time.perf_counter()
        if self.report is None or (now - self.shown < (0.5 if self.live else REPORT_SECONDS)):
            return
        self.shown = now
        left = (now - self.began) / self.done * (self.total - self.done)
        again = f", round {self.turn + 1}" if self.turn else ""
        self.report(f"{self.name}: {self.done / self.total:.0%}{again}, left {duration(left)}")

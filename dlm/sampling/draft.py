"""Drafts: the next states of a row are guessed, and one forward pass computes what plain decoding asks of all of them.

Shapes: T slots, M masked slots of a state, V vocabulary, S ways in which a prediction may turn out.

Plain decoding is a chain of states: the logits of a state and the row's noise give the next one. A draft follows that
chain with the logits of states that were computed before and the very noise that plain decoding will draw, and so
guesses states that are yet to come. Their logits are computed beside those of the row's own state, and kept by the
tokens of the state. Where plain decoding then comes to a state whose logits are known, it reads them in place of a
pass: every commit is made by the same code from the same numbers, so that the text is that of plain decoding, at every
temperature, whatever was guessed. That a pass can verify several states of a block, which the model's own predictions
draft, is of Spiffy (arXiv:2509.18085) and SSD (arXiv:2510.04147).

Which states: a prediction changes with what is written beside it, most at the next slots. Of each state the S most
typical changes are tried, which gives the states that may follow and how probable they are; the most probable ones of
all that may come are verified. Those that are reached in two orders are one (Spiffy's directed draft graph).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from dlm.models.kv_cache import Part
from dlm.sampling.commit import Step, choose
from dlm.sampling.config import SamplingConfig
from dlm.sampling.propose import CONFIDENCES, drawn_order, sampled_from
from dlm.sampling.row import Row

__all__ = ["Drafts", "Guess", "Known"]

CONFLICT = 2  # how much further away a token makes a state that is not of the one sought than one that it lacks
WAYS = 16  # ways in which predictions may turn out that are tried
LEAST = 0.02  # states that are less probable are not verified


@dataclass(frozen=True)
class Guess:
    """A state that a row may come to.

    tokens (T,); block: its block; slots (M,): those masked in it; before: the blocks that were finished on the way,
    each as the tokens (T,) of the state that finished it, and its number; first: whether no pass has been over the
    block.
    """

    tokens: np.ndarray
    block: int
    slots: np.ndarray
    before: tuple[tuple[np.ndarray, int], ...]
    first: bool

    @property
    def name(self) -> bytes:
        return name_of(self.block, self.tokens)


def name_of(block: int, tokens: np.ndarray) -> bytes:
    """What the logits of a state are kept under."""
    return block.to_bytes(4, "little") + tokens.tobytes()


@dataclass
class Known:
    """A state whose logits are known.

    tokens (T,); slots (M,): masked ones, ascending; logits (1 or 2, M, V): of each branch; parts: of each branch, keys
    and values since the block before, which are yet to be stored; allowed (M, V): which tokens a constraint leaves;
    forbidden (N,): ids that are never proposed.
    """

    tokens: np.ndarray
    block: int
    slots: np.ndarray
    logits: Tensor
    config: SamplingConfig
    parts: list[list[Part]] = field(default_factory=list)
    allowed: Tensor | None = None
    forbidden: Tensor | None = None

    @cached_property
    def guided(self) -> Tensor:
        """(M, V) fp32 or more."""
        cond = self.logits[0] if self.logits.dtype == torch.float64 else self.logits[0].float()
        if len(self.logits) == 1:
            return cond
        uncond = self.logits[1].to(cond.dtype)
        return uncond + (self.config.cfg_scale + 1) * (cond - uncond)

    @cached_property
    def sampled(self) -> Tensor:
        """(M, V) the logits that tokens are drawn from, 0 at the largest."""
        open_logits = self.guided.clamp_min(torch.finfo(self.guided.dtype).min)
        if self.forbidden is not None:
            open_logits = open_logits.index_fill(-1, self.forbidden, -torch.inf)
        if self.allowed is not None:
            open_logits = open_logits.masked_fill(~self.allowed, -torch.inf)
        config = self.config
        return sampled_from(open_logits, config.temperature, config.tempered_confidence, config.top_k, config.top_p)

    @cached_property
    def sums(self) -> np.ndarray:
        """(M, V) cumulative weights of what is drawn."""
        return self.sampled.exp().double().cumsum(dim=-1).cpu().numpy()

    @cached_property
    def sure(self) -> np.ndarray:
        """(M, V) or (M, 1) the confidence of each token."""
        config, logits = self.config, self.sampled if self.config.tempered_confidence else self.guided
        if config.ordering == "probability":
            return logits.softmax(dim=-1).cpu().numpy()
        rule = CONFIDENCES[config.ordering]
        if rule is None:
            return np.zeros((len(logits), 1))
        return rule(logits, self.sampled, self.sampled.argmax(dim=-1))[:, None].cpu().numpy()

    @cached_property
    def few(self) -> tuple[np.ndarray, np.ndarray]:
        """(M, 4) the most probable tokens that may be proposed, and their logits."""
        most = self.sampled.topk(min(4, self.sampled.shape[-1]), dim=-1)
        return most.indices.cpu().numpy(), most.values.double().cpu().numpy()

    def tokens_at(self, place: int, uniform: float | None, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and confidences (S,) at a place, if its log-odds turn out to differ by changes (S, 2): the first moves
        which token is drawn, the second how sure it is."""
        if uniform is None:
            ids, logits = self.few[0][place], self.few[1][place]
            token = ids[(logits[None] - np.arange(len(ids)) * changes[:, :1]).argmax(axis=1)]
        else:
            sums = self.sums[place]
            odds = np.log(max(uniform, 1e-12)) - np.log1p(-uniform) + changes[:, 0]
            token = np.searchsorted(sums, sums[-1] / (1 + np.exp(-odds)), side="right").clip(max=len(sums) - 1)
        sure = self.sure[place]
        sure = sure[token] if len(sure) > 1 else np.repeat(sure, len(token))
        if self.config.ordering in ("probability", "margin"):
            odds = np.exp(changes[:, 1])
            sure = sure * odds / (1 - sure + sure * odds)
        return token, sure


class Drafts:
    """What is known of the rows of a batch: states with their logits, by row and by what they hold."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[bytes, Known]] = {}

    def note(self, row: Row, known: Known) -> None:
        """Keeps the logits of a state of this row."""
        self._rows.setdefault(row.serial, {})[name_of(known.block, known.tokens)] = known

    def find(self, row: Row, tokens: np.ndarray) -> Known | None:
        """The logits of the row's state, where they are known; tokens (T,)."""
        return self._rows.get(row.serial, {}).get(name_of(row.block, tokens))

    def allow(self, rows: Sequence[Row], request, tokens: Tensor, allowed: Tensor) -> None:
        """Notes which tokens (R, M, V) a constraint leaves in rows that hold `tokens` (B, T)."""
        for i, row in enumerate(rows):
            known = self.find(row, tokens[row.index].cpu().numpy())
            known.allowed = allowed[i, : len(known.slots)]

    def forget(self, row: Row) -> None:
        """Lets go what a row at its block cannot come to; all of it where the row is done."""
        if row.done:
            self._rows.pop(row.serial, None)
        elif row.serial in self._rows:
            # A cache that is filled at the first pass of a block makes other logits of the same tokens.
            fresh = row.turn == 0 and row.method.cached and not row.method.block_causal
            states = self._rows[row.serial]
            kept = {name: known for name, known in states.items() if known.block >= row.block and not fresh}
            self._rows[row.serial] = kept

    def guesses(self, row: Row, tokens: np.ndarray, layout: np.ndarray, mask_id: int) -> list[Guess]:
        """The `draft` most probable states that the row comes to from tokens (T,), whose logits are not known, each
        after those that lead to it. layout (T,): the block of each slot."""
        states = self._rows.get(row.serial, {})
        start, sources = name_of(row.block, tokens), _Sources(states, layout, mask_id)
        leaves = {
            start: (1.0, copy.copy(row), tokens, ())
        }  # name: probability, row at that state, what it holds, finished blocks
        guesses: list[Guess] = []
        opened: set[bytes] = set()
        while leaves:
            name = max(leaves, key=lambda leaf: leaves[leaf][0])
            chance, ghost, here, finished = leaves.pop(name)
            if chance < LEAST:
                break
            opened.add(name)
            slots = ((layout == ghost.block) & (here == mask_id)).nonzero()[0]
            if name != start and name not in states:
                guesses.append(Guess(here, ghost.block, slots, finished, ghost.turn == 0))
                if len(guesses) == row.config.draft:
                    break
            for share, after in _followers(sources, ghost, here, slots):
                following, done = _advanced(ghost, after, len(slots), layout, mask_id)
                crossed = following.block != ghost.block
                if done or (crossed and row.method.cached and not row.method.block_causal):
                    continue
                next_name = name_of(following.block, after)
                if next_name in opened:
                    continue
                before = leaves.get(next_name, (0.0,))[0]
                chain = (*finished, (after, ghost.block)) if crossed else finished
                leaves[next_name] = (before + chance * share, following, after, chain)
        return guesses


def _followers(known: _Sources, ghost: Row, tokens: np.ndarray, slots: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """The states that may follow, with their probabilities; the ghost's generator goes on."""
    ghost.generator = ghost.generator.clone_state()
    config, count = ghost.config, len(slots)
    sources = known.nearest(tokens, slots, ghost.block)
    if sources is None:
        return []
    changes = _changes(count) if config.order_temperature == 0 else _changes(count)[:1]  # (S, M, 2)
    spread = np.array([away for _, _, away in sources])
    changes = changes[:1] if not spread.any() else changes * spread[:, None]
    uniform = _uniform(ghost, count).numpy() if config.temperature > 0 else None
    written, confidence = np.empty(changes.shape[:2], np.int64), np.empty(changes.shape[:2])
    for i, (state, place, _) in enumerate(sources):
        drawn = None if uniform is None else uniform[i]
        written[:, i], confidence[:, i] = state.tokens_at(place, drawn, changes[:, i])
    if config.ordering == "random":
        confidence[:] = _uniform(ghost, count).numpy()
    if config.delay_eos:
        confidence = np.where(np.isin(written, ghost.eos), -np.inf, confidence)
    if config.order_temperature > 0:
        order = drawn_order(torch.from_numpy(confidence), config.order_temperature, [count], [ghost.generator])
        confidence = order.numpy()
    chosen = _commit(ghost, slots, confidence, known.layout)
    after = np.repeat(tokens[None], len(chosen), axis=0)
    after[:, slots] = np.where(chosen, written, tokens[slots])
    unique, times = np.unique(after[:, slots], axis=0, return_counts=True)
    found = []
    for ids, often in zip(unique, times.tolist(), strict=True):
        following = tokens.copy()
        following[slots] = ids
        found.append((often / len(chosen), following))
    return found


def _advanced(ghost: Row, tokens: np.ndarray, left: int, layout: np.ndarray, mask_id: int) -> tuple[Row, bool]:
    """The row after a pass that gave `tokens`, where `left` places were masked before, and whether it ends there."""
    following = copy.copy(ghost)
    following.advance(left - int(((layout == ghost.block) & (tokens == mask_id)).sum()))
    ours = tokens[layout >= 0]
    return following, following.done or (ghost.config.stop_at_eos and bool(np.isin(ours, ghost.eos).any()))


@lru_cache(maxsize=64)
def _changes(count: int) -> np.ndarray:
    """(S, M, 2) normal numbers, always the same, none in the first way."""
    table = np.random.default_rng(count).standard_normal((WAYS, count, 2))
    table[0] = 0
    return table


class _Sources:
    """The known states of a row, by block. mine: the slots of the block and of the one before it; held (E, W): what the
    states hold there."""

    def __init__(self, states: dict[bytes, Known], layout: np.ndarray, mask_id: int):
        self.states, self.layout, self.mask_id = list(states.values()), layout, mask_id
        self._blocks: dict[int, tuple[list[Known], np.ndarray, np.ndarray]] = {}

    def _of(self, block: int) -> tuple[list[Known], np.ndarray, np.ndarray]:
        if block not in self._blocks:
            found = [known for known in reversed(self.states) if known.block == block]  # of equals the newest
            mine = np.flatnonzero((self.layout == block) | (self.layout == block - 1))
            self._blocks[block] = found, mine, np.array([known.tokens[mine] for known in found]).reshape(-1, len(mine))
        return self._blocks[block]

    def nearest(self, tokens: np.ndarray, slots: np.ndarray, block: int) -> list[tuple[Known, int, float]] | None:
        """For each slot the state nearest to `tokens` in which it is masked, its place there, and how far a log-odds of
        its prediction is from the one sought, about: measured on a model of 12M parameters, 1.2 / distance for each
        token that is written beside it since. None where a slot is masked in no state."""
        found, mine, held = self._of(block)
        if not found:
            return None
        apart = held != tokens[mine]
        lost = apart & (held != self.mask_id)  # tokens that a state has and the one sought has not
        score = -(apart.sum(axis=1) + CONFLICT * lost.sum(axis=1)).astype(float)
        masked = held[:, np.searchsorted(mine, slots)] == self.mask_id  # (E, M)
        ranked = np.where(masked, score[:, None], -np.inf)
        if np.isneginf(ranked.max(axis=0)).any():
            return None
        sources = []
        for slot, which in zip(slots.tolist(), ranked.argmax(axis=0).tolist(), strict=True):
            near = mine[apart[which]] - slot
            away = 1.2 * float(np.sqrt((1.0 / near[near != 0] ** 2).sum()))
            sources.append((found[which], int(np.searchsorted(found[which].slots, slot)), away))
        return sources


def _uniform(ghost: Row, count: int) -> Tensor:
    """(count,) the numbers that plain decoding draws next."""
    generator = ghost.generator
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.empty(count, dtype=dtype, device=generator.device).uniform_(generator=generator).cpu()


def _commit(ghost: Row, slots: np.ndarray, confidence: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """bool (S, M): what the rule commits of the ghost's proposals with confidence (S, M)."""
    config, eligible = ghost.config, np.ones(confidence.shape, bool)
    if ghost.leading and (slots == (first := np.flatnonzero(layout == ghost.block)[0])).any():
        eligible &= slots == first
    if config.commit == "quota" and (ghost.quota or 0) <= 1:
        ranked = np.where(eligible, confidence, -np.inf)
        return np.arange(len(slots)) == ranked.argmax(axis=1)[:, None]
    name = "threshold" if config.commit == "stable" else config.commit  # whether a prediction settles is not foreseen
    quota = ghost.share.cpu().expand(len(confidence))
    places = torch.from_numpy(slots).expand(confidence.shape)
    apart = {"spacing": config.spacing, "spacing_threshold": config.spacing_threshold, "slots": places}
    step = Step(quota, config.threshold, config.factor, config.entropy_bound, **apart)
    return choose(name, torch.from_numpy(confidence), torch.from_numpy(eligible), step).numpy()

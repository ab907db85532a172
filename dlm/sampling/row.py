"""The progress of one row that is denoised: its block, its pass, what is left, and how it goes on.

Shapes: P passes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.models.attention import Visible
from dlm.sampling.config import SCHEDULED, SamplingConfig
from dlm.sampling.constraints import Written
from dlm.sampling.methods import METHODS, Method
from dlm.sampling.revise import REVISIONS, Revision
from dlm.sampling.stability import Past

__all__ = ["Row"]


@dataclass(eq=False)
class Row:
    """The progress of one row.

    index: where it lies in the batch; serial: which of all rows that ever joined. config: its settings, seed 0.
    length: slots that exist; slots: those that it has in the end, where it does not change its length. sizes: places of
    each block; masked: those without a token when it began. quotas: tokens of each pass of each block ([] where the
    commit rule decides); shares (P + 1,): the same in one tensor, in which those of a block begin at `starts`, and a
    last 0. leads: whether the first pass of a block commits its first place
    alone. block_length: slots of a block; offset: slots before slot 0 at which its blocks begin. block: the block it is
    at; turn: passes spent on it; left: places still masked in it; post: passes over it that began without one. nfe:
    forward passes so far; computed: slots that they computed.
    ahead: blocks that are written beside it (`pipeline`), and then left counts theirs too; lefts: places still masked
    in each block; since: the block of the last pass. past: what the last pass predicted (commit `stable`).
    Of a row that changes its length: places of its region, of at most `limit`; sizing: whether it still looks for its
    first length; tail: how probable end-of-text was at its end; expanded: expand tokens so far; edition: changes so
    far; stale: whether its slots have moved since the last pass.
    """

    index: int
    serial: int
    config: SamplingConfig
    visible: Visible
    eos: tuple[int, ...]
    length: int
    slots: int
    sizes: list[int]
    masked: list[int]
    quotas: list[list[int]]
    starts: list[int]
    shares: Tensor
    generator: torch.Generator
    leads: list[bool]
    block_length: int
    offset: int
    written: Written | None = None
    block: int = 0
    turn: int = 0
    left: int = 0
    post: int = 0
    nfe: int = 0
    computed: int = 0
    ahead: int = 0
    since: int = 0
    lefts: list[int] = field(default_factory=list)
    past: Past | None = None
    gapped: bool = False  # whether slots that do not exist stand before some that do
    known: int = 0  # slots from slot 0 on whose keys lie in the cache before the first pass
    fault: str | None = None  # of a lenient batch: why the row ended before it was done
    places: int = 0
    limit: int = 0
    sizing: bool = False
    tail: float = 0.0
    expanded: int = 0
    edition: int = 0
    stale: bool = False

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    @property
    def done(self) -> bool:
        return self.block >= len(self.sizes)

    @property
    def branches(self) -> int:
        """Rows of the model's batch that a pass takes: guidance needs two."""
        return 2 if self.config.cfg_scale else 1

    @property
    def choosing(self) -> bool:
        """Whether the next pass chooses the block too (coarse to fine)."""
        return self.method.coarse and self.turn == 0

    @property
    def revision(self) -> Revision | None:
        return REVISIONS[self.config.revise]

    @property
    def quota(self) -> int | None:
        """Tokens that the next pass commits; None where the commit rule decides."""
        if self.config.commit not in ("quota", "sequential") or self.config.sub_block_length is not None:
            return None
        if self.config.moves:
            return min(1, self.left)
        quotas = self.quotas[self.block]
        if self.revision is not None:  # some places may be masked again: what the passes after this one will not take
            return max(0, self.left - sum(quotas[self.turn + 1 :]))
        return min(self.left, quotas[self.turn]) if self.turn < len(quotas) else 0

    @property
    def share(self) -> Tensor:
        """The next pass's quota () on the device; 0 where the commit rule decides alone, 1 after `origin`'s last."""
        quotas, commit = self.quotas[self.block], self.config.commit
        if self.config.moves:
            return self.shares.new_tensor(1)
        if commit == "capped":  # what earlier passes left of theirs too, and after the last all
            given = sum(quotas[: self.turn + 1]) - (self.masked[self.block] - self.left)
            return self.shares.new_tensor(given)
        if self.revision is not None and self.quota is not None:
            return self.shares.new_tensor(self.quota)
        inside = commit in SCHEDULED and self.turn < len(quotas)
        return self.shares[self.starts[self.block] + self.turn if inside else -1]

    @property
    def leading(self) -> bool:
        """Whether the next pass commits the block's first place alone."""
        return self.turn == 0 and self.leads[self.block]

    @property
    def passes(self) -> int:
        """Steps of the block's time, from 1 to 0."""
        return len(self.quotas[self.block]) or self.sizes[self.block]

    @property
    def times(self) -> tuple[float, float]:
        """The time before and after the next pass."""
        turn = min(self.turn, self.passes - 1)
        return 1 - turn / self.passes, 1 - (turn + 1) / self.passes

    @property
    def last_step(self) -> bool:
        return self.turn >= self.passes - 1

    @property
    def asked(self) -> int:
        """Places that the next pass proposes for."""
        if self.choosing:
            return sum(self.sizes[self.block :])
        if self.config.sub_block_length is not None:
            return min(self.left, self.config.sub_block_length)
        return self.left if self.revision is None else self.sizes[self.block]

    @property
    def most_asked(self) -> int:
        """The most places that any pass of this kind proposes for."""
        return sum(self.sizes) if self.choosing or self.method.several else self.sizes[self.block]

    @property
    def done_before(self) -> int:
        """The first of the blocks whose slots were not computed since they were done."""
        return self.since if self.method.several else self.block - 1

    @property
    def forced(self) -> list[int]:
        """The blocks that are written whose predecessor is mostly done."""
        share, every = self.config.force_share, range(self.block, self.block + self.ahead + 1)
        return [b for b in every if b == self.block or self._written(b - 1) >= share * self.sizes[b - 1]]

    def _written(self, block: int) -> int:
        return self.sizes[block] - self.lefts[block]

    def advance_several(self, lefts: list[int]) -> None:
        """Goes on to the next pass after one over several blocks, which left so many masks in each; opens the next
        block where the last one is half done."""
        assert sum(lefts) < sum(self.lefts), f"a pass committed nothing in row {self.index}"
        front, self.lefts, self.since = self.block + self.ahead, lefts, self.block
        while not self.done and not lefts[self.block]:
            self.block += 1
        self.turn = self.turn + 1 if self.block == self.since else 0
        front = max(front, self.block)
        if front + 1 < len(lefts) and self._written(front) >= self.config.open_share * self.sizes[front]:
            front += 1
        self.ahead = front - self.block
        self.left = sum(lefts[self.block : front + 1])

    def advance(self, committed: int, masked: int = 0, revised: int = 0) -> None:
        """Goes on to the next pass, the next block or the end, after a pass that committed some places and revised
        others, of which `masked` hold the mask again."""
        assert 0 <= committed <= self.left, f"a pass committed {committed} of row {self.index}'s {self.left} places"
        free = self.revision or self.config.commit == "origin"
        assert committed or free, f"a pass committed nothing in row {self.index}"
        self.post += self.left == 0
        self.left += masked - committed
        self.turn += 1
        if self.left == 0 and not (self.revision and self._unsettled(revised)):
            self.block, self.turn, self.post = self.block + 1, 0, 0
            self.left = 0 if self.done else self.masked[self.block]

    @property
    def room_to_expand(self) -> int:
        """Expand tokens that may still be committed."""
        return max(0, min(self.limit - self.places, 2 * self.limit - self.expanded))

    def advance_moved(self, masked: list[int], revised: int) -> None:
        """Goes on after a pass that may have changed the row's length; masked: what its blocks hold now."""
        self.post += self.left == 0
        self.masked, self.turn = masked, self.turn + 1
        self.left = 0 if self.done else masked[self.block]
        while not self.done and self.left == 0 and not (self.revision and self._unsettled(revised)):
            self.block, self.turn, self.post = self.block + 1, 0, 0
            self.left = 0 if self.done else masked[self.block]
            if self.revision is not None:
                break

    def _unsettled(self, revised: int) -> bool:
        """Whether a block without masks goes on, for what a pass may still revise."""
        if self.config.commit == "ancestral":
            return self.config.revise == "remask" and self.turn < self.passes
        most = self.config.max_post_passes
        return self.revision.settles and self.post < most and (self.post == 0 or revised > 0)

    def end(self) -> None:
        """Nothing more is written to this row."""
        self.block, self.left, self.ahead = len(self.sizes), 0, 0

"""One model on several processes: rank 0 answers, and tells the others before each pass which rows join and leave.

The layers are shared out over the processes of torchrun, so that all of them must make the same calls of the model in
the same order. What a row becomes follows from its canvas, its settings and its seed: the others join and leave the
same rows and run the same passes, and nothing of the results travels.

Shapes: T slots.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import constraint_of
from dlm.sampling.denoise import turn
from dlm.sampling.growth import growth_tokens
from dlm.sampling.rows import Batch
from dlm.utils.distributed import leave_processes
from dlm.utils.errors import one_line

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained

__all__ = ["Lead", "RanksLost", "follow", "new_batch", "rank"]

BEAT_SECONDS = 30.0  # of an idle server, between signs of life: process groups give up after minutes without any


class RanksLost(ConnectionError):
    """The processes of the model no longer run the same passes; none of them can go on."""

    @classmethod
    def of(cls, error: Exception) -> RanksLost:
        """For what a pass, or the telling of it, ended with on this rank."""
        if isinstance(error, cls):
            return error
        return cls(f"a pass failed that all processes of this model share ({one_line(error)[:160]}): start them again")


def rank() -> int:
    """Of this process among those of torchrun."""
    return int(os.environ.get("RANK", 0))


def new_batch(opened: Pretrained) -> Batch:
    """An empty batch, in which a row whose logits are no numbers ends alone."""
    known = {"vocab_size": len(opened.tokenizer), "eos_token_ids": opened.end_ids}
    batch = Batch(opened.predictor, **known, growth_tokens=growth_tokens(opened.tokenizer, opened.config))
    batch.lenient = True
    return batch


@dataclass(frozen=True)
class Step:
    """What rank 0 tells. changes: in order, the ids (T,) and settings of rows that join, and the indices of those that
    leave. likely: of the batch in the pass that follows, None where none follows. stop: nothing follows any more."""

    changes: tuple[tuple[tuple[int, ...], SamplingConfig] | int, ...] = ()
    likely: int | None = None
    stop: bool = False


def _passed_on(steps: list[Any]) -> list[Any]:
    """What rank 0 gave, on every rank. Raises RanksLost where one of them has gone."""
    try:
        torch.distributed.broadcast_object_list(steps, src=0)
    except (RuntimeError, ValueError) as error:
        raise RanksLost(
            f"another process of this model has gone ({one_line(error)[:120]}): start all of them again"
        ) from error
    return steps


@dataclass
class Lead:
    """Rank 0: notes the changes of its batch, and tells them before each pass."""

    changes: list = field(default_factory=list)

    def joined(self, ids: Sequence[int], config: SamplingConfig) -> None:
        self.changes.append((tuple(ids), config))

    def left(self, index: int) -> None:
        self.changes.append(index)

    def tell(self, likely: int | None = None, stop: bool = False) -> None:
        """Tells what has changed; with `likely` all ranks run a pass now. Raises RanksLost."""
        step = Step(tuple(self.changes), likely, stop)
        self.changes.clear()
        _passed_on([step])


def follow(opened: Pretrained) -> int:
    """Every other rank: runs the passes of rank 0 until it stops; 0.

    Signals are left to rank 0, which finishes what was accepted. Raises RanksLost where it has gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_IGN)
    opened.ready()
    batch: Batch | None = None
    while not (step := _passed_on([None])[0]).stop:
        for change in step.changes:
            if isinstance(change, int):
                batch.leave(batch.rows[change])
                if not any(batch.rows):
                    batch.close()
                    batch = None
            else:
                batch = batch or new_batch(opened)
                _join(batch, opened, *change)
        if step.likely is not None:
            batch.likely = step.likely
            batch.make_room()
            try:
                turn(batch)
            except Exception as error:
                raise RanksLost.of(error) from error
    leave_processes()
    return 0


def _join(batch: Batch, opened: Pretrained, ids: Sequence[int], config: SamplingConfig) -> None:
    canvas = Canvas.from_templates([list(ids)], opened.mask_id)
    constraints = constraint_of(config, canvas, opened.tokenizer, opened.end_ids)
    batch.join(canvas.to(opened.device), config, constraints)

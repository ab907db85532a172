"""A request in the engine's queue: checked against the model and the limits, with all that its row needs.

Shapes: T slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dlm.sampling.automaton import read_vocabulary
from dlm.sampling.canvas import Canvas
from dlm.sampling.constraints import Constraint, constraint_of
from dlm.serving.requests import Handle, Request

if TYPE_CHECKING:
    from dlm.serving.engine import Engine

__all__ = ["Waiting", "prepared"]


@dataclass
class Waiting:
    """A request in the queue: its canvas (1, T) and what its places must match."""

    handle: Handle
    canvas: Canvas
    constraints: list[list[Constraint]] | None


def prepared(engine: Engine, request: Request) -> Waiting:
    """The request with its canvas. Raises ValueError where it fits neither the model nor the limits."""
    opened = engine.pretrained
    ids, limit = request.ids, engine.settings.max_slots or opened.max_length
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"prompt and answer are {len(ids)} tokens together, above the limit of {limit}: shorten the prompt or "
            "max_tokens"
        )
    size = getattr(opened.config, "embedding_size", None) or 2**62
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise ValueError(f"the prompt holds id {wrong[0]}, but the model's ids go from 0 to {size - 1}")
    handle = Handle(request if request.timeout is not None else replace(request, timeout=engine.settings.timeout))
    canvas = Canvas.from_templates([ids], opened.mask_id)
    config = request.config
    if config.regex or config.json_schema or config.choices:
        with engine.text_lock:
            read_vocabulary(opened.tokenizer)
    constraints = constraint_of(config, canvas, opened.tokenizer, opened.end_ids)  # a large one takes seconds
    return Waiting(handle, canvas, constraints)

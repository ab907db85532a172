"""Rows of text with some tokens masked -> what the model says of the tokens that are scored.

Shapes: B rows of a forward pass, T their length, L target tokens of an example, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.data.examples import Example
from dlm.models.attention import Visible
from dlm.models.predictor import as_predictor, guess_places


@dataclass(frozen=True)
class Row:
    """One row of a forward pass: tokens (T,) int64; masked, scored, given (T,) bool. What is scored is masked;
    what is given is masked in the other branch of guidance."""

    tokens: np.ndarray
    masked: np.ndarray
    scored: np.ndarray
    given: np.ndarray

    @classmethod
    def of(cls, example: Example, masked: np.ndarray, scored: np.ndarray | None = None) -> Row:
        """The row of an example; masked, scored (L,) bool over its target tokens, scored None: all that is masked."""
        rows = []
        for chosen in (masked, masked if scored is None else scored):
            row = np.zeros(len(example.tokens), dtype=bool)
            row[example.target] = chosen
            rows.append(row)
        return cls(example.tokens, *rows, ~example.target)

    def until(self, length: int) -> Row:
        """The first `length` tokens alone, for a model that does not see what comes after."""
        return Row(self.tokens[:length], self.masked[:length], self.scored[:length], self.given[:length])


Measure = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), true tokens (N,) -> (N, ...)


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """-log p of the true tokens, in nats."""
    return F.cross_entropy(logits, truth, reduction="none")


def cross_entropies(
    model, rows: Sequence[Row], *, mask_id: int, cfg_scale: float = 0.0, batch_size: int = 16,
    visible: Visible | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """For each row the cross entropies (N,) float64 of its scored tokens in order, in nats."""
    options = {"mask_id": mask_id, "cfg_scale": cfg_scale, "batch_size": batch_size, "visible": visible}
    return measured(model, rows, cross_entropy, **options)


@torch.inference_mode()
def measured(
    model, rows: Sequence[Row], measure: Measure, *, mask_id: int, cfg_scale: float = 0.0, batch_size: int = 16,
    visible: Visible | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """For each row what `measure` says of its scored tokens in order, (N, ...) float64.

    Rows of any lengths share a forward pass. visible: a rule in place of the model's own.
    Raises FloatingPointError where the model gives no numbers.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    device = next((p.device for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    some = [i for i in range(len(rows)) if rows[i].scored.any()]
    order = sorted(some, key=lambda i: -len(rows[i].tokens))  # rows of like length together
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        batch = [rows[i] for i in here]
        values = _forward(model, batch, measure, mask_id, cfg_scale, device, visible)
        counts = [int(row.scored.sum()) for row in batch]
        for i, part in zip(here, np.split(values, np.cumsum(counts)[:-1]), strict=True):
            found[i] = part
    return found


def _forward(model, batch: list[Row], measure: Measure, mask_id: int, cfg_scale: float, device, visible) -> np.ndarray:
    """What `measure` says of the scored tokens of a batch, flat in row order."""
    tokens, masked, scored, given, valid = _pad(batch, device)
    truth, keep = tokens[scored], scored
    xt = torch.where(masked, mask_id, tokens)
    if cfg_scale:
        xt = torch.cat([xt, torch.where(given, mask_id, xt)])
        keep = scored.repeat(2, 1)
        valid = None if valid is None else valid.repeat(2, 1)
    keep = guess_places(model, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
    rule = {} if visible is None else {"visible": visible}
    logits = as_predictor(model)(xt, valid=valid, logits_to_keep=keep, **rule)  # (N, V), with guidance (2N, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if cfg_scale:
        cond, uncond = logits.chunk(2)
        logits = uncond + (cfg_scale + 1) * (cond - uncond)
    values = measure(logits, truth).double().cpu().numpy()
    if np.isnan(values).any():
        raise FloatingPointError(
            "the model's logits are no numbers: its weights are damaged, or overflow in this dtype (try float32)"
        )
    return values


def _pad(batch: list[Row], device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """tokens, masked, scored, given (B, T) and which slots exist, None where all do."""
    longest = max(len(row.tokens) for row in batch)
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    flags = np.zeros((4, len(batch), longest), dtype=bool)
    for i, row in enumerate(batch):
        size = len(row.tokens)
        tokens[i, :size] = row.tokens
        flags[0, i, :size], flags[1, i, :size], flags[2, i, :size], flags[3, i, :size] = (
            row.masked, row.scored, row.given, True,
        )  # fmt: skip
    masked, scored, given, valid = torch.from_numpy(flags).to(device)
    return torch.from_numpy(tokens).to(device), masked, scored, given, None if flags[3].all() else valid

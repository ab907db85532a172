"""The canvas: the ids being denoised, which of them may change, and which slots exist at all.

Shapes: B batch (rows), T slots. Row i is `[prompt_i | region to generate | not valid]`; for infilling the region is
wherever the row holds the mask token. Prompts of different lengths are the ordinary case, never padded on the left.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["Canvas", "check_slots"]


@dataclass(frozen=True)
class Canvas:
    """tokens (B, T) int64 ids; editable (B, T) bool, the region; valid (B, T) bool, False on padding; mask_id.

    A slot is masked while it is editable and holds `mask_id`. Slots that are not editable never change.
    """

    tokens: Tensor
    editable: Tensor
    valid: Tensor
    mask_id: int

    def __post_init__(self):
        for name in ("tokens", "editable", "valid"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(
                    f"canvas {name} is a {type(getattr(self, name)).__name__}: give a tensor (rows, slots), or make "
                    "the canvas of lists of ids (Canvas.from_prompts, Canvas.from_templates)"
                )
        if not isinstance(self.mask_id, Integral) or isinstance(self.mask_id, bool):
            raise TypeError(f"canvas mask_id is {self.mask_id!r}: give the id of the mask token, a whole number")
        if self.tokens.ndim != 2:
            raise ValueError(f"canvas tokens have shape {tuple(self.tokens.shape)}; they must be (rows, slots)")
        if self.tokens.dtype != torch.int64:
            raise ValueError(f"canvas tokens are {self.tokens.dtype}; token ids are int64")
        for name in ("editable", "valid"):
            other = getattr(self, name)
            if other.shape != self.tokens.shape or other.dtype != torch.bool:
                raise ValueError(
                    f"canvas {name} is {other.dtype} of shape {tuple(other.shape)}; "
                    f"it must be bool of the tokens' shape {tuple(self.tokens.shape)}"
                )

    @classmethod
    def from_prompts(cls, prompts: Iterable[Sequence[int]], gen_length: int, mask_id: int, *, device=None) -> "Canvas":
        """Rows `[prompt | gen_length masks]`; a prompt is a sequence of ids and may be empty.

        Raises ValueError for a gen_length below 1 and for a prompt that holds `mask_id`.
        """
        if gen_length < 1:
            raise ValueError(f"gen_length is {gen_length}: there is nothing to generate; give 1 or more")
        rows = [_ids(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        for i, row in enumerate(rows):
            if mask_id in row:
                raise ValueError(
                    f"prompt {i} holds the mask token (id {mask_id}) at place {row.index(mask_id)}; "
                    "remove it, or infill (Canvas.from_templates, dlm infill)"
                )
        lengths = [len(row) for row in rows]
        return cls._build([row + [mask_id] * gen_length for row in rows], lengths, mask_id, device)

    @classmethod
    def from_templates(cls, templates: Iterable[Sequence[int]], mask_id: int, *, device=None) -> "Canvas":
        """Rows with text on both sides of what is missing: every `mask_id` in a template is a place to fill."""
        rows = [_ids(template, f"template {i}") for i, template in enumerate(templates)]
        for i, row in enumerate(rows):
            if mask_id not in row:
                raise ValueError(f"template {i} has no mask token (id {mask_id}): it has no blank to fill")
        return cls._build(rows, None, mask_id, device)

    @classmethod
    def _build(cls, rows: list[list[int]], prompt_lengths, mask_id: int, device) -> "Canvas":
        if not rows:
            raise ValueError("no prompts were given: generation needs at least one row (it may be empty)")
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        slots = torch.arange(longest)[None]
        valid = slots < torch.tensor([len(row) for row in rows])[:, None]
        if prompt_lengths is None:
            editable = valid & (tokens == mask_id)
        else:
            editable = valid & (slots >= torch.tensor(prompt_lengths)[:, None])
        return cls(tokens, editable, valid, mask_id).to(device)

    def filled_up(self, block_length: int, offsets: Sequence[int], limit: int | None) -> tuple["Canvas", Tensor]:
        """The canvas with masks to the end of each row's last block, where the region reaches the row's end, and which
        slots (B, T') those are. Blocks begin `offsets[i]` slots before slot 0; limit: slots that a row may have."""
        lengths, most = self.valid.sum(dim=1).tolist(), limit or 2**62
        ends = [
            min(-(-(length + ahead) // block_length) * block_length - ahead, max(most, length))
            for length, ahead in zip(lengths, offsets, strict=True)
        ]
        masked = self.masked
        ends = [
            end if length and bool(masked[i, length - 1]) else length
            for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]
        width, (rows, slots) = max(self.tokens.shape[1], *ends), self.tokens.shape
        bound = torch.tensor(ends, device=self.tokens.device)[:, None]
        wide = torch.arange(width, device=self.tokens.device)[None]
        valid, tokens, editable = (x.new_zeros(rows, width) for x in (self.valid, self.tokens, self.editable))
        valid[:, :slots], tokens[:, :slots], editable[:, :slots] = self.valid, self.tokens, self.editable
        extra = (wide < bound) & ~valid
        return Canvas(tokens.masked_fill(extra, self.mask_id), editable | extra, valid | extra, self.mask_id), extra

    @property
    def masked(self) -> Tensor:
        """(B, T) bool: the places still to fill."""
        return self.editable & self.valid & (self.tokens == self.mask_id)

    @property
    def given(self) -> Tensor:
        """(B, T) bool: the tokens that condition the generation (the prompt; padding is not counted)."""
        return self.valid & ~self.editable

    def to(self, device) -> "Canvas":
        """The canvas on a device; None leaves it where it is."""
        if device is None:
            return self
        tokens, editable, valid = (x.to(device) for x in (self.tokens, self.editable, self.valid))
        return replace(self, tokens=tokens, editable=editable, valid=valid)

    def rows(self, index: Tensor) -> "Canvas":
        """The canvas of these rows alone; index (R,)."""
        return replace(self, tokens=self.tokens[index], editable=self.editable[index], valid=self.valid[index])

    def region(self, pad_id: int) -> Tensor:
        """(B, G) ids at the editable places in order, rows with fewer of them filled with `pad_id` at the end."""
        rows = [row[here] for row, here in zip(self.tokens, self.editable & self.valid, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


def check_slots(
    slots: int, settings, *, what: str = "prompt and region are", fix: str = "shorten the prompt or gen_length"
) -> None:
    """Raises ValueError where a row has more slots than a model of these settings takes; what has them, and the fix."""
    limit = getattr(settings, "max_sequence_length", None)
    if limit is not None and slots > limit:
        raise ValueError(f"{what} {slots} tokens together, above the model's max_sequence_length {limit}: {fix}")


def _ids(row: Sequence[int], name: str) -> list[int]:
    """The row as a list of ints. Raises ValueError for anything that is not a sequence of whole numbers."""
    try:
        return [operator.index(token) for token in row]
    except TypeError:
        raise ValueError(f"{name} is {str(row)[:60]}: give a sequence of token ids, whole numbers") from None

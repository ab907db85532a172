"""A frozen model beside the one that is trained: a copy, or the model itself with its adapters off."""

from __future__ import annotations

import copy
import hashlib
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["as_reference", "check_same_shape", "check_vocabulary", "digest", "frozen"]


def frozen(model: nn.Module) -> nn.Module:
    """A copy of a model that is not trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def digest(model: nn.Module | None) -> str:
    """SHA-256 of a model's weights; "" for None."""
    if model is None:
        return ""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def as_reference(reference: nn.Module | None, model: nn.Module):
    """The reference; None: `model` (a PEFT model, wrapped or not) with its adapters off, within the block."""
    if reference is not None:
        yield reference
        return
    plain = getattr(model, "module", model)
    with plain.disable_adapter():
        yield plain


def check_vocabulary(model: nn.Module, reference: nn.Module, name: str) -> None:
    """Raises ValueError for a reference that does not read the policy's tokens."""
    for field in ("embedding_size", "mask_token_id"):
        mine, its = getattr(model.config, field), getattr(reference.config, field)
        if mine != its:
            raise ValueError(f"reference {name} has {field} {its} and the model {mine}: give one with its vocabulary")


def check_same_shape(model: nn.Module, teacher: nn.Module, name: str) -> None:
    """Raises ValueError for a teacher of another family, or whose weights have other names or shapes."""
    mine, its = ({key: tuple(value.shape) for key, value in one.state_dict().items()} for one in (model, teacher))
    kinds = [(one.config.model_type, getattr(one.config, "shift_logits", None)) for one in (model, teacher)]
    odd = next((key for key in {**mine, **its} if mine.get(key) != its.get(key)), None)
    if kinds[0] != kinds[1] or odd:
        what = f"{odd} is {its.get(odd)} there and {mine.get(odd)} here" if odd else f"{kinds[1][0]}, not {kinds[0][0]}"
        raise ValueError(f"teacher {name} is of another shape or family ({what}): give one like the model")

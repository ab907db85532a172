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


def check_vocabulary(model: nn.Module, other: nn.Module, name: str, tokenizers: tuple = (), kind: str = "reference"):
    """Raises ValueError for a reference or teacher (`kind`) that does not read the model's tokens.

    tokenizers: the model's and its own, None where its folder has none.
    """
    for field in ("embedding_size", "mask_token_id"):
        mine, its = getattr(model.config, field), getattr(other.config, field)
        if mine != its:
            raise ValueError(f"{kind} {name} has {field} {its} and the model {mine}: give one with its vocabulary")
    if len(tokenizers) == 2 and tokenizers[1] is not None:
        mine, its = (tokenizer.get_vocab() for tokenizer in tokenizers)
        odd = next((word for word in mine if mine[word] != its.get(word)), None)
        if odd is not None:
            where = f"number {its[odd]} there and {mine[odd]} here" if odd in its else "not in its tokenizer"
            raise ValueError(f"{kind} {name} has other tokens ({odd!r} is {where}): give one with the same tokenizer")


def check_same_shape(model: nn.Module, teacher: nn.Module, name: str) -> None:
    """Raises ValueError for a teacher of another family, or whose weights have other names or shapes."""
    mine, its = ({key: tuple(value.shape) for key, value in one.state_dict().items()} for one in (model, teacher))
    kinds = [(one.config.model_type, getattr(one.config, "shift_logits", None)) for one in (model, teacher)]
    odd = next((key for key in {**mine, **its} if mine.get(key) != its.get(key)), None)
    if kinds[0] != kinds[1] or odd:
        what = f"{odd} is {its.get(odd)} there and {mine.get(odd)} here" if odd else f"{kinds[1][0]}, not {kinds[0][0]}"
        raise ValueError(f"teacher {name} is of another shape or family ({what}): give one like the model")

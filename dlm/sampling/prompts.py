"""What a caller hands to `generate` -> rows of ids and the canvas, and what of the checkpoint the sampler must know.

Rows come as texts, ids, padded tensors with their mask, or a tokenizer's output.

Shapes: B rows, P tokens of a padded prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch

from dlm.sampling.canvas import Canvas, check_slots
from dlm.sampling.config import SamplingConfig, as_ids
from dlm.sampling.constraints import constraint_of
from dlm.sampling.growth import growth_tokens
from dlm.tokenizer import encode_prompt, mask_id

__all__ = ["prepare", "rows_of", "without_padding"]


def prepare(predictor, inputs, config: SamplingConfig, tokenizer=None) -> tuple[Canvas, dict]:
    """The canvas for these inputs and what else `denoise` should know (vocab_size, eos_token_ids, constraints,
    growth_tokens)."""
    settings = getattr(predictor, "config", None)
    vocab_size = getattr(settings, "vocab_size", None) if tokenizer is None else len(tokenizer)
    known = {"vocab_size": vocab_size, "eos_token_ids": as_ids(getattr(settings, "eos_token_id", None))}
    known["growth_tokens"] = growth_tokens(tokenizer, settings)
    if isinstance(inputs, Canvas):
        _check_ids(inputs, settings, "canvas holds")
        known["constraints"] = constraint_of(config, inputs, tokenizer, known["eos_token_ids"])
        return inputs, known
    inputs = rows_of(inputs, tokenizer, settings)
    if inputs and all(isinstance(row, Sized) for row in inputs):  # before memory is taken
        check_slots(max(map(len, inputs)) + config.gen_length, settings)
    canvas = Canvas.from_prompts(
        inputs, config.start_length, mask_id(tokenizer, settings), device=_device_of(predictor)
    )
    _check_ids(canvas, settings, "prompts hold")
    known["constraints"] = constraint_of(config, canvas, tokenizer, known["eos_token_ids"])
    return canvas, known


def _check_ids(canvas: Canvas, settings, what: str) -> None:
    """Raises ValueError for ids that the model has no embedding for, padding included: it is embedded too."""
    size = getattr(settings, "embedding_size", None)
    wrong = canvas.tokens[(canvas.tokens < 0) | (canvas.tokens >= (size or 2**62))]
    if len(wrong):
        raise ValueError(f"the {what} id {int(wrong[0])}, but the model's ids go from 0 to {size - 1 if size else '…'}")


def _device_of(predictor) -> torch.device | None:
    if isinstance(predictor, torch.nn.Module):
        return next((weight.device for weight in predictor.parameters()), None)
    return getattr(predictor, "device", None)


def rows_of(inputs: Any, tokenizer=None, config=None) -> list[Any]:
    """One sequence of ids a prompt.

    inputs: a text or several (these need `tokenizer`), ids (P,) or (B, P), id lists of any lengths, or what a
    tokenizer or a chat template returns: a mapping with `input_ids` and perhaps `attention_mask`. config: the model's,
    for its padding token.
    Raises ValueError for a mapping without ids, for padding that no mask tells from the prompt, and for conversations.
    """
    if isinstance(inputs, Mapping):
        return _of_mapping(inputs, tokenizer, config)
    if hasattr(inputs, "tolist"):  # a tensor or an array
        size = getattr(inputs, "ndim", 1)
        if size == 0 or (size == 2 and not len(inputs)):
            what = "no rows" if size else "one number"
            raise ValueError(f"the prompts are a tensor of {what}: generation needs at least one row of ids")
        inputs = inputs.tolist()
        inputs = inputs if inputs and isinstance(inputs[0], list) else [inputs]
        _refuse_padding(inputs, tokenizer, config)
        return inputs
    if not isinstance(inputs, str | Sequence):
        raise ValueError(
            f"the prompts are of type {type(inputs).__name__}: give a text or several, lists of token ids, a tensor of "
            "ids, or what a tokenizer returned"
        )
    if isinstance(inputs, str) or (len(inputs) and isinstance(inputs[0], int | float)):
        inputs = [inputs]
    if any(isinstance(prompt, Mapping) for prompt in inputs):
        raise ValueError(
            "a prompt is a mapping: of a conversation give the ids, tokenizer.apply_chat_template(messages, "
            "add_generation_prompt=True)"
        )
    if any(isinstance(prompt, str) for prompt in inputs):
        if tokenizer is None:
            raise ValueError("text was given but no tokenizer: pass tokenizer=, or give token ids")
        inputs = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in inputs]
    return list(inputs)


def _of_mapping(inputs: Mapping, tokenizer, config) -> list[list[int]]:
    if "input_ids" not in inputs:
        raise ValueError(f"the inputs are a mapping with {', '.join(map(str, inputs))}: it needs input_ids")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return rows_of(ids, tokenizer, config)
    if getattr(ids, "ndim", 0) == 2 and not len(ids):
        raise ValueError("input_ids is a tensor of no rows: generation needs at least one row")
    ids, mask = (x.tolist() if hasattr(x, "tolist") else list(x) for x in (ids, mask))
    if not ids or not isinstance(ids[0], list | tuple):
        ids, mask = [ids], [mask]
    return without_padding(ids, mask)


def without_padding(ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ids of each row where its mask is 1. Raises ValueError for a mask of another shape or with a gap."""
    if [len(row) for row in ids] != [len(row) for row in mask]:
        raise ValueError("attention_mask has another shape than input_ids: give what the tokenizer returned with them")
    rows = []
    for i, (row, seen) in enumerate(zip(ids, mask, strict=True)):
        here = [j for j, one in enumerate(seen) if one]
        if here and here[-1] - here[0] + 1 != len(here):
            raise ValueError(
                f"attention_mask of row {i} has a gap: 0 marks padding at the ends; give prompts without gaps"
            )
        rows.append([row[j] for j in here])
    return rows


def _refuse_padding(rows: list[list[int]], tokenizer, config) -> None:
    """Raises ValueError where rows of one tensor begin or end with padding, which would be read as prompt.

    A padding token that is also begin- or end-of-text may stand once at the end of every row.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    if pad is None or not rows:
        return
    ends = {getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)}
    ends |= {getattr(config, "bos_token_id", None), *as_ids(getattr(config, "eos_token_id", None))}
    for backwards, side in ((False, "begins"), (True, "ends")):
        runs = [_run(reversed(row) if backwards else row, pad) for row in rows]
        if max(runs) > int(pad in ends) or len(set(runs)) > 1:
            row = runs.index(max(runs))
            raise ValueError(
                f"row {row} of the prompts {side} with padding (token {pad}, {max(runs)} times), which would be read "
                "as prompt: give the mapping that the tokenizer returned, with its attention_mask, or lists of ids"
            )


def _run(row, pad: int) -> int:
    length = 0
    for token in row:
        if token != pad:
            break
        length += 1
    return length

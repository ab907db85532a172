"""What a caller hands to `generate` -> the canvas, and what the checkpoint says that the sampler must know."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig, as_ids
from dlm.sampling.constraints import constraint_of
from dlm.sampling.denoise import denoise
from dlm.sampling.growth import growth_tokens
from dlm.sampling.prompts import rows_of
from dlm.sampling.telemetry import Telemetry
from dlm.tokenizer import mask_id

__all__ = ["GenerationOutput", "generate", "prepare"]


@dataclass
class GenerationOutput(ModelOutput):
    """sequences (B, G) the generated ids; canvas: the final state; per row nfe, tokens_per_forward, positions_computed.

    After a row's early end (`stop_at_eos`) its sequence holds end-of-text. Rows that fill fewer places than others
    (infilling) are padded at the end with end-of-text, or 0 where there is none.
    """

    sequences: Tensor | None = None
    canvas: Canvas | None = None
    nfe: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    positions_computed: Tensor | None = None


# ---------------------------------------------------------------- the whole


def generate(
    predictor,
    inputs,
    config: SamplingConfig | None = None,
    *,
    tokenizer=None,
    telemetry: Telemetry | None = None,
) -> GenerationOutput:
    """Generates for a batch with any mask predictor: `prepare`, then `denoise` to the end.

    inputs: id lists of any lengths, ids (B, P) or (P,), texts (these need `tokenizer`), what a tokenizer or a chat
    template returns (a mapping with `input_ids` and `attention_mask`), or a `Canvas`. telemetry: watches the passes.
    Raises ValueError for inputs or settings that do not fit the model, FloatingPointError for NaN logits.
    """
    config = config or SamplingConfig()
    canvas, settings = prepare(predictor, inputs, config, tokenizer)
    state, committed = None, torch.zeros(len(canvas.tokens), dtype=torch.int64, device=canvas.tokens.device)
    for state in denoise(predictor, canvas, config, **settings, telemetry=telemetry):
        committed += state.committed.sum(dim=1)
    if state is None:
        raise ValueError("the canvas has no masked place: there is nothing to generate")
    ids = config.eos_ids or settings["eos_token_ids"]
    return GenerationOutput(
        sequences=state.canvas.region(pad_id=ids[0] if ids else 0),
        canvas=state.canvas,
        nfe=state.nfe,
        tokens_per_forward=committed.cpu() / state.nfe.clamp_min(1),
        positions_computed=state.positions_computed,
    )


def prepare(predictor, inputs, config: SamplingConfig, tokenizer=None) -> tuple[Canvas, dict]:
    """The canvas for these inputs and what else `denoise` should know (vocab_size, eos_token_ids, constraints,
    growth_tokens)."""
    settings = getattr(predictor, "config", None)
    vocab_size = getattr(settings, "vocab_size", None) if tokenizer is None else len(tokenizer)
    known = {"vocab_size": vocab_size, "eos_token_ids": as_ids(getattr(settings, "eos_token_id", None))}
    known["growth_tokens"] = growth_tokens(tokenizer, settings)
    if isinstance(inputs, Canvas):
        known["constraints"] = constraint_of(config, inputs, tokenizer, known["eos_token_ids"])
        return inputs, known
    inputs = rows_of(inputs, tokenizer, settings)
    canvas = Canvas.from_prompts(
        inputs, config.start_length, mask_id(tokenizer, settings), device=_device_of(predictor)
    )
    size = getattr(settings, "embedding_size", None)
    wrong = canvas.tokens[(canvas.tokens < 0) | (canvas.tokens >= (size or 2**62))]
    if len(wrong):
        raise ValueError(
            f"the prompts hold id {int(wrong[0])}, but the model's ids go from 0 to {size - 1 if size else '…'}"
        )
    known["constraints"] = constraint_of(config, canvas, tokenizer, known["eos_token_ids"])
    return canvas, known


def _device_of(predictor) -> torch.device | None:
    if isinstance(predictor, torch.nn.Module):
        return next((weight.device for weight in predictor.parameters()), None)
    return getattr(predictor, "device", None)

"""A whole generation: what a caller hands to `generate` -> the filled canvas."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig, as_config
from dlm.sampling.denoise import denoise
from dlm.sampling.prompts import prepare
from dlm.sampling.telemetry import Telemetry

__all__ = ["GenerationOutput", "generate"]


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
    config = as_config(config)
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

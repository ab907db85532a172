"""`generate` and `denoise` of whatever holds a mask predictor: a model is packed for the processor first, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dlm.kernels.packed import packed
from dlm.sampling import choose as options
from dlm.sampling import denoise as loop
from dlm.sampling import generate as whole
from dlm.sampling.canvas import Canvas
from dlm.sampling.choose import Chosen
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import Constraint
from dlm.sampling.denoise import DenoiseState
from dlm.sampling.generate import GenerationOutput
from dlm.tokenizer import mask_id

__all__ = ["choose", "denoise", "generate"]


def generate(model, inputs, config: SamplingConfig | None = None, *, tokenizer=None) -> GenerationOutput:
    """Generates for a batch with a model or any mask predictor.

    inputs: id lists of any lengths, ids (B, P) or (P,), texts (these need `tokenizer`), or a `Canvas`. A model's
    packed copy is made at the first call and kept with it (`kernels.packed`).
    Raises ValueError for inputs or settings that do not fit the model, FloatingPointError for NaN logits.
    """
    return whole.generate(packed(model), inputs, config, tokenizer=tokenizer)


def choose(model, text: str, *, tokenizer, orders: int = 8, seed: int = 0) -> Chosen:
    """Ranks the options of a text's blanks (`The sky is ___{blue|green}.`), as `sampling.choose.choose`."""
    predictor = packed(model)
    return options.choose(
        predictor, text, tokenizer=tokenizer, mask_id=mask_id(tokenizer, predictor.config), orders=orders, seed=seed
    )


def denoise(
    model,
    canvas: Canvas,
    config: SamplingConfig | None = None,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    constraints: Sequence[Sequence[Constraint]] | None = None,
    likely: int = 0,
) -> Iterator[DenoiseState]:
    """Fills the masked places of a canvas with a model or any mask predictor, and yields a state after every turn.

    Arguments and errors are those of `sampling.denoise.denoise`.
    """
    known = {"vocab_size": vocab_size, "eos_token_ids": eos_token_ids, "constraints": constraints, "likely": likely}
    return loop.denoise(packed(model), canvas, config, **known)

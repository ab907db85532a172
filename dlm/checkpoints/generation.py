"""`generate` and `denoise` of whatever holds a mask predictor: a model is packed for the processor first, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlm.checkpoints.defaults import family_defaults
from dlm.checkpoints.files import defaults_for, sampling_with
from dlm.checkpoints.pretrained import Pretrained
from dlm.kernels.packing import packed
from dlm.sampling import autoregressive
from dlm.sampling import choose as options
from dlm.sampling import denoise as loop
from dlm.sampling import generate as whole
from dlm.sampling.canvas import Canvas, check_slots
from dlm.sampling.choose import Chosen
from dlm.sampling.config import SamplingConfig, as_config, as_ids
from dlm.sampling.constraints import Constraint
from dlm.sampling.denoise import DenoiseState
from dlm.sampling.generate import GenerationOutput
from dlm.sampling.lengths import DRAWS, Filled, fill_lengths
from dlm.sampling.prompts import rows_of
from dlm.sampling.telemetry import Telemetry
from dlm.tokenizer import mask_id

__all__ = ["choose", "denoise", "generate", "generate_ids", "infill"]

_FIELDS = {field.name for field in fields_of(SamplingConfig)}
# Options of transformers' `generate` -> what does the same here.
INSTEAD = {
    "max_new_tokens": "gen_length",
    "max_length": "gen_length, the length of the answer alone",
    "do_sample": "temperature, 0 for none",
    "num_beams": "temperature: there is no beam search",
    "num_return_sequences": "the prompt several times, in a batch",
}


def generate(
    model,
    inputs,
    config: SamplingConfig | None = None,
    *,
    tokenizer=None,
    telemetry: Telemetry | None = None,
) -> GenerationOutput:
    """Generates for a batch with a model, an open checkpoint (`Pretrained`) or any mask predictor.

    inputs: id lists of any lengths, ids (B, P) or (P,), texts (these need `tokenizer`), what a tokenizer or a chat
    template returns (a mapping with `input_ids` and `attention_mask`), or a `Canvas`. config: None takes the sampling
    defaults of the checkpoint. A model's packed copy is made at the first call and kept with it (`kernels.packing`).
    telemetry: watches the passes (`sampling.telemetry`).
    Raises ValueError for inputs or settings that do not fit the model, FloatingPointError for NaN logits.
    """
    if isinstance(model, Pretrained):
        tokenizer = model.optional_tokenizer if tokenizer is None else tokenizer
    if config is None:
        config = own_settings(model, "blanks" if isinstance(inputs, Canvas) else "text")
    return whole.generate(_predictor(model), inputs, config, tokenizer=tokenizer, telemetry=telemetry)


def own_settings(model, use: str = "text", **fields: Any) -> SamplingConfig:
    """The sampling defaults of an open checkpoint, or of a model by family and generation_config, with `fields` over
    them; those of SamplingConfig where there are none. use: as `defaults_for`."""
    if isinstance(model, Pretrained):
        return model.sampling(use, **fields)
    settings = getattr(model, "config", None)
    own = getattr(getattr(model, "generation_config", None), "dlm", None) or {}
    own = family_defaults(settings) | own
    own = defaults_for(use, own, getattr(settings, "full_attention", False))
    return sampling_with(own, fields)


def generate_ids(
    model, input_ids: Tensor, attention_mask: Tensor | None = None, *, tokenizer=None, **fields: Any
) -> Tensor:
    """Prompt and answer (B, P + G), as transformers' `generate` returns them; `LLaDAModelLM.generate` calls it.

    input_ids (B, P) or (P,); attention_mask: 0 at padding, on either side. fields: those of `SamplingConfig`, before
    the sampling defaults of the checkpoint. An autoregressive model takes gen_length, temperature, top_k, top_p and
    seed. Raises ValueError for other fields and as `generate`.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim not in (1, 2):
        shown = (
            f"of shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
        )
        raise ValueError(f"input_ids is {shown}: give a tensor of token ids, (rows, tokens)")
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    given = {"input_ids": ids}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask if attention_mask.ndim == 2 else attention_mask[None]
    for name in fields:
        if name not in _FIELDS:
            hint = f"give {INSTEAD[name]}" if name in INSTEAD else "it takes the fields of SamplingConfig"
            raise ValueError(f"generate has no option {name!r}: {hint}")
    if model.config.objective == "autoregressive":
        answer = _continue(model, given, tokenizer, fields)
    else:
        answer = generate(model, given, own_settings(model, **fields), tokenizer=tokenizer).sequences
    return torch.cat([ids, answer.to(ids.device)], dim=1)


def _continue(model, given: dict, tokenizer, fields: dict[str, Any]) -> Tensor:
    """The answer (B, G) of a model that predicts the next token."""
    takes = ("gen_length", "temperature", "top_k", "top_p", "seed")
    for name in fields:
        if name not in takes:
            raise ValueError(
                f"{name} is for diffusion, and the model predicts the next token: it takes {', '.join(takes)}"
            )
    SamplingConfig(**fields)  # checks them
    rows, settings = rows_of(given, tokenizer, model.config), model.config
    length = fields.pop("gen_length", SamplingConfig().gen_length)
    check_slots(max(map(len, rows)) + length, settings)
    ends, past = as_ids(settings.eos_token_id), range(settings.vocab_size, settings.embedding_size)
    barred = (*as_ids(settings.mask_token_id), *past)
    return autoregressive.generate(model, rows, length, eos_token_ids=ends, forbidden=barred, **fields).sequences


def choose(model, text: str, *, tokenizer=None, orders: int = 8, seed: int = 0) -> Chosen:
    """Ranks the options of a text's blanks (`The sky is ___{blue|green}.`), as `sampling.choose.choose`.

    model: an open checkpoint, or a model with its tokenizer.
    """
    tokenizer, predictor = _tokenizer_of(model, tokenizer), _predictor(model)
    return options.choose(
        predictor, text, tokenizer=tokenizer, mask_id=mask_id(tokenizer, predictor.config), orders=orders, seed=seed
    )


def infill(
    model, text: str, config: SamplingConfig | None = None, *, tokenizer=None, blank_length: int = 4, draws: int = DRAWS
) -> Filled:
    """Fills the blanks of a text (`The cat ___{1..6} on the mat.`), each with the length of its range that gives the
    lowest bound on -log p of the text, as `sampling.lengths.fill_lengths`.

    model: an open checkpoint, or a model with its tokenizer. config: None takes the sampling defaults of the checkpoint
    for blanks. End-of-text is not written into a blank.
    """
    tokenizer, predictor = _tokenizer_of(model, tokenizer), _predictor(model)
    settings = predictor.config
    config = own_settings(model, "blanks") if config is None else as_config(config)
    eos = as_ids(settings.eos_token_id)
    config = replace(config, suppress_eos=bool(config.eos_ids or eos))
    known = {"tokenizer": tokenizer, "mask_id": mask_id(tokenizer, settings), "eos": config.eos_ids or eos}
    return fill_lengths(predictor, text, config, blank_length=blank_length, draws=draws, **known)


def denoise(
    model,
    canvas: Canvas,
    config: SamplingConfig | None = None,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    constraints: Sequence[Sequence[Constraint]] | None = None,
    likely: int = 0,
    telemetry: Telemetry | None = None,
    growth_tokens: tuple[int | None, int | None] = (None, None),
) -> Iterator[DenoiseState]:
    """Fills the masked places of a canvas with a model or any mask predictor, and yields a state after every turn.

    Arguments and errors are those of `sampling.denoise.denoise`.
    """
    known = {"vocab_size": vocab_size, "eos_token_ids": eos_token_ids, "constraints": constraints}
    known |= {"growth_tokens": growth_tokens, "telemetry": telemetry, "likely": likely}
    return loop.denoise(_predictor(model), canvas, as_config(config), **known)


def _tokenizer_of(model, tokenizer):
    if tokenizer is None and isinstance(model, Pretrained):
        return model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "text was given but no tokenizer: pass tokenizer=, or an open checkpoint (dlm.load_pretrained)"
        )
    return tokenizer


def _predictor(model):
    return model.predictor if isinstance(model, Pretrained) else packed(model)

"""What a model writes while it is trained: a few prompts continued by its averaged weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dlm.checkpoints.generation import generate
from dlm.sampling.autoregressive import generate as generate_causal
from dlm.sampling.config import SamplingConfig, as_ids
from dlm.tokenizer import decode, encode_prompt

TEMPERATURE = 0.7


def show_samples(run) -> None:
    """Continue a run's sample prompts with the averaged weights, print the texts and log them."""
    if not (run.accelerator.is_main_process or run.sharded):  # of a sharded model every process has a part
        return
    prompts = [encode_prompt(run.tokenizer, text, run.mask_id) for text in run.config.sample_prompts]
    limit = getattr(run.plain.config, "max_sequence_length", None) or run.config.sample_length
    length = min(run.config.sample_length, limit - max(map(len, prompts)))
    causal = run.config.objective == "autoregressive"
    if length < 1 or (causal and not all(prompts)):  # the next token needs one before it
        return
    run.model.eval()
    average = nullcontext() if run.ema is None else run.ema.in_place_of(run.plain)
    with average, torch.compiler.set_stance("force_eager"):
        out = (_continue if causal else _denoise)(run, prompts, length)
    for text, ids in zip(run.config.sample_prompts, out.sequences.tolist(), strict=True):
        story = decode(run.tokenizer, ids)
        run.report(f"step {run.step}  sample: {text}{story}")
        run.metrics.add({"kind": "sample", "step": run.step, "prompt": text, "text": story})


def _denoise(run, prompts: list[list[int]], length: int):
    settings = SamplingConfig(gen_length=length, temperature=TEMPERATURE, seed=run.config.seed)
    return generate(run.plain, prompts, settings, tokenizer=run.tokenizer)


def _continue(run, prompts: list[list[int]], length: int):
    """Token by token, of a model that predicts the next one."""
    settings = run.plain.config
    past = range(len(run.tokenizer), settings.embedding_size)  # ids that no token has
    return generate_causal(
        run.plain, prompts, length, temperature=TEMPERATURE, seed=run.config.seed,
        eos_token_ids=as_ids(settings.eos_token_id), forbidden=(run.mask_id, *past),
    )  # fmt: skip

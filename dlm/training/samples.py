"""What a model writes while it is trained: a few prompts continued by its averaged weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dlm.checkpoints.generation import generate
from dlm.sampling.config import SamplingConfig
from dlm.tokenizer import decode, encode_prompt

TEMPERATURE = 0.7


def show_samples(run) -> None:
    """Continue a run's sample prompts with the averaged weights, print the texts and log them."""
    if not (run.accelerator.is_main_process or run.sharded):  # of a sharded model every process has a part
        return
    prompts = [encode_prompt(run.tokenizer, text, run.mask_id) for text in run.config.sample_prompts]
    limit = getattr(run.plain.config, "max_sequence_length", None) or run.config.sample_length
    length = min(run.config.sample_length, limit - max(map(len, prompts)))
    if length < 1:
        return
    run.model.eval()
    settings = SamplingConfig(gen_length=length, temperature=TEMPERATURE, seed=run.config.seed)
    average = nullcontext() if run.ema is None else run.ema.in_place_of(run.plain)
    with average, torch.compiler.set_stance("force_eager"):
        out = generate(run.plain, prompts, settings, tokenizer=run.tokenizer)
    for text, ids in zip(run.config.sample_prompts, out.sequences.tolist(), strict=True):
        story = decode(run.tokenizer, ids)
        run.report(f"step {run.step}  sample: {text}{story}")
        run.metrics.add({"kind": "sample", "step": run.step, "prompt": text, "text": story})

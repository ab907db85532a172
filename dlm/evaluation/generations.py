"""Texts that a model writes, and how good they are: what a judge makes of them beside how varied they are.

A judge finds repeated words probable, and low temperatures repeat: two models are compared where their texts are as
varied as each other, along the curve that temperature draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from dlm.checkpoints.generation import generate
from dlm.checkpoints.pretrained import Pretrained, load_pretrained
from dlm.evaluation.judge import Judge
from dlm.evaluation.metrics import distinct, is_degenerate, repetition, unigram_entropy
from dlm.sampling.autoregressive import generate as generate_causal
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from dlm.utils.stats import Measure, ratio


def open_writer(
    path: str | None = None, *, device=None, dtype: str = "auto", revision: str | None = None
) -> Pretrained:
    """A checkpoint that writes, token by token (autoregressive) or by denoising. Raises as `load_pretrained`, and
    ValueError where it has no tokenizer."""
    opened = load_pretrained(path, device=device, dtype=dtype, revision=revision)
    opened.check_tokenizer()
    return opened


def write(
    writer: Pretrained, prompts: Sequence[Sequence[int]], config: SamplingConfig, *, batch_size: int = 16,
    report: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """What follows each prompt, up to its end-of-text: ids. Text i has the seed config.seed + i, whatever the batch.

    A causal model reads gen_length, temperature, top_k, top_p and seed of the config. report: told how many are done.
    """
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        if writer.autoregressive:
            out = generate_causal(
                writer.model, batch, config.gen_length, temperature=config.temperature, top_k=config.top_k,
                top_p=config.top_p, seed=config.seed + start, eos_token_ids=writer.end_ids, forbidden=[writer.mask_id],
            )  # fmt: skip
        else:
            seeds = replace(config, seed=config.seed + start)
            out = generate(writer.model, batch, seeds, tokenizer=writer.tokenizer)
        texts += [until_end(row, writer.end_ids) for row in out.sequences.tolist()]
        if report is not None:
            report(len(texts))
    return texts


def fill(writer: Pretrained, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[list[int]]:
    """The rows with their masked slots filled, the most confident one first, one a pass. rows: ids of one length."""
    config = SamplingConfig(suppress_eos=bool(writer.end_ids), eos_token_id=writer.end_ids or None)
    filled: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        canvas = Canvas.from_templates(rows[start : start + batch_size], writer.mask_id, device=writer.model.device)
        filled += generate(writer.model, canvas, config, tokenizer=writer.tokenizer).sequences.tolist()
    return filled


def continue_all(
    writer: Pretrained, prompts: Sequence[Sequence[int]], length: int, batch_size: int = 16
) -> list[list[int]]:
    """The `length` likeliest next tokens after each prompt, left to right, past an end-of-text too: ids."""
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts += generate_causal(writer.model, batch, length, forbidden=[writer.mask_id]).sequences.tolist()
    return texts


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end-of-text."""
    return list(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])


@dataclass(frozen=True)
class Quality:
    """Texts under a judge. judged: nats per token of the judge; entropy: of a text's own distribution of tokens, nats;
    distinct_2, distinct_3, repetition (of 4-grams), length in tokens, degenerate: means over texts."""

    texts: int
    judged: Measure
    entropy: Measure
    distinct_2: Measure
    distinct_3: Measure
    repetition: Measure
    length: Measure
    degenerate: Measure

    @property
    def perplexity(self) -> Measure:
        """Generative perplexity, exp of the judge's nats per token."""
        value = math.exp(self.judged.value)
        return Measure(value, value * self.judged.error)

    def record(self) -> dict:
        """The JSON object."""
        fields = ("judged", "entropy", "distinct_2", "distinct_3", "repetition", "length", "degenerate", "perplexity")
        named = {name: {"value": m.value, "error": m.error} for name in fields for m in [getattr(self, name)]}
        return {"texts": self.texts} | named


def quality(texts: Sequence[str], judge: Judge, prompt: str = "") -> Quality:
    """The Quality of texts that were all written after `prompt`. Tokens are the judge's: models of any vocabularies
    compare. Errors: no text with a token."""
    scores = judge.score([(prompt, text) for text in texts])
    nats, tokens = (torch.tensor([float(getattr(one, name)) for one in scores]) for name in ("nll", "tokens"))
    if not tokens.any():
        raise ValueError(f"all {len(texts)} texts are empty: there is nothing to judge")
    ids = [judge.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Quality(
        len(texts),
        Measure(*ratio(nats.double(), tokens.double())),
        Measure.of([unigram_entropy(row) for row in ids]),
        Measure.of([distinct(row, 2) for row in ids]),
        Measure.of([distinct(row, 3) for row in ids]),
        Measure.of([repetition(row) for row in ids]),
        Measure.of([len(row) for row in ids]),
        Measure.of([float(is_degenerate(row)) for row in ids]),
    )


def at_entropy(points: Sequence[Quality], entropy: float) -> Measure | None:
    """The judge's nats per token where a frontier of texts has this unigram entropy, between its two neighbours.

    None outside of the frontier: nothing is extrapolated. The error holds those of both neighbours, in both numbers.
    """
    ordered = sorted(points, key=lambda point: point.entropy.value)
    for low, high in pairwise(ordered):
        if low.entropy.value <= entropy <= high.entropy.value and low.entropy.value < high.entropy.value:
            share = (entropy - low.entropy.value) / (high.entropy.value - low.entropy.value)
            slope = (high.judged.value - low.judged.value) / (high.entropy.value - low.entropy.value)
            value = low.judged.value + share * (high.judged.value - low.judged.value)
            parts = [
                (1 - share) * low.judged.error, share * high.judged.error,
                slope * (1 - share) * low.entropy.error, slope * share * high.entropy.error,
            ]  # fmt: skip
            return Measure(value, math.sqrt(math.fsum(part**2 for part in parts)))
    return None

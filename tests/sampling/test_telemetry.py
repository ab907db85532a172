"""Ties by hand, and the error of caches: none where the cache is exact, some where it is not, and nothing changed."""

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise
from dlm.sampling.telemetry import Telemetry
from tests.helpers.toys import MASK, Table, tiny_model


def watched(model, canvas, every=1, **options):
    telemetry = Telemetry(every)
    *_, last = denoise(model, canvas, SamplingConfig(**options), telemetry=telemetry)
    return telemetry.facts(), last.canvas.tokens


def table(gap: float, lead: float) -> Table:
    """Three places; the second token of place 0 is `gap` below its first, and place 1 is as sure as place 0 but for
    `lead` in its logit; place 2 is far less sure."""
    logits = torch.zeros(3, 5)
    logits[0, 0], logits[0, 1] = 8.0, 8.0 - gap
    logits[1, 0], logits[1, 1] = 8.0 - lead, 8.0 - lead - gap
    logits[2, 2] = 3.0
    return Table(logits)


@pytest.mark.parametrize(
    ("gap", "lead", "steps", "ties"),
    [
        (4.0, 1.0, 3, 0.0),
        (1e-6, 1.0, 3, 2 / 3),  # both surest places have two tokens that are level
        (4.0, 1e-7, 3, 1 / 3),  # place 0 is taken before place 1 by nothing but rounding, then 1 before 2 clearly
        (4.0, 1e-7, 2, 0.0),  # the first pass takes both, so that their order is no matter
    ],
)
def test_ties_by_hand(gap, lead, steps, ties):
    options = {"gen_length": 3, "block_length": 3, "steps": steps}
    facts, _ = watched(table(gap, lead), Canvas.from_prompts([[]], 3, 4), **options)
    assert facts["ties"] == pytest.approx(ties)


def test_a_confidence_at_the_threshold_is_a_tie():
    logits = torch.zeros(1, 5)
    logits[0, 1] = 2.0
    sure = float(logits[0].softmax(0)[1])
    for threshold, ties in ((sure, 0.5), (sure - 0.01, 0.0)):  # the first place is taken whatever its confidence
        options = {"gen_length": 2, "block_length": 2, "commit": "threshold", "threshold": threshold}
        facts, _ = watched(Table(logits), Canvas.from_prompts([[]], 2, 4), **options)
        assert facts["ties"] == ties


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f", "block_causal"])
def test_cache_error_is_that_of_the_method(method):
    """`block_causal` caches what no later token changes: no error; `dual` keeps keys that have changed. In fp64 the
    exact ones are level to rounding. The text is the same as without the watcher."""
    model = tiny_model(3, sharp=2.0, block_length=4 if method == "block_causal" else None).double()
    canvas = Canvas.from_templates([[1, 2, 3, *[MASK] * 8], [5, *[MASK] * 6]], MASK)
    options = {"block_length": 4, "method": method, "steps": 8, "window": 1}
    facts, tokens = watched(model, canvas, **options)
    *_, plain = denoise(model, canvas, SamplingConfig(**options))
    assert torch.equal(tokens, plain.canvas.tokens)
    if method == "none":
        assert facts["cache_places"] == 0 and facts["cache_rms"] is None
    elif method == "block_causal":
        assert facts["cache_places"] > 0 and facts["cache_rms"] < 1e-9 and facts["cache_same"] == 1.0
    else:
        assert facts["cache_rms"] > 1e-4 and facts["cache_nats"] > 0.0
    assert facts["ties"] == 0.0


def test_one_pass_in_so_many_is_compared():
    model, canvas = tiny_model(3), Canvas.from_templates([[1, *[MASK] * 8]], MASK)
    options = {"block_length": 8, "method": "dual", "steps": 8}
    most, _ = watched(model, canvas, every=1, **options)
    few, _ = watched(model, canvas, every=4, **options)
    assert most["cache_places"] == sum(range(1, 8)) and few["cache_places"] == 7 + 3

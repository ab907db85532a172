"""The causal twin: cached decoding is uncached decoding, and the likelihood of the next token is exact."""

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, pack
from dlm.models.attention import causal
from dlm.objectives.likelihood import answer, likelihood
from dlm.objectives.losses import autoregressive
from dlm.sampling.autoregressive import generate
from tests.helpers.toys import MASK, Recorder, tiny_model


def logits_of(model):
    return lambda tokens, valid, keep: model.predict(tokens, visible=causal, logits_to_keep=keep)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_is_uncached(temperature):
    """Ragged prompts, rows that end at different passes: the same tokens, far fewer slots."""
    prompts = [[5], [6, 7, 8, 9, 10, 11], [1, 2, 3]]
    ends = 0
    for seed in range(6):
        model, options = tiny_model(seed), {"temperature": temperature, "seed": seed, "eos_token_ids": range(5)}
        fast = generate(model, prompts, 12, **options)
        slow = generate(model, prompts, 12, cached=False, **options)
        assert (fast.sequences == slow.sequences).all() and (fast.nfe == slow.nfe).all()
        assert (fast.positions_computed == fast.nfe - 1 + torch.tensor([1, 6, 3])).all()
        ends += int((fast.nfe < 12).sum())
        for row, prompt in enumerate(prompts):
            alone = generate(model, [prompt], 12, **(options | {"seed": seed + row}))
            assert (alone.sequences[0] == fast.sequences[row]).all()
    assert 0 < ends < 18


def test_greedy_by_hand():
    """Each token is the likeliest after those before it; after end-of-text there is nothing else."""
    model, row = tiny_model(0), [5, 6]
    with torch.no_grad():
        for _ in range(6):
            row.append(int(model.predict(torch.tensor([row]), visible=causal)[0, -1].argmax()))
    assert generate(model, [[5, 6]], 6).sequences[0].tolist() == row[2:]
    stopped = generate(model, [[5, 6]], 6, eos_token_ids=[row[3]])
    assert stopped.sequences[0].tolist() == [row[2]] + [row[3]] * 5 and stopped.nfe.tolist() == [2]
    assert row[2] not in generate(model, [[5, 6]], 6, forbidden=[row[2]]).sequences[0].tolist()
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[5], []], 2)


def test_a_pass_computes_one_slot():
    told = Recorder(tiny_model(0))
    generate(told, [[5, 6, 7], [8]], 4)
    assert [tuple(tokens.shape) for tokens, _, _ in told.calls] == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_likelihood_is_the_objective():
    """Packed in one row or alone in a batch: the same cross entropy, with the first token not scored."""
    model = tiny_model(2)
    examples = [answer([5, 6], [1, 2, 3], 0), Example(np.array([4, 9, 8]), np.array([True, False, True]), 1)]
    found = likelihood(logits_of(model), examples, batch_size=2)
    loss = autoregressive(model, pack([[(0, example) for example in examples]], 8, 0))
    assert [one.nats for one in found] == pytest.approx(loss.examples.tolist(), rel=1e-5)
    assert [one.tokens for one in found] == [3, 1] == loss.lengths.tolist()
    assert [(one.error, one.evaluations) for one in found] == [(0, 1), (0, 1)]
    nothing = likelihood(logits_of(model), [Example(np.array([4]), np.array([True]), 0)])
    assert (nothing[0].nats, nothing[0].tokens) == (0, 0)
    with torch.no_grad():
        p = model.predict(torch.tensor([[5, 6, 1, 2]]), visible=causal).log_softmax(-1)[0]
    wanted = -(p[1, 1] + p[2, 2] + p[3, 3])
    assert found[0].nats == pytest.approx(float(wanted))
    assert MASK not in examples[0].tokens

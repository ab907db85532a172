"""Rows join and leave between passes, and what a row becomes does not depend on the others, bit for bit in fp32."""

import dataclasses
import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise
from dlm.sampling.denoise import turn
from dlm.sampling.rows import Batch
from tests.helpers.toys import MASK, Table, tiny_model

METHODS = ("none", "prefix", "dual", "vicinity", "c2f")


def alone(model, prompt, length, config):
    """(tokens of the region, confidences) of one row in a batch of its own."""
    canvas = Canvas.from_prompts([prompt], length, MASK)
    sure = torch.zeros(canvas.tokens.shape)
    for state in denoise(model, canvas, config):
        sure += state.confidence
    return state.canvas.tokens[0].tolist(), sure[0], int(state.nfe[0])


def settings(rng):
    return SamplingConfig(
        block_length=rng.choice([2, 3, 8]),
        method=rng.choice(METHODS),
        commit=rng.choice(["quota", "threshold", "factor"]),
        threshold=0.3,
        revise=rng.choice(["none", "edit"]),
        edit_threshold=0.3,
        temperature=rng.choice([0.0, 0.8]),
        cfg_scale=rng.choice([0.0, 0.0, 0.5]),
        seed=rng.randrange(1000),
    )


@pytest.mark.parametrize("part", range(3))
def test_rows_of_any_settings_join_and_leave(part):
    """Rows with different prompts, lengths and settings share passes; each ends as it does alone."""
    rng, model = random.Random(part), tiny_model(1, dtype=torch.float32)
    batch, waiting, running, finished = Batch(model), [], {}, 0
    for _ in range(8):
        length = rng.randint(2, 8)
        waiting.append(([rng.randrange(MASK) for _ in range(rng.randint(1, 6))], length, settings(rng)))
    while waiting or running:
        while waiting and (len(running) < 2 or rng.random() < 0.4):
            prompt, length, config = waiting.pop()
            [row] = batch.join(Canvas.from_prompts([prompt], length, MASK), config)
            running[row] = (prompt, length, config)
        turn(batch)
        for row in [row for row in running if row.done]:
            prompt, length, config = running.pop(row)
            want, _, nfe = alone(model, prompt, length, config)
            assert batch.canvas.tokens[row.index, : row.length].tolist() == want, config
            assert row.nfe == nfe
            batch.leave(row)
            finished += 1
    assert finished == 8
    assert len(batch.rows) < 8  # an index was used again
    batch.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_and_in_a_batch_are_the_same_bits(method):
    """Equal lengths: the same confidences to the last bit in fp32."""
    model = tiny_model(2, dtype=torch.float32)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    config = SamplingConfig(gen_length=8, block_length=4, method=method, temperature=0.7, seed=5)
    batch = Batch(model)
    rows = batch.join(Canvas.from_prompts(prompts, 8, MASK), config)
    sure = torch.zeros(batch.canvas.tokens.shape)
    while batch.active:
        sure += turn(batch).confidence
    for row, prompt in zip(rows, prompts, strict=True):
        tokens, certain, _ = alone(model, prompt, 8, dataclasses.replace(config, seed=5 + row.index))
        assert batch.canvas.tokens[row.index].tolist() == tokens
        assert (sure[row.index] - certain).abs().max() <= 2e-6


def test_a_row_that_leaves_early_is_not_computed_again():
    model = Table(torch.zeros(1, 5))
    batch = Batch(model)
    first, second = batch.join(Canvas.from_prompts([[0], [0]], 4, 4), SamplingConfig(gen_length=4))
    turn(batch)
    batch.leave(first)
    assert batch.active == [second]
    turn(batch)
    assert model.calls[-1] == (1, 5)
    assert first.nfe == 1
    [third] = batch.join(Canvas.from_prompts([[0, 0]], 5, 4), SamplingConfig(gen_length=5))
    assert third.index == 0
    while batch.active:
        turn(batch)
    assert third.nfe == 5
    assert second.nfe == 4


# --- edit ---------------------------------------------------------------------------------------------------------


class Corrects(Table):
    """Says 1 with probability 0.6 while any place is masked, and 2 with 0.99 where a 1 stands and none is."""

    def __init__(self):
        super().__init__(torch.zeros(1, 5))

    def logits(self, tokens, slots):
        masked = (tokens == 4).any(dim=1, keepdim=True)[..., None]
        early = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1]).log()
        late = torch.tensor([0.0025, 0.0025, 0.99, 0.0025, 0.0025]).log()
        return torch.where(masked, early, late).expand(*tokens.shape, 5)


def test_edit_changes_what_it_is_sure_of_and_then_the_block_ends():
    canvas = Canvas.from_prompts([[1, 1]], 2, 4)
    config = SamplingConfig(gen_length=2, block_length=2, revise="edit", edit_threshold=0.9)
    states = list(denoise(Corrects(), canvas, config))
    assert [state.committed.sum().item() for state in states] == [1, 1, 0, 0]
    assert [state.revised.sum().item() for state in states] == [0, 0, 2, 0]  # and the last pass found nothing to edit
    assert states[-1].canvas.tokens.tolist() == [[1, 1, 2, 2]]  # the prompt's 1s are given
    assert states[-1].nfe.tolist() == [4]


@pytest.mark.parametrize(("most", "passes", "text"), [(0, 2, [1, 1]), (1, 3, [2, 2]), (2, 4, [2, 2])])
def test_edit_ends_after_max_post_passes(most, passes, text):
    canvas = Canvas.from_prompts([[1]], 2, 4)
    config = SamplingConfig(gen_length=2, block_length=2, revise="edit", max_post_passes=most)
    *_, last = denoise(Corrects(), canvas, config)
    assert last.nfe.tolist() == [passes]
    assert last.canvas.tokens[0, 1:].tolist() == text


def test_edit_that_never_settles_ends():
    class Flips(Table):
        def logits(self, tokens, slots):
            best = torch.where(tokens == 1, 2, 1)
            return 20.0 * torch.nn.functional.one_hot(best, 5).float()

    config = SamplingConfig(gen_length=2, block_length=2, revise="edit", max_post_passes=5)
    *_, last = denoise(Flips(torch.zeros(1, 5)), Canvas.from_prompts([[3]], 2, 4), config)
    assert last.nfe.tolist() == [7]


@pytest.mark.parametrize("method", METHODS)
def test_no_cached_key_of_an_edited_place_is_read(method):
    """With blocks done one after another, the last pass of a later block sees earlier blocks as they became.

    The last block's first pass computes every slot, so its logits are those of a run without a cache on that canvas.
    """
    model = tiny_model(3)
    config = SamplingConfig(gen_length=6, block_length=3, method=method, revise="edit", edit_threshold=0.2, steps=2)
    canvas = Canvas.from_prompts([[1, 2]], 6, MASK)
    states = list(denoise(model, canvas, config))
    assert not states[-1].canvas.masked.any()
    openings = [i for i, state in enumerate(states) if i and state.block[0] != states[i - 1].block[0]]
    for i in openings:
        before = states[i - 1].canvas
        with torch.no_grad():
            logits = model.predict(before.tokens.clone())
        logits[..., MASK] = -torch.inf
        here = states[i].committed
        assert torch.equal(states[i].canvas.tokens[here], logits.argmax(-1)[here])


def test_a_filled_canvas_is_edited():
    """A canvas without a mask whose region may be written: edit repairs it, and given text stays."""
    canvas = Canvas.from_prompts([[1]], 3, 4)
    filled = dataclasses.replace(canvas, tokens=torch.tensor([[1, 0, 2, 3]]))
    config = SamplingConfig(block_length=3, revise="edit")
    *_, last = denoise(Corrects(), filled, config)
    assert last.canvas.tokens.tolist() == [[1, 2, 2, 2]]
    assert last.nfe.tolist() == [2]

"""Rows join and leave between passes, and what a row becomes does not depend on the others, bit for bit in fp32."""

import dataclasses
import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise
from dlm.kernels.linear import has_kernels
from dlm.kernels.packing import packed
from dlm.sampling.denoise import turn
from dlm.sampling.rows import Batch
from tests.helpers.toys import MASK, Table, tiny_model

METHODS = ("none", "prefix", "dual", "vicinity", "c2f")


def alone(model, prompt, length, config):
    """(tokens of the region, confidences) of one row in a batch of its own."""
    canvas, sure = Canvas.from_prompts([prompt], length, MASK), torch.zeros(1, 64)
    for state in denoise(model, canvas, config, eos_token_ids=(38,)):
        sure[:, : state.confidence.shape[1]] += state.confidence
    return state.canvas.tokens[0][state.canvas.valid[0]].tolist(), sure[0], int(state.nfe[0])


def settings(rng, causal):
    methods = ("block_causal", "none", "pipeline_causal") if causal else METHODS
    method = rng.choice(methods)
    several = method.startswith("pipeline")
    more = rng.choice([{"grow": "block", "stop_at_eos": True}, {"whole_blocks": True}, {"align": "prompt"}, {}])
    return SamplingConfig(
        block_length=4 if causal else rng.choice([2, 3, 8]),
        method=method,
        commit="threshold" if several else rng.choice(["quota", "threshold", "factor"]),
        threshold=0.3,
        revise="none" if several else rng.choice(["none", "edit"]),
        edit_threshold=0.3,
        temperature=rng.choice([0.0, 0.8]),
        cfg_scale=rng.choice([0.0, 0.0, 0.5]),
        seed=rng.randrange(1000),
        **(more if causal and not several else {}),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_any_settings_join_and_leave(causal):
    """Rows with different prompts, lengths and settings share passes; each ends as it does alone, bit for bit.

    Was: the confidence of a row depended on the longest row of its batch, by 2e-6.
    """
    changes = {"block_length": 4, "objective": "block_diffusion"} if causal else {}
    rng, model = random.Random(causal), packed(tiny_model(1, dtype=torch.float32, **changes))
    assert model.exact_rows or not has_kernels(torch.float32)
    batch, waiting, running, finished = Batch(model, eos_token_ids=(38,)), [], {}, 0
    for _ in range(12):
        length = rng.randint(2, 12)
        waiting.append(([rng.randrange(MASK) for _ in range(rng.randint(1, 40))], length, settings(rng, causal)))
    while waiting or running:
        while waiting and (len(running) < 3 or rng.random() < 0.5):
            prompt, length, config = waiting.pop()
            [row] = batch.join(Canvas.from_prompts([prompt], length, MASK), config)
            running[row] = (prompt, length, config, torch.zeros(64))
        state = turn(batch)
        for row, (*_, sure) in running.items():
            sure[: state.confidence.shape[1]] += state.confidence[row.index]
        for row in [row for row in running if row.done]:
            prompt, length, config, sure = running.pop(row)
            want, certain, nfe = alone(model, prompt, length, config)
            shown = batch.shown
            assert shown.tokens[row.index][shown.valid[row.index]].tolist() == want, config
            if model.exact_rows:
                assert torch.equal(sure[: len(certain)], certain), config
            assert row.nfe == nfe
            batch.leave(row)
            finished += 1
    assert finished == 12
    assert len(batch.rows) < 12  # an index was used again
    batch.close()


@pytest.mark.parametrize(("method", "changes"), [("block_causal", {"block_length": 4}), ("dual", {}), ("prefix", {})])
def test_rows_at_first_and_later_passes_share_a_forward(method, changes):
    """Was: rows that began a block were a forward pass of their own, beside that of all others, with what pads them."""
    objective = {"objective": "block_diffusion"} if changes else {}
    model, passes = packed(tiny_model(1, dtype=torch.float32, **changes, **objective)), []
    if not model.exact_rows:
        pytest.skip("this processor's products are torch's own, whose bits depend on the batch")

    class Counts:
        config, exact_rows, kernels = model.config, True, None

        def __call__(self, tokens, *args, sizes=None, **options):
            passes.append(sizes)
            return model(tokens, *args, sizes=sizes, **options)

    batch, config, length = Batch(Counts()), SamplingConfig(method=method, block_length=4), 9
    prompts, rows = [[1, 2, 3, 4, 5], [7] * 9, [3] * 2], []
    for prompt in prompts:
        rows += batch.join(Canvas.from_prompts([prompt], length, MASK), config)
        turn(batch)
        turn(batch)
    while batch.active:
        turn(batch)
    assert len(passes) == batch.turns
    assert any(len({*sizes.queries}) > 1 for sizes in passes if sizes is not None)
    for row, prompt in zip(rows, prompts, strict=True):
        want, _, nfe = alone(model, prompt, length, config)
        assert (batch.canvas.tokens[row.index][: row.slots].tolist(), row.nfe) == (want, nfe)


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

"""Computing some slots with everyone else's keys and values kept: against the full forward pass, and by hand."""

import pytest
import torch

import dlm
from dlm.models.attention import block_causal
from dlm.models.kv_cache import KVCache
from dlm.sampling.methods import METHODS
from tests.helpers import oracle
from tests.helpers.toys import tiny_model

LENGTH = 9


def ids(rows, seed=0):
    return torch.randint(0, 39, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def everything(rows):
    return torch.arange(LENGTH).expand(rows, LENGTH)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"attention_layer_norm": True}, {"block_length": 4}])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_all_slots_recomputed_is_the_full_pass(changes, kernel):
    model, tokens = tiny_model(1, attn_implementation=kernel, **changes), ids(2)
    cache = KVCache(2, LENGTH)
    assert torch.allclose(model.predict(tokens, everything(2), cache=cache), model.predict(tokens), atol=1e-10)
    tokens = ids(2, 5)  # again, on a cache that is full of something else
    assert torch.allclose(model.predict(tokens, everything(2), cache=cache), model.predict(tokens), atol=1e-10)


def test_order_of_the_slots_does_not_matter():
    model, tokens = tiny_model(1), ids(2)
    order = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    got = model.predict(tokens.gather(1, order), order, cache=KVCache(2, LENGTH))
    want = model.predict(tokens).gather(1, order[..., None].expand(-1, -1, 40))
    assert torch.allclose(got, want, atol=1e-10)


def test_some_slots_recomputed_by_hand():
    """After a token changes, only the slots asked for see it; the others keep the keys and values they had."""
    model, tokens = tiny_model(2), ids(2)
    network, memories = oracle.Network.of(model), [{}, {}]
    cache = KVCache(2, LENGTH)
    model.predict(tokens, everything(2), cache=cache)
    for row in range(2):
        network(tokens[row].tolist(), list(range(LENGTH)), memories[row])
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 3) % 39
    slots = torch.tensor([[2, 4, 5], [4, 7, 0]])  # each row its own
    for _ in range(2):  # the second time on what the first one stored
        got = model.predict(changed.gather(1, slots), slots, cache=cache)
        for row in range(2):
            want = network(changed[row].tolist(), slots[row].tolist(), memories[row])
            assert torch.allclose(got[row], want, atol=1e-10)
    full = model.predict(changed).gather(1, slots[..., None].expand(-1, -1, 40))
    assert (got - full).abs().max() > 1e-3  # it is not the full pass: others kept what they were
    other = torch.tensor([[8], [1]])
    got = model.predict(changed.gather(1, other), other, cache=cache)
    for row in range(2):
        assert torch.allclose(got[row], network(changed[row].tolist(), other[row].tolist(), memories[row]), atol=1e-10)


def test_padding_is_not_seen_through_the_cache():
    model, tokens = tiny_model(3), ids(2)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 6:] = False
    cache = KVCache(2, LENGTH)
    model.predict(tokens, everything(2), cache=cache, valid=valid)
    slots = torch.tensor([[3, 4], [3, 4]])
    got = model.predict(tokens.gather(1, slots), slots, cache=cache, valid=valid)
    short = model.predict(tokens[1:, :6])
    assert torch.allclose(got[1], short[0, 3:5], atol=1e-10)


def test_block_causal_slots_need_no_later_ones():
    """Under block-causal visibility a block computed after its predecessors equals the full pass."""
    model, tokens = tiny_model(4, block_length=3), ids(1)
    full = model.predict(tokens)
    cache = KVCache(1, LENGTH)
    for start in (0, 3, 6):
        slots = torch.arange(start, start + 3)[None]
        got = model.predict(tokens[:, start : start + 3], slots, cache=cache)
        assert torch.allclose(got, full[:, start : start + 3], atol=1e-10)
    rule = block_causal(3)
    plain = tiny_model(4)
    assert torch.allclose(plain.predict(tokens, visible=rule), full, atol=1e-12)


def test_logits_to_keep_with_a_cache():
    model, tokens = tiny_model(5), ids(2)
    cache = KVCache(2, LENGTH)
    slots = torch.tensor([[1, 3, 5], [0, 2, 8]])
    model.predict(tokens, everything(2), cache=cache)
    got = model.predict(tokens.gather(1, slots), slots, cache=cache, logits_to_keep=torch.tensor([[2], [0]]))
    want = model.predict(tokens.gather(1, slots), slots, cache=cache)
    assert torch.allclose(got[:, 0], torch.stack([want[0, 2], want[1, 0]]))


def test_rows_of_a_cache():
    """A batch of some rows reads and writes those rows alone."""
    model, tokens = tiny_model(6), ids(3)
    cache, alone = KVCache(3, LENGTH), KVCache(1, LENGTH)
    model.predict(tokens, everything(3), cache=cache)
    model.predict(tokens[1:2], everything(1), cache=alone)
    slots = torch.tensor([[4, 5]])
    other = (tokens[1:2, 4:6] + 1) % 39
    got = model.predict(other, slots, cache=cache.at(torch.tensor([1])))
    assert torch.allclose(got, model.predict(other, slots, cache=alone), atol=1e-10)
    untouched = KVCache(3, LENGTH)
    model.predict(tokens, everything(3), cache=untouched)
    for row in (0, 2):
        here = torch.tensor([row])
        a = model.predict(tokens[here][:, :1], torch.zeros(1, 1, dtype=torch.int64), cache=cache.at(here))
        b = model.predict(tokens[here][:, :1], torch.zeros(1, 1, dtype=torch.int64), cache=untouched.at(here))
        assert torch.equal(a, b)


def test_a_cache_needs_positions(tiny):
    with pytest.raises(ValueError, match="positions"):
        tiny.predict(ids(1), cache=KVCache(1, LENGTH))


def test_every_method_of_the_settings_is_a_row_of_the_table():
    rows = {"none", "prefix", "dual", "vicinity", "c2f", "block_causal", "pipeline", "pipeline_causal"}
    assert set(METHODS) == rows
    for name in METHODS:
        commit = "threshold" if METHODS[name].several else "quota"
        assert dlm.SamplingConfig(method=name, commit=commit).method == name


def test_c2f_has_no_first_place_of_a_block():
    """It was taken, and a pass could then be asked about no place at all."""
    with pytest.raises(ValueError, match="commit_first"):
        dlm.SamplingConfig(method="c2f", commit_first=True)

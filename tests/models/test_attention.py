"""Visibility rules against masks written out by hand, and the kernels against each other."""

import warnings

import pytest
import torch

from dlm.models import attention, transformer
from dlm.models.kv_cache import KVCache
from tests.helpers.toys import tiny_model


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention itself on a CPU: its Python form, where the library would take SDPA for want of a compiler."""
    monkeypatch.setattr(transformer, "usable_kernel", lambda implementation, *_, **__: implementation)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dense(rule, batch, queries, keys):
    b, q, k = torch.meshgrid(torch.arange(batch), torch.arange(queries), torch.arange(keys), indexing="ij")
    return torch.broadcast_to(rule(b, q, k), (batch, queries, keys))


def picture(*rows):
    return torch.tensor([[c == "x" for c in row] for row in rows])


def test_full():
    assert dense(attention.full, 1, 3, 4).all()


def test_causal():
    assert torch.equal(dense(attention.causal, 1, 4, 4)[0], picture("x...", "xx..", "xxx.", "xxxx"))


def test_block_causal():
    want = picture("xx...", "xx...", "xxxx.", "xxxx.", "xxxxx")
    assert torch.equal(dense(attention.block_causal(2), 1, 5, 5)[0], want)
    assert torch.equal(dense(attention.block_causal(1), 1, 4, 4), dense(attention.causal, 1, 4, 4))
    assert dense(attention.block_causal(5), 1, 5, 5).all()


def test_document():
    rule = attention.document(torch.tensor([[1, 1, 2, 2], [7, 8, 8, 8]]))
    got = dense(rule, 2, 4, 4)
    assert torch.equal(got[0], picture("xx..", "xx..", "..xx", "..xx"))
    assert torch.equal(got[1], picture("x...", ".xxx", ".xxx", ".xxx"))


def test_both():
    rule = attention.both(attention.document(torch.tensor([[0, 0, 1, 1]])), attention.causal)
    assert torch.equal(dense(rule, 1, 4, 4)[0], picture("x...", "xx..", "..x.", "..xx"))


@pytest.mark.parametrize("length", [0, -1])
def test_block_causal_refuses(length):
    with pytest.raises(ValueError, match=str(length)):
        attention.block_causal(length)


RULES = {
    "full": (attention.full, lambda b, q, k: True),
    "causal": (attention.causal, lambda b, q, k: k <= q),
    "block": (attention.block_causal(4), lambda b, q, k: k // 4 <= q // 4),
    "document": (
        attention.document(torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [3] * 4])),
        lambda b, q, k: (q < (5, 9)[b]) == (k < (5, 9)[b]),
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_kernels_agree_and_hide_what_the_rule_hides(name, padded, uncompiled):
    """A token changes exactly the logits of the places that may see it (one layer: no indirect sight)."""
    rule, seen = RULES[name]
    kernels = {k: tiny_model(5, n_layers=1, attn_implementation=k, dtype=torch.float32) for k in
               ("eager", "sdpa", "flex_attention")}  # fmt: skip
    tokens = torch.randint(0, 39, (2, 13), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 13, dtype=torch.bool)
    if padded:
        valid[0, 11:] = False
        valid[1, 0] = False  # nothing says that padding is on the right
    options = {"visible": rule, "valid": valid if padded else None}
    with torch.inference_mode():
        out = {k: model.predict(tokens, **options) for k, model in kernels.items()}
        for kernel in ("sdpa", "flex_attention"):
            assert (out[kernel] - out["eager"])[valid].abs().max() < 1e-4, kernel
        model = tiny_model(5, n_layers=1)
        base = model.predict(tokens, **options)
        for k in range(13):
            changed = tokens.clone()
            changed[:, k] = (changed[:, k] + 1) % 39
            moved = (model.predict(changed, **options) - base).abs().amax(-1) > 1e-9
            for b in range(2):
                for q in range(13):
                    if valid[b, q] and q != k:
                        assert bool(moved[b, q]) == (seen(b, q, k) and bool(valid[b, k])), (b, q, k)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_masked_out_is_the_same_as_absent(kernel, uncompiled):
    """Slots that are not valid weigh nothing, whatever they hold."""
    model = tiny_model(6, attn_implementation=kernel, dtype=torch.float32)
    tokens = torch.randint(0, 39, (1, 10), generator=torch.Generator().manual_seed(2))
    valid = torch.tensor([[True] * 7 + [False] * 3])
    with torch.inference_mode():
        alone = model.predict(tokens[:, :7])
        padded = model.predict(tokens, valid=valid)[:, :7]
    assert (alone - padded).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"block_length": 4}])
def test_kernels_agree_on_some_slots_with_a_cache(changes, uncompiled):
    tokens = torch.randint(0, 39, (2, 10), generator=torch.Generator().manual_seed(3))
    everywhere, slots = torch.arange(10).expand(2, 10), torch.tensor([[3, 4, 9], [0, 5, 6]])
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 8:] = False
    found = []
    for kernel in ("eager", "sdpa", "flex_attention"):
        model = tiny_model(7, attn_implementation=kernel, dtype=torch.float32, **changes)
        cache = KVCache(2, 10)
        with torch.inference_mode():
            model.predict(tokens, everywhere, cache=cache, valid=valid)
            found.append(model.predict(tokens.gather(1, slots) // 2, slots, cache=cache, valid=valid))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4


def test_flex_attention_on_a_cpu_needs_no_compiler():
    """It runs SDPA; the compiled kernel wants a C++ compiler and fails on some shapes of torch 2.13."""
    model = tiny_model(5, attn_implementation="flex_attention", dtype=torch.float32)
    with torch.inference_mode():
        for length in (13, 7, 10):
            tokens = torch.arange(length)[None]
            valid = torch.arange(length)[None] < length - 1
            assert model.predict(tokens, valid=valid).isfinite().all()

"""Visibility rules against masks written out by hand, and the kernels against each other."""

import warnings

import pytest
import torch
from toys import tiny_model

from dlm.models import attention


@pytest.fixture(autouse=True)
def uncompiled():
    """FlexAttention is compiled where it matters, on a GPU; here its Python form must do without a C++ compiler."""
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
def test_kernels_agree_and_hide_what_the_rule_hides(name, padded):
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
        out = {k: model(tokens, **options) for k, model in kernels.items()}
        for kernel in ("sdpa", "flex_attention"):
            assert (out[kernel] - out["eager"])[valid].abs().max() < 1e-4, kernel
        model = tiny_model(5, n_layers=1)
        base = model(tokens, **options)
        for k in range(13):
            changed = tokens.clone()
            changed[:, k] = (changed[:, k] + 1) % 39
            moved = (model(changed, **options) - base).abs().amax(-1) > 1e-9
            for b in range(2):
                for q in range(13):
                    if valid[b, q] and q != k:
                        assert bool(moved[b, q]) == (seen(b, q, k) and bool(valid[b, k])), (b, q, k)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_masked_out_is_the_same_as_absent(kernel):
    """Slots that are not valid weigh nothing, whatever they hold."""
    model = tiny_model(6, attn_implementation=kernel, dtype=torch.float32)
    tokens = torch.randint(0, 39, (1, 10), generator=torch.Generator().manual_seed(2))
    valid = torch.tensor([[True] * 7 + [False] * 3])
    with torch.inference_mode():
        alone = model(tokens[:, :7])
        padded = model(tokens, valid=valid)[:, :7]
    assert (alone - padded).abs().max() < 1e-4

"""Compiled attention and passes of one call: torch's numbers, and bits that depend on nothing but what a token sees."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F

from dlm import Canvas, SamplingConfig, denoise
from dlm.kernels.by_rows import RowSizes, Run
from dlm.kernels.linear import has_kernels
from dlm.kernels.native import Runs, native
from dlm.kernels.packed import Packed
from dlm.kernels.whole import Whole
from dlm.models.attention import block_causal, block_causal_from
from dlm.models.kv_cache import KVCache
from tests.helpers.toys import MASK, tiny_model

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32) or shutil.which("cc") is None, reason="needs a C compiler and oneDNN"
)


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield native()


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(**changes) -> Packed:
    model = tiny_model(3, dtype=torch.float32, **changes).eval()
    model.compiled = True
    return Packed(model)


@pytest.mark.parametrize(
    "shape", [(3, 4, 2, 8, 9), (8, 2, 2, 64, 288), (50, 4, 1, 20, 37), (1, 2, 2, 6, 16), (100, 2, 2, 32, 70)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(functions, shape, masked, threads):
    """More queries than meet the keys together, heads that share keys, sizes that end inside a panel."""
    queries, heads, kv_heads, size, keys = shape
    q, k, v = (numbers(1, n, h, size, seed=n) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
    mask = numbers(queries, keys, seed=5) > 0.4 if masked else None
    if masked:
        mask[:, 0], mask[-1] = True, torch.arange(keys) == keys - 1
    out = functions.attention(q, k, v, Runs(functions, [Run(0, queries, 0, 0, keys, mask)]))
    k, v = (x.repeat_interleave(heads // kv_heads, 2).transpose(1, 2).double() for x in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2).double(), k, v, mask).transpose(1, 2).flatten(2)
    assert (out - expected).abs().max() < 2e-6


def test_what_sees_nothing_is_0_and_nan_stays(functions):
    q, k, v = numbers(1, 2, 1, 8), numbers(1, 20, 1, 8, seed=1), numbers(1, 20, 1, 8, seed=2)
    mask = torch.stack([torch.zeros(20), torch.ones(20)]).bool()
    assert functions.attention(q, k, v, Runs(functions, [Run(0, 2, 0, 0, 20, mask)]))[0, 0].eq(0).all()
    q[0, 1, 0, 3] = torch.nan
    out = functions.attention(q, k, v, Runs(functions, [Run(0, 2, 0, 0, 20, None)]))
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


def test_a_query_has_the_same_bits_beside_others_and_beside_what_it_does_not_see(functions, threads):
    q, k, v = numbers(1, 70, 4, 24), numbers(1, 45, 2, 24, seed=1), numbers(1, 45, 2, 24, seed=2)
    alone = [
        functions.attention(q[:, i : i + 1], k[:, :33], v[:, :33], Runs(functions, [Run(0, 1, 0, 0, 33, None)]))
        for i in range(70)
    ]
    sees = (torch.arange(45) < 33).expand(70, -1)
    runs = [Run(0, 9, 0, 0, 33, None), Run(9, 60, 0, 0, 45, sees[:60]), Run(69, 1, 0, 0, 40, sees[:1, :40])]
    assert torch.equal(functions.attention(q, k, v, Runs(functions, runs)), torch.cat(alone, dim=1))


CHANGES = [
    {},
    {"n_kv_heads": 1, "include_qkv_bias": True, "mlp_hidden_size": 52},
    {"weight_tying": True, "input_emb_norm": True, "scale_logits": True},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("rule", [None, block_causal(4), block_causal_from(4, (1, 0, 3))])
@pytest.mark.parametrize("cached", [True, False])
def test_one_call_gives_the_bits_of_layer_after_layer(changes, rule, cached, threads):
    copy = compiled(**changes)
    tokens, lengths = torch.randint(0, 38, (3, 37), generator=torch.Generator().manual_seed(0)), (37, 9, 21)
    valid, keep = torch.arange(37) < torch.tensor(lengths)[:, None], torch.tensor([[0, 2, 3, 5, 8]] * 3)
    slots = torch.arange(37).expand(3, -1)

    def run(**more):
        cache = KVCache(3, 40) if cached else None
        if cached and "valid" in more:
            more["valid"] = F.pad(more["valid"], (0, 3))
        if "sizes" in more:
            more["sizes"] = RowSizes(lengths, (40,) * 3 if cached else lengths, (5,) * 3)
        stored = [] if cache is None else cache._layers
        return copy(tokens, slots if cached else None, visible=rule, cache=cache, **more), stored

    ways = [{}, {"logits_to_keep": keep}, {"valid": valid}, {"valid": valid, "logits_to_keep": keep, "sizes": None}]
    got = [run(**more) for more in ways]
    copy.whole = None
    for more, (logits, stored) in zip(ways, got, strict=True):
        expected, layers = run(**more)
        seen = valid[..., None] if logits.shape[1] == 37 and "valid" in more else torch.ones(1, 1, 1, dtype=torch.bool)
        assert torch.equal(logits * seen, expected * seen), more
        for layer in range(len(layers)):
            assert all(map(torch.equal, stored[layer], layers[layer]))


def test_a_row_has_the_bits_it_has_alone_and_rows_of_a_cache_may_be_others():
    copy, slots = compiled(), torch.arange(6).expand(2, -1)
    cache, tokens = KVCache(4, 9), torch.randint(0, 38, (2, 6), generator=torch.Generator().manual_seed(0))
    both = copy(tokens, slots, cache=cache.at(torch.tensor([3, 1])))
    for row, place in enumerate((3, 1)):
        own = KVCache(1, 9)
        assert torch.equal(copy(tokens[row : row + 1], slots[:1], cache=own)[0], both[row])
        for layer in range(len(copy.layers)):
            pairs = zip(own._layers[layer], cache._layers[layer], strict=True)
            assert all(torch.equal(a[0], b[place]) and not b[0].any() for a, b in pairs)


@pytest.mark.parametrize("method", ["none", "dual", "block_causal"])
def test_drafts_have_the_bits_of_plain_decoding(method):
    """Was: `--draft` with `--compile` ended in an AttributeError."""
    causal = method == "block_causal"
    copy = compiled(**({"block_length": 4, "objective": "block_diffusion"} if causal else {}))
    config = SamplingConfig(gen_length=12, block_length=None if causal else 4, method=method, temperature=0.8, seed=4)
    seen = []
    for draft in (0, 3):
        canvas = Canvas.from_prompts([[1, 2, 3], [5] * 9], 12, MASK)
        sure, states = torch.zeros(canvas.tokens.shape), denoise(copy, canvas, dataclasses.replace(config, draft=draft))
        for state in states:
            sure += state.confidence
        seen.append((state.canvas.tokens, sure))
    assert all(map(torch.equal, *seen))


def test_which_models_and_passes_are_one_call():
    assert compiled().whole is not None and compiled(attention_layer_norm=True).whole is None
    keep = torch.ones(2, 3, dtype=torch.int64)
    assert Whole.serves(None, keep) and Whole.serves(KVCache(2, 3).at(torch.tensor([1])), None)
    assert not Whole.serves(None, keep.bool()) and not Whole.serves(None, keep[0])

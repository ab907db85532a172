"""Compiled operations: torch's numbers, the same bits for a row in every batch, the same tokens; refusals."""

import platform
import shutil

import pytest
import torch
import torch.nn.functional as F

import dlm
from dlm.cli.main import main
from dlm.kernels import native as module
from dlm.kernels.by_rows import RowSizes
from dlm.kernels.linear import has_kernels
from dlm.kernels.packing import packed
from dlm.models.kv_cache import KVCache
from tests.helpers.toys import tiny_model

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32) or shutil.which("cc") is None, reason="needs a C compiler and oneDNN"
)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield module.native()


@pytest.fixture(scope="module")
def plain_vectors(tmp_path_factory):
    """The functions for a processor without AVX."""
    if platform.machine() != "x86_64":
        pytest.skip("names an x86-64 processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(module, "OPTIONS", (*module.OPTIONS, "-march=x86-64"))
        yield module.native()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 16, 37, 384])
def test_norm_and_silu_are_torchs(native, size):
    x, weight = numbers(3, 5, 2 * size) * 9, numbers(size, seed=1)
    part = x[..., :size]
    torch.testing.assert_close(native.normed(part, weight, 1e-5), F.rms_norm(part, (size,), weight, 1e-5))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(native.gated(x), F.silu(gate) * up)


def test_silu_of_numbers_far_from_zero_and_of_none(native):
    gate = torch.tensor([-1e30, -100.0, -88.5, -87.2, -1e-30, 0.0, 60.0, 100.0, 1e30, float("nan"), float("inf")])
    y = native.gated(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    torch.testing.assert_close(y, F.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-5)
    assert native.normed(gate[None], torch.ones(11), 1e-5).isnan().all()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 0)])
def test_queries_turn_and_keys_lie_where_they_are_kept(native, heads, given):
    """By hand: the pair (a, b) at angle t becomes (a cos t - b sin t, a sin t + b cos t)."""
    heads, kv_heads = heads
    batch, queries, length, size = 2, 3, 9, 8
    x = numbers(batch, queries, (heads + 2 * kv_heads) * size)
    angles = numbers(length, size // 2, seed=1)
    turns = torch.polar(torch.ones_like(angles), angles)
    slots = torch.tensor([[0, 8, 4], [5, 1, 2]]) if given else torch.arange(queries).expand(batch, -1)
    stored = (torch.zeros(batch, kv_heads, length, size), torch.zeros(batch, kv_heads, length, size))
    q = native.place(x, turns, slots if given else None, heads, stored if kv_heads else None)
    each = x.unflatten(-1, (-1, size))
    a, b, t = each[..., ::2], each[..., 1::2], angles[slots][:, :, None]
    turned = torch.stack([a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()], dim=-1).flatten(-2)
    torch.testing.assert_close(q, turned[:, :, :heads])
    every = torch.arange(batch)[:, None]
    if kv_heads:
        torch.testing.assert_close(stored[0][every, :, slots], turned[:, :, heads : heads + kv_heads])
        assert torch.equal(stored[1][every, :, slots], each[:, :, heads + kv_heads :])
        assert int((stored[1].abs().sum(-1) > 0).sum()) == batch * queries * kv_heads


def test_a_token_has_the_same_bits_beside_others_and_on_several_threads(native, monkeypatch):
    x, weight = numbers(50, 96), numbers(48, seed=1)
    turns = torch.polar(torch.ones(64, 8), numbers(64, 8, seed=2))

    def all_of(part, slots):
        stored = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16)
        q = native.place(part[None], turns, slots[None], 2, stored)
        return native.normed(part[:, :48], weight, 1e-6), native.gated(part), q, stored[0][:, :, slots]

    slots = torch.arange(50)
    alone = [all_of(x[i : i + 1], slots[i : i + 1]) for i in range(50)]
    before = torch.get_num_threads()
    for threads, shared in ((1, 2**17), (3, 1)):
        monkeypatch.setattr(module, "SHARED", shared)
        torch.set_num_threads(threads)
        normed, gated, q, keys = all_of(x, slots)
        torch.set_num_threads(before)
        for i, one in enumerate(alone):
            assert torch.equal(normed[i], one[0][0]) and torch.equal(gated[i], one[1][0])
            assert torch.equal(q[0, i], one[2][0, 0]) and torch.equal(keys[:, :, i], one[3][:, :, 0])


@pytest.mark.parametrize("processor", ["native", "plain_vectors"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (37, 16), (64, 45), (129, 80)])
def test_products_are_torchs(request, processor, inputs, outputs):
    """Rows below, at and above a group, and above a block of them; outputs that end inside a panel; a strided x."""
    functions = request.getfixturevalue(processor)
    weight, bias = numbers(outputs, inputs, seed=1) / inputs**0.5, numbers(outputs, seed=2)
    for rows in (1, 2, 3, 5, 7, 12, 13, 31, 96, 203):
        x, residual = numbers(rows, 2 * inputs)[:, :inputs], numbers(rows, outputs, seed=3)
        for constant in (None, bias):
            layer = module.Panels.of(functions, [weight], [constant])
            expected = F.linear(x.double(), weight.double(), None if constant is None else constant.double())
            for got, exact in ((layer(x), expected), (layer.plus(x, residual), expected + residual)):
                error = (got - exact).abs().max() / exact.abs().max()
                assert got.shape == (rows, outputs) and error < 1e-5


def test_joined_layers_are_one_product_and_batches_keep_their_shape(native):
    first, second, x = numbers(5, 24), numbers(18, 24, seed=1), numbers(2, 3, 24, seed=2)
    layer = module.Panels.of(native, [first, second], [numbers(5, seed=3), numbers(18, seed=4)])
    expected = F.linear(x, torch.cat([first, second]), torch.cat([numbers(5, seed=3), numbers(18, seed=4)]))
    torch.testing.assert_close(layer(x), expected)
    residual = numbers(2, 23, 3, seed=5).transpose(1, 2)
    torch.testing.assert_close(layer.plus(x, residual), expected + residual)
    assert layer(x[:0]).shape == (0, 3, 23) and layer(x.mT.contiguous().mT).equal(layer(x))


def test_a_row_of_a_product_has_the_same_bits_beside_others_and_on_several_threads(native):
    x, residual = numbers(200, 75), numbers(200, 52, seed=1)
    layer = module.Panels.of(native, [numbers(52, 75, seed=2)], [numbers(52, seed=3)])
    alone = torch.cat([layer.plus(row, more) for row, more in zip(x[:, None], residual[:, None], strict=True)])
    before = torch.get_num_threads()
    for threads in (1, 3, 7):  # of four panels
        torch.set_num_threads(threads)
        every = [layer.plus(x[:rows], residual[:rows]) for rows in (2, 6, 7, 25, 96, 97, 200)]
        torch.set_num_threads(before)
        for some in every:
            assert torch.equal(some, alone[: len(some)])


SETTINGS = [
    {"method": "none"}, {"method": "dual"}, {"method": "prefix", "cfg_scale": 0.5}, {"method": "c2f"},
    {"method": "dual", "commit": "threshold", "threshold": 0.4}, {"method": "vicinity", "temperature": 0.7},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "attention_layer_norm": True, "include_qkv_bias": True}])
def test_tokens_are_those_of_the_plain_path(native, settings, changes):
    model = tiny_model(3, dtype=torch.float32, **changes).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    config = dlm.SamplingConfig(gen_length=12, block_length=4, steps=6, seed=5, **settings)
    plain = dlm.generate(model, prompts, config).sequences
    copy = packed(model)
    model.compiled = True
    assert copy.small is None and packed(model) is not copy and type(packed(model).small) is module.Native
    first = packed(model).layers[0]
    products = (packed(model).head, first.qkv, first.out, first.gate_up, first.down)
    assert all(type(product) is module.Panels for product in products)
    assert (packed(model).whole is not None) == (not changes)
    assert torch.equal(dlm.generate(model, prompts, config).sequences, plain)


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_has_the_same_bits_in_every_batch(native, cached):
    """Rows of several sizes end to end, with a cache and without: keys lie by row and slot, or by place in the pass."""
    model = tiny_model(2, dtype=torch.float32).eval()
    model.compiled = True
    copy, generator = packed(model), torch.Generator().manual_seed(0)
    tokens, counts, length = torch.randint(0, 30, (3, 7), generator=generator), (7, 4, 5), 9
    slots = torch.stack([torch.randperm(length, generator=generator)[:7].sort().values for _ in range(3)])
    slots = slots if cached else torch.arange(7).expand(3, -1)
    asked = torch.tensor([[0, 2, 3]] * 3)

    def run(rows, widest):
        part = [counts[row] for row in rows]
        keys = (length,) * len(rows) if cached else part
        sizes = RowSizes(tuple(part), tuple(keys), (3,) * len(rows))
        valid = torch.ones(len(rows), length if cached else widest, dtype=torch.bool)
        if not cached:
            valid = torch.arange(widest)[None] < torch.tensor(part)[:, None]
        cache = KVCache(len(rows), length) if cached else None
        where = slots[rows, :widest].clone()
        for i, count in enumerate(part):  # padded with their last
            where[i, count:] = where[i, count - 1]
        more = {"cache": cache, "positions": where} if cached else {}
        out = copy(tokens[rows, :widest], valid=valid, logits_to_keep=asked[rows], sizes=sizes, **more)
        return out, cache

    every, cache = run([0, 1, 2], 7)
    for row, count in enumerate(counts):
        alone, own = run([row], count)
        assert torch.equal(alone[0], every[row])
        if cached:
            assert all(
                torch.equal(a[0], b[row]) for a, b in zip(own.stored(0, alone), cache.stored(0, alone), strict=True)
            )


def test_the_library_is_kept_and_its_making_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    told = []
    file = module.library(told.append)
    assert told == ["compiling"] and module.library(told.append) == file and told == ["compiling"]
    assert [*file.parent.iterdir()] == [file]
    words = ["generate", "Once", "--gen-length", "8", "--seed", "3"]
    assert main(words) == main([*words, "--compile"]) == 0
    plain, compiled = capsys.readouterr().out.splitlines()
    assert plain == compiled


def test_refusals(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    for compiler, reason in (("false", "compile failed"), ("no-such-compiler", "needs a C compiler")):
        monkeypatch.setenv("CC", compiler)
        assert main(["generate", "Once", "--compile"]) == 2
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*/*"))
    monkeypatch.delenv("CC")
    model = tiny_model(1, dtype=torch.float64).eval()
    model.compiled = True
    with pytest.raises(ValueError, match="compile is for"):
        packed(model)

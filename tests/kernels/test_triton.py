"""Kernels in Triton: what torch proposes from one reading of the logits, and how it rounds to float8.

Without a GPU, Triton's interpreter runs the kernels on CPU tensors (conftest.py asks for it); with one, the same tests
run on it. Shapes: N places, V vocabulary.
"""

import math
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import dlm
import dlm.kernels
from dlm import Canvas, SamplingConfig
from dlm.kernels import fp8
from dlm.kernels.available import triton_kernels
from dlm.kernels.packing import packed
from dlm.sampling import step
from dlm.sampling.step import decide
from tests.helpers.toys import MASK, BreaksAt, tiny_model

try:
    from dlm.kernels import triton
except ImportError:
    triton = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of inf - inf that `where` drops
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")

CONFIDENCES = ("probability", "margin", "entropy")
ROUNDING = 2e-6  # times the greatest value, or 1; exp on a GPU errs by two units in the last place
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Rows of tens of logits have several chunks, the last one in part."""
    if triton is not None:
        monkeypatch.setattr(triton, "CHUNK", 16)


def ids(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def reference(logits, forbidden, suppressed, confidence="probability"):
    """(token, confidence, largest) as `decide` finds them in torch, in the type of the logits or fp32."""
    config = SamplingConfig(confidence=confidence)
    with patch.object(step, "fused", return_value=None):
        return decide(logits, None, [logits.shape[1]] * len(logits), config, suppressed, forbidden, ())


def same_as_torch(logits, forbidden, suppressed=()):
    """Largest difference of any confidence to torch's in fp64; token and largest logit must be equal. (R, M, V)."""
    found, worst = triton.summarise(logits, forbidden, suppressed), 0.0
    assert found.token.dtype == torch.int64 and all(x.shape == logits.shape[:-1] for x in found)
    for name in CONFIDENCES:
        token, rounded, largest = reference(logits, forbidden, suppressed, name)
        assert torch.equal(found.token, token)
        assert torch.equal(found.largest, largest)
        confidence, got = reference(logits.double(), forbidden, suppressed, name)[1], found.confidence(name)
        assert got.dtype == rounded.dtype == torch.float32
        scale = max(1.0, confidence.abs().max().item())
        difference = ((got - confidence).abs().max() / scale).item()
        assert difference <= ROUNDING, f"{name}: {difference}"  # NaN is not
        worst = max(worst, difference)
    return worst


# ---------------------------------------------------------------- by hand


@needs_triton
def test_by_hand(monkeypatch):
    """p = 0.4, 0.1, 0.3, 0.2 in chunks of two. The likeliest is forbidden and still counted; suppressed, it is not."""
    monkeypatch.setattr(triton, "CHUNK", 2)
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25] * 4], device=DEVICE).log() + 7
    counted = triton.summarise(logits, ids(0))
    assert counted.token.tolist() == [2, 1]
    assert counted.probability.tolist() == pytest.approx([0.3, 0.25])
    assert counted.second.tolist() == pytest.approx([0.2, 0.25])
    lengths = [0.4 * math.log(0.4) + 0.1 * math.log(0.1) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2), -math.log(4)]
    assert counted.entropy.tolist() == pytest.approx(lengths)
    assert counted.largest.tolist() == pytest.approx([7 + math.log(0.4), 7 + math.log(0.25)])

    suppressed = triton.summarise(logits, ids(0), [0])
    assert suppressed.token.tolist() == [2, 1]
    assert suppressed.probability.tolist() == pytest.approx([0.5, 1 / 3])
    assert suppressed.second.tolist() == pytest.approx([1 / 3, 1 / 3])
    lengths = [0.5 * math.log(0.5) + 1 / 6 * math.log(1 / 6) + 1 / 3 * math.log(1 / 3), -math.log(3)]
    assert suppressed.entropy.tolist() == pytest.approx(lengths)
    assert torch.equal(suppressed.largest, counted.largest)  # damage shows wherever it is


@needs_triton
def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(1, 4, 50, device=DEVICE)
    for place, equal in enumerate([(3, 9), (15, 16), (17, 40, 49), (48, 49)]):  # in one chunk, over chunks, in the last
        logits[0, place, list(equal)] = 2.5
    found = triton.summarise(logits, ids(17))
    assert found.token.tolist() == [[3, 15, 40, 48]]
    assert torch.equal(found.probability, found.second)
    same_as_torch(logits, ids(17))


# ---------------------------------------------------------------- against torch


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100])
def test_random_logits(dtype, size, measured):
    generator = torch.Generator().manual_seed(size)
    worst = 0.0
    for spread in (0.1, 30):
        logits = (spread * torch.randn(1, 3, size, generator=generator)).to(DEVICE, dtype)  # bf16: many are equal
        for forbidden, suppressed in [((), ()), ((0, size - 1), ()), ((0, 3, size - 1), (3, size + 5))]:
            if len({*forbidden} & {*range(size)}) < size:
                forbidden = ids(*sorted({token for token in forbidden if token < size}))
                worst = max(worst, same_as_torch(logits, forbidden, suppressed))
    measured(f"fused confidence, {size} logits in {dtype}: difference from fp64", worst, ROUNDING)


@needs_triton
def test_chunks_of_any_scale():
    """What was summed at one maximum is rescaled to another, up or down, and nothing overflows on the way."""
    logits = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 0, :16] += 5  # the first chunk's maximum is the row's
    logits[0, 1, 32:] += 5  # the last one's
    logits[0, 2, 16:32] += 300  # other chunks vanish
    logits[0, 3, 7] = 500  # suppressed: above what exp can bring back
    logits[0, 4] *= 1e37
    logits[0, 5, :16] = -3.4e38
    logits[0, 6] -= 1e5
    same_as_torch(logits, ids(7), (7,))
    same_as_torch(logits, ids(7, 40))


@needs_triton
def test_minus_infinity():
    """-inf is the lowest number: still above what is forbidden, and all alike where nothing else is left."""
    logits = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[0, 0, 5:20] = -INF
    logits[0, 1, :32] = -INF  # two whole chunks
    logits[0, 2] = -INF
    logits[0, 3] = -INF
    logits[0, 3, 39] = 30.0  # all weight on the mask token
    logits[0, 4, 1:] = -INF
    same_as_torch(logits, ids(39))
    same_as_torch(logits, ids(0, 39), (0,))
    assert triton.summarise(logits, ids(0, 39)).token[0, 2:].tolist() == [1, 1, 1]


@needs_triton
def test_whole_chunks_forbidden_and_suppressed():
    logits = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    same_as_torch(logits, ids(*range(16), 39))
    same_as_torch(logits, ids(*range(16), 39), tuple(range(16)))
    same_as_torch(logits, ids(*range(16, 40)), tuple(range(16, 32)))
    only = triton.summarise(logits, ids(*range(12), *range(13, 40)))
    assert only.token.tolist() == [[12] * 3]
    assert only.second.tolist() == [[0.0] * 3]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 17, 39, 42])
def test_damage_shows_wherever_it_is(dtype, place):
    """In ids that are free, suppressed, forbidden and in the last part of a chunk; other rows do not see it."""
    logits = torch.randn(1, 4, 43, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    clean = triton.summarise(logits, ids(17, 39), (17,))
    logits[0, 0, place], logits[0, 1, place] = NAN, INF
    logits[0, 2, place], logits[0, 2, 5] = NAN, INF
    found = triton.summarise(logits, ids(17, 39), (17,))
    assert found.largest[0, :3].tolist() == pytest.approx([NAN, INF, NAN], nan_ok=True)
    assert ((found.token >= 0) & (found.token < 43)).all()
    assert all(torch.equal(new[0, 3], old[0, 3]) for new, old in zip(found, clean, strict=True))
    logits[0] = NAN
    assert triton.summarise(logits, ids(39)).token.tolist() == [[0] * 4]


@needs_triton
def test_strides_and_sizes():
    logits = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    for view in (
        logits[..., :33],  # rows of a wider table
        logits[::2],
        logits[:, 1:3, 7:30],  # rows that no single stride tells
        logits[..., :3].transpose(0, 2),
        logits[0, :, :9].T[None],  # one stride for rows, and another for ids
        logits[:1, :2].expand(2, -1, -1),
        logits[:1, :1],
        logits[:0],
        logits[:, :0],
    ):
        if view.numel():
            same_as_torch(view, ids(2))
        else:
            assert all(x.shape == view.shape[:-1] for x in triton.summarise(view, ids(2)))
    assert triton.summarise(logits[0, 0], ids(2)).token.shape == ()


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="it takes a GPU with 5 GB")
def test_offsets_beyond_32_bits(monkeypatch):
    monkeypatch.undo()
    logits = torch.zeros(17_000, 126_464, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 126_000] = 9
    assert triton.summarise(logits, ids(0)).token[-2:].tolist() == [1, 126_000]


@needs_triton
def test_the_same_bits_every_time():
    logits = torch.randn(3, 2, 90, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    one, two, alone = (triton.summarise(x, ids(4)) for x in (logits, logits, logits[1:2, 1:]))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a[1, 1], b[0, 0]) for a, b in zip(one, alone, strict=True))  # whatever is beside it


# ---------------------------------------------------------------- float8


@pytest.fixture
def rounds(monkeypatch):
    """What torch makes of activations."""
    monkeypatch.setattr(fp8, "triton_kernels", lambda device: None)
    return fp8.quantise


def views(x):
    """x (A, B, K) and parts of it with other strides, sizes that are no powers of two among them."""
    return x, x[..., 1:34], x[:, ::2], x[0, :, :16].T, x[:0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_float8(rounds, dtype):
    x = 3 * torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(6))
    x[0, 1], x[0, 2], x[1, 0] = 0, 1e-30 * x[0, 2], 1e30 * x[1, 0]
    for part in views(x.to(DEVICE, dtype)):
        (numbers, scale), (wanted, wanted_scale) = triton.quantise(part), rounds(part)
        assert numbers.dtype == wanted.dtype and numbers.shape == wanted.shape and scale.shape == wanted_scale.shape
        torch.testing.assert_close(scale, wanted_scale, rtol=2**-22, atol=0)  # torch multiplies by 1 / 448 on a GPU


@needs_triton
def test_every_float8_is_kept(rounds):
    """Numbers that need no rounding, which Triton's interpreter gets wrong (it drops a carry into the exponent)."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    order = torch.randperm(127, generator=torch.Generator().manual_seed(7))
    x = torch.stack([every[order], -every, every / 8]).to(DEVICE)
    for part in (x, x.T.contiguous().T):
        (numbers, scale), (wanted, wanted_scale) = triton.quantise(part), rounds(part)
        assert scale[:, 0].tolist() == [1, 1, 0.125] == wanted_scale[:, 0].tolist()
        assert torch.equal(numbers.float(), wanted.float())
        assert torch.equal(numbers.float() * scale, x)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter rounds to float8 wrongly: this takes a GPU")
def test_rounding_to_float8(rounds):
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(8)).to(DEVICE, torch.bfloat16)
    x[3, 5], x[4, 6] = NAN, INF
    (numbers, scale), (wanted, _) = triton.quantise(x), rounds(x)
    assert (numbers.float() == wanted.float()).float().mean() > 0.95  # two rows of NaN; scales differ in their last bit
    assert numbers[3].float().isnan().any() and numbers[4].float().isnan().any()
    good = [row for row in range(64) if row not in (3, 4)]
    apart = ((numbers.float() * scale - x.float()).abs() <= x.float().abs() / 16 + scale * 2**-10)[good]
    assert apart.all()


# ---------------------------------------------------------------- where it runs


@needs_triton
def test_the_host_waits_for_nothing(monkeypatch):
    """Tensors without values pass through the launcher: no value is read, so a CUDA graph can hold it."""
    grids = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: grids.append(grid)

    monkeypatch.setattr(triton, "_chunk", Launch())
    monkeypatch.setattr(triton, "_merge", Launch())
    logits = torch.empty(2, 3, 100, dtype=torch.bfloat16, device="meta")
    found = triton.summarise(logits, torch.empty(4, dtype=torch.int64, device="meta"), (1, 2))
    assert found.confidence("margin").shape == (2, 3)
    assert grids == [(6, 7), (6,)]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dlm.kernels import triton as kernels

chunk = {"logits": None, "row_stride": "i32", "stride": "constexpr", "roles": "*i8", "index": "*i32", "parts": "*fp32",
         "size": "i32", "CHUNK": "constexpr"}
merge = {"index": "*i32", "parts": "*fp32", "token": "*i64", "found": "*fp32", "chunks": "i32", "WIDTH": "constexpr"}
quantise = {"x": "*bf16", "row_stride": "i32", "stride": "constexpr", "numbers": "*fp8e4nv", "scale": "*fp32",
            "size": "i32", "WIDTH": "constexpr"}
for kind in ("fp32", "bf16", "fp16"):
    source = ASTSource(kernels._chunk, chunk | {"logits": "*" + kind}, {"stride": 1, "CHUNK": kernels.CHUNK})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert "f64" not in code, "fp64 arithmetic"
triton.compile(ASTSource(kernels._merge, merge, {"WIDTH": 32}), target=GPUTarget("cuda", 90, 32))
source = ASTSource(kernels._quantise, quantise, {"stride": 1, "WIDTH": 4096})
assert "cvt.rn.satfinite.e4m3x2.f32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
place = {"x": "*bf16", "row_stride": "i32", "turns": "*fp32", "positions": "*i64", "q": "*bf16", "keys": "*bf16",
         "values": "*bf16", "queries": "i32", "heads": "i32", "kv_heads": "i32", "slots": "i32", "GIVEN": "constexpr",
         "HALF": "constexpr", "WIDTH": "constexpr"}
for given in (True, False):
    source = ASTSource(kernels._place, place, {"GIVEN": given, "HALF": 48, "WIDTH": 64})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
gated = {"x": "*bf16", "row_stride": "i32", "y": "*bf16", "size": "i32", "WIDTH": "constexpr"}
triton.compile(ASTSource(kernels._gated, gated, {"WIDTH": kernels.GATED}), target=GPUTarget("cuda", 90, 32))
normed = {"x": "*bf16", "row_stride": "i32", "weight": "*bf16", "y": "*bf16", "size": "i32", "eps": "fp32",
          "WIDTH": "constexpr"}
triton.compile(ASTSource(kernels._normed, normed, {"WIDTH": 4096}), target=GPUTarget("cuda", 90, 32))
print("compiled")
"""


@needs_triton
def test_it_compiles_for_a_gpu(tmp_path):
    """By Triton's own compiler, to the code of a GPU that need not be here."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(dlm.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


class Proposing:
    """A predictor whose logits are read by these kernels, whatever its own passes use."""

    def __init__(self, predictor, kernels):
        self.predictor, self.kernels = predictor, kernels
        self.config, self.device = predictor.config, predictor.device

    def __call__(self, *args, **options):
        return self.predictor(*args, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"confidence": "margin"}, True),
        ({"commit": "entropy_bound"}, True),
        ({"top_k": 3, "top_p": 0.5}, True),  # of the likeliest tokens the likeliest is one
        ({"temperature": 0.5}, False),
        ({"confidence": "random"}, False),
        ({"tempered_confidence": True}, False),
        ({"cfg_scale": 1.0}, False),
    ],
)
def test_which_proposals_are_fused(options, expected):
    seen, plain = [], packed(tiny_model(0, dtype=torch.float32).to(DEVICE))

    def summarise(logits, forbidden, suppressed):
        seen.append(suppressed)
        largest, token = logits.max(dim=-1)
        return types.SimpleNamespace(token=token.clamp_max(30), largest=largest, confidence=lambda name: largest)

    predictor = Proposing(plain, types.SimpleNamespace(summarise=summarise))
    dlm.generate(predictor, [[1, 2, 3]], SamplingConfig(gen_length=4, steps=2, suppress_eos=True, **options))
    assert bool(seen) == expected
    assert all(suppressed == (38,) for suppressed in seen)


def test_which_logits_are_fused():
    kernels = object()
    assert step.fused(torch.zeros(1, 1, 4), kernels) is kernels
    assert step.fused(torch.zeros(1, 1, 4, dtype=torch.float64), kernels) is None
    assert step.fused(torch.nn.Parameter(torch.zeros(1, 1, 4)), kernels) is None  # or any wrapped or sharded tensor


def with_module(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "dlm.kernels.triton", module)
    monkeypatch.setattr(dlm.kernels, "triton", module, raising=False)


def probe():
    """What `triton_kernels` says of a GPU; what it tries there goes to a device that has no values."""
    return triton_kernels.__wrapped__(types.SimpleNamespace(type="cuda"))


def test_a_cpu_has_no_kernels():
    assert triton_kernels(torch.device("cpu")) is None


def test_where_triton_is(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
    fake = types.ModuleType("dlm.kernels.triton")
    fake.summarise = lambda logits, forbidden: None
    with_module(monkeypatch, fake)
    assert probe() is fake


def test_without_triton(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dlm.kernels.triton", raising=False)
    monkeypatch.delattr(dlm.kernels, "triton", raising=False)
    assert probe() is None
    assert not recwarn.list


def test_where_triton_cannot_compile(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
    fake = types.ModuleType("dlm.kernels.triton")
    fake.summarise = fails
    with_module(monkeypatch, fake)
    with pytest.warns(UserWarning, match="does not run on .*C compiler"):
        assert probe() is None


def test_forbidden_ids_outlive_inference_mode():
    with torch.inference_mode():
        made = step.forbidden_ids(50, 47, (3, 60), torch.device("cpu"))
    assert made.tolist() == [3, 47, 48, 49] and not made.is_inference()


# ---------------------------------------------------------------- whole generations


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "dual", "confidence": "margin"},
        {"method": "c2f", "suppress_eos": True},
        {"commit": "threshold", "threshold": 0.4},
        {"commit": "entropy_bound", "entropy_bound": 2.0},
    ],
)
def test_generations_are_the_same(monkeypatch, options):
    model = tiny_model(3, dtype=torch.float32, embedding_size=64).to(DEVICE)
    config = SamplingConfig(gen_length=8, steps=4, block_length=4, **options)
    predictor = packed(model)
    results, calls, summarise = [], [], triton.summarise
    monkeypatch.setattr(triton, "summarise", lambda *inputs: calls.append(1) or summarise(*inputs))
    for use in (False, True):
        results.append(dlm.generate(Proposing(predictor, triton if use else None), [[1, 2, 3], [4, 5]], config))
        assert bool(calls) == use
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].nfe, results[1].nfe)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the predictor stands on a CPU")
def test_damage_is_refused_in_the_same_words():
    said = []
    for use in (False, True):
        predictor = BreaksAt(40, 2)
        predictor.kernels = triton if use else None
        with pytest.raises(FloatingPointError) as error:
            list(dlm.denoise(predictor, Canvas.from_prompts([[1, 2]], 4, MASK), SamplingConfig(gen_length=4)))
        said.append(str(error.value))
    assert said[0] == said[1] and "nan at slot" in said[0]


# ---------------------------------------------------------------- a layer's small operations


def turned(x, turns, slots):
    """Pairs of x (B, Q, H D) times turns (T, D / 2) at slots (B, Q), in fp64: (B, Q, H, D)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, turns.shape[1], 2)).contiguous())
    return torch.view_as_real(pairs * turns.to(torch.complex128)[slots][:, :, None]).flatten(-2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 12])
def test_queries_turn_and_keys_and_values_go_where_they_are_kept(dtype, size):
    """Some slots of a longer canvas, each row its own; what is not computed keeps its value."""
    heads, kv_heads, slots = 4, 2, 9
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 3, (heads + 2 * kv_heads) * size, generator=generator).to(DEVICE, dtype)
    turns = torch.polar(torch.ones(slots, size // 2), torch.randn(slots, size // 2, generator=generator)).to(DEVICE)
    where = torch.tensor([[4, 1, 8], [0, 2, 7]], device=DEVICE)
    stored = [torch.full((2, kv_heads, slots, size), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    q, k, v = x.split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0}  # it may truncate

    wanted = [torch.full_like(stored[0], 7.0) for _ in range(2)]
    rows = torch.arange(2, device=DEVICE)[:, None]
    wanted[0][rows, :, where] = turned(k, turns, where).to(dtype)
    wanted[1][rows, :, where] = v.unflatten(-1, (kv_heads, size))
    got = triton.place(x, turns, where, heads, (stored[0], stored[1]))
    torch.testing.assert_close(got, turned(q, turns, where).to(dtype), **tolerance)
    torch.testing.assert_close(stored[0], wanted[0], **tolerance)
    assert torch.equal(stored[1], wanted[1])

    alone = triton.place(q, turns, where, heads, None)  # a view of wider rows
    assert torch.equal(alone, got)
    again = [torch.full_like(stored[0], 7.0) for _ in range(2)]
    assert triton.place(x[..., heads * size :], turns, where, 0, (again[0], again[1])).numel() == 0
    assert all(torch.equal(one, two) for one, two in zip(again, stored, strict=True))

    every = torch.arange(3, device=DEVICE).expand(2, 3)
    torch.testing.assert_close(
        triton.place(q, turns, None, heads, None), turned(q, turns, every).to(dtype), **tolerance
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normed(dtype):
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(8)).to(DEVICE, dtype)
    weight = torch.randn(33, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    x[0, 0], x[0, 1] = 0, 1e4 * x[0, 1]
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-30}
    for part in (x[..., :33], x[:, 1, 3:36].contiguous()):  # rows of a wider table, too
        wanted = torch.nn.functional.rms_norm(part.double(), (33,), weight.double(), 1e-5).to(dtype)
        torch.testing.assert_close(triton.normed(part, weight, 1e-5), wanted, **tolerance)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(dtype, monkeypatch):
    monkeypatch.setattr(triton, "GATED", 16)
    x = 4 * torch.randn(2, 3, 74, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    x[0, 0, :2] = torch.tensor([1e4, -1e4])
    gate, up = x.double().chunk(2, dim=-1)
    wanted = (gate.sigmoid() * gate * up).to(dtype)
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-30}
    torch.testing.assert_close(triton.gated(x), wanted, **tolerance)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"include_bias": True}, {"method": "none"}),
        ({"n_kv_heads": 1}, {"method": "dual", "commit": "threshold", "threshold": 0.5}),
        ({"block_length": 2}, {"method": "block_causal", "block_length": None}),
    ],
)
def test_a_pass_in_fewer_kernels_gives_the_tokens_of_the_plain_path(shape, options):
    """Ragged rows that come to their blocks at different passes; `eager` attention keeps the plain model."""
    model, prompts = tiny_model(5, dtype=torch.float32, **shape).to(DEVICE), [[1, 2], [4]]
    config = SamplingConfig(gen_length=4, **({"block_length": 2} | options))
    model.config._attn_implementation = "eager"
    want = dlm.generate(model, prompts, config)
    model.config._attn_implementation = "sdpa"
    quick = packed(model)
    quick.kernels, quick.exact_rows = triton, False  # as on a GPU
    with patch.object(triton, "place", side_effect=triton.place) as place:
        got = dlm.generate(model, prompts, config)
    assert packed(model) is quick and place.call_count > 0 and got.sequences.tolist() == want.sequences.tolist()

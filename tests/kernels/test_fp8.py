"""Linear layers in float8: what rounding costs, and that no token depends on another.

With a GPU that has the product, the same tests run on it. Shapes: N tokens, K inputs, O outputs.
"""

import math

import pytest
import torch
from torch import nn

from dlm.kernels import fp8
from dlm.kernels.fp8 import Float8, quantise
from tests.helpers.toys import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed=0, spread=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread
    return values.to(DEVICE, torch.bfloat16)


def layer(weight, bias=None):
    """The linear layer in float8."""
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=DEVICE, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return Float8.from_linear(linear)


def exact(x, weight, bias=None):
    out = x.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


def error(got, want):
    """The root mean square of the difference, in parts of the values'."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def test_by_hand():
    """Row 0 is divided by 2, row 1 by 1/4. Above 256 float8 has multiples of 32, from 16 to 32 of 2, 25 to even."""
    x = torch.tensor([[896.0, -50.0, 600.0, 0.0], [112.0, 0.25, -6.0, 75.0]], device=DEVICE)
    numbers, scale = quantise(x)
    assert scale.tolist() == [[2.0], [0.25]]
    assert numbers.float().tolist() == [[448.0, -24.0, 288.0, 0.0], [448.0, 1.0, -24.0, 288.0]]


def test_the_error_of_a_number():
    """Three bits of mantissa: within 1/16 of each number down to 2^-6, then within 2^-10 (times the scale)."""
    x = torch.linspace(-1, 1, 4001, device=DEVICE)[None] ** 5
    numbers, scale = quantise(x)
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)
    assert ((numbers.float() * scale - x).abs() <= bound).all()


def test_zeros_and_what_is_no_number():
    x = torch.zeros(4, 8, device=DEVICE)
    x[1, 2], x[2, 3], x[3, 1] = math.nan, math.inf, -3e38
    numbers, scale = quantise(x)
    assert (numbers[0].float() == 0).all() and (scale > 0)[[0, 3]].all()
    assert numbers[1].float().isnan().any() and numbers[2].float().isnan().any()
    assert (numbers[3].float() * scale[3]).tolist() == pytest.approx([0, -3e38, *[0] * 6])


@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e30])
def test_a_product_is_near(spread, measured):
    """Two relative errors of up to 1/16, evenly spread below it, add up over K like a random walk: about 4%."""
    x, weight = random(50, 512, spread=spread), random(96, 512, seed=1, spread=0.02)
    found = layer(weight)(x)
    assert found.dtype == torch.bfloat16 and found.shape == (50, 96)
    measured(f"float8 product at scale {spread:g}: error", error(found, exact(x, weight)), 0.045)


def test_outputs_have_scales_of_their_own():
    """A large output or token does not cost a small one its digits."""
    x, weight = random(8, 256), random(32, 256, seed=1)
    x[3], weight[5] = 1e4 * x[3], 1e-4 * weight[5]
    found, want = layer(weight)(x), exact(x, weight)
    assert error(found[0], want[0]) < 0.06 and error(found[:, 5], want[:, 5]) < 0.06
    for row in range(8):
        assert abs(found[row, 5].double() - want[row, 5]) < 0.2 * want[row].abs().max() * 1e-4


def test_bias_layers_and_residual():
    x, one, two = random(2, 3, 64), random(32, 64, seed=1), random(16, 64, seed=2)
    biases = [random(32, seed=3, spread=9), random(16, seed=4, spread=9)]
    apart = [layer(w, b) for w, b in zip((one, two), biases, strict=True)]
    joined = Float8.of(*([getattr(part, name) for part in apart] for name in ("weight", "scale", "bias")))
    assert joined.weight.dtype == torch.float8_e4m3fn and joined.weight.nbytes == 48 * 64
    found = joined(x)
    assert found.shape == (2, 3, 48)
    torch.testing.assert_close(found, torch.cat([linear(x) for linear in apart], dim=-1))
    assert error(found, exact(x, torch.cat([one, two]), torch.cat(biases))) < 0.03
    residual = random(2, 3, 48, seed=5)
    assert torch.equal(joined.plus(x, residual), residual + found)
    assert torch.equal(joined(x.float()), found.float())  # what bf16 holds, in the type that was given


def test_a_token_does_not_depend_on_the_others():
    x, weight = random(6, 128), random(32, 128, seed=1)
    linear = layer(weight)
    before = linear(x)
    x[1:], x[3, 7] = 1e6 * random(5, 128, seed=2), math.nan
    after = linear(x)
    assert torch.equal(before[0], after[0])
    assert after[3].isnan().all() and not after[[0, 1, 2, 4, 5]].isnan().any()


def test_no_tokens():
    assert layer(random(32, 64))(random(2, 0, 64)).shape == (2, 0, 32)


def test_sizes_that_a_gpu_cannot_take():
    with pytest.raises(ValueError, match=r"48 to 40 wide.*multiples of 16.*bfloat16"):
        layer(random(40, 48))


def test_the_product_is_what_is_emulated(monkeypatch):
    """torch's own scaled product, which a CPU has too, from the same arguments: apart by one rounding to bf16."""
    x, weight, bias = random(20, 256), random(48, 256, seed=1), random(48, seed=2)
    linear = layer(weight, bias)
    results = []
    for use in (False, True):
        monkeypatch.setattr(fp8, "has_kernel", lambda device, use=use: use)
        results.append(linear(x))
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("with_bias", [False, True])
def test_sizes_that_are_refused_a_scale_a_row(monkeypatch, with_bias):
    """As cuBLASLt does of few rows (pytorch issues 192707, ao 4582): scales come afterwards, asked once a size."""
    x, weight = random(17, 256), random(48, 256, seed=1)
    x[3] *= 1e4
    linear = layer(weight, random(48, seed=2) if with_bias else None)
    want, scaled_mm, asked = linear(x), torch._scaled_mm, []

    def refusing(*inputs, scale_a, **more):
        asked.append(scale_a.numel())
        if scale_a.numel() > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmulAlgoGetHeuristic")
        return scaled_mm(*inputs, scale_a=scale_a, **more)

    monkeypatch.setattr(fp8, "has_kernel", lambda device: True)
    monkeypatch.setattr(fp8, "REFUSED", set())
    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    for _ in range(2):
        torch.testing.assert_close(linear(x), want, rtol=2**-7, atol=0.05)
    assert asked == [17, 1, 1]


@torch.no_grad()
def test_a_model_predicts_nearly_the_same(measured):
    """All linear layers of the blocks: the logits keep their direction."""
    model = tiny_model(1, dtype=torch.bfloat16, sharp=1.0, embedding_size=48).to(DEVICE)
    tokens = torch.randint(0, 39, (4, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = model.predict(tokens).double()
    for block in model.model.transformer.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, Float8.from_linear(linear))
    measured("float8 weights of a tiny model: error of the logits", error(model.predict(tokens), want), 0.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_cpu_has_no_kernel():
    assert not fp8.has_kernel(torch.device("cpu"))
    assert "H100" in fp8.refusal(torch.device("cpu")) and "not cpu" in fp8.refusal(torch.device("cpu"))

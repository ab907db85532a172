"""The loss in chunks of places: the plain one's value and gradients, and no logits of all places at once."""

import math

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlm.data.examples import fetch
from dlm.models.head import WHOLE, Head, Targets, loss_chunk, weighted_cross_entropy, weighted_sum
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import NoiseSettings, draw_noise
from dlm.training.accelerator import checkpoint_activations
from dlm.training.lora import add_lora
from tests.helpers.ranks import MASK, settings, tiny_data
from tests.helpers.toys import tiny_model as toy
from tests.helpers.training import fresh_accelerate, train, weights

assert fresh_accelerate  # a fixture for every test here

HEADS = {
    "tied": {"weight_tying": True},
    "untied": {},
    "biases": {"include_bias": True},
    "scaled, tied": {"weight_tying": True, "scale_logits": True},
    "scaled, biases": {"include_bias": True, "scale_logits": True},
}


def model_of(**changes):
    return toy(dtype=torch.float32, **changes).train()


def drawn(objective):
    """A packed batch of nine examples, and its noise: weights L / l of all sizes."""
    block = 4 if objective == "block_diffusion" else None
    keys = [(0, index) for index in range(9)]
    batch = fetch(tiny_data(), [keys[:5], keys[5:]], 22, width=64)
    return batch, draw_noise(batch, NoiseSettings(block_length=block), seed=0)


def gradients(model, objective, chunk, autocast=False):
    """(loss, every parameter's gradient by name) of a loss that is scaled as the trainer's is."""
    batch, noise = drawn(objective)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = OBJECTIVES[objective].loss(model, batch, noise, MASK, chunk)
    (loss.total * 0.125).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss, found


def apart(plain, chunked):
    """Greatest difference of two gradients of a model, in parts of the greatest entry of each parameter's."""
    assert plain.keys() == chunked.keys() and all(one.abs().max() > 0 for one in plain.values())
    return max(float((one - chunked[name]).abs().max() / one.abs().max()) for name, one in plain.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
def test_chunks_have_the_loss_and_the_gradients_of_all_at_once(measured, head, objective):
    model = model_of(**HEADS[head])
    plain, expected = gradients(model, objective, None)
    for chunk in (1, 7, 10_000):
        found, gradient = gradients(model, objective, chunk)
        assert found.total.dtype == torch.float32 and not found.ce.requires_grad
        assert torch.allclose(found.ce, plain.ce, atol=1e-5) and len(plain.ce) > 30
        assert torch.allclose(found.examples, plain.examples, rtol=1e-5) and found.count == plain.count
        assert float(found.total.detach()) == pytest.approx(float(plain.total.detach()), rel=1e-6)
        measured(f"gradient, chunks of {chunk}: {head}, {objective}", apart(expected, gradient), 5e-6)


@pytest.mark.parametrize("head", ["tied", "biases"])
def test_under_autocast_they_differ_by_roundings_of_bf16(measured, head):
    """A sum over chunks in fp32 is rounded once less than one product in bf16."""
    model = model_of(**HEADS[head])
    plain, expected = gradients(model, "diffusion", None, autocast=True)
    found, gradient = gradients(model, "diffusion", 7, autocast=True)
    assert torch.equal(found.ce, plain.ce)
    measured(f"gradient in bf16, chunks: {head}", apart(expected, gradient), 2**-7)
    fine, exact = gradients(model, "diffusion", None)
    assert not torch.equal(fine.ce, found.ce) and apart(exact, expected) > 0  # it did run in bf16


def test_weights_in_bf16():
    """As FSDP2 gives them to the forward pass: gradients of the same type."""
    model = model_of(include_bias=True).bfloat16()
    _, expected = gradients(model, "diffusion", None)
    _, gradient = gradients(model, "diffusion", 7)
    assert all(one.dtype == torch.bfloat16 for one in gradient.values()) and apart(expected, gradient) < 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_activation_checkpointing_too(measured, objective):
    model = model_of()
    _, expected = gradients(model, objective, None)
    checkpoint_activations(model)
    _, gradient = gradients(model, objective, 7)
    measured(f"gradient, chunks and activation checkpointing: {objective}", apart(expected, gradient), 5e-6)


def test_by_hand():
    """Two places with logits (0, 0) and (log 3, 0): cross entropies log 2 and log 4, weights 3 and 2."""
    x = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    head = Head(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    total, ce = head(x, Targets(torch.tensor([0, 1]), torch.tensor([3.0, 2.0]), 1))
    assert ce.tolist() == pytest.approx([math.log(2), math.log(4)]) and float(total.detach()) == pytest.approx(
        7 * math.log(2)
    )
    (total / 2).backward()
    want = [[3 * (0.5 - 1), 3 * 0.5], [2 * 0.75, 2 * (0.25 - 1)]]
    assert torch.allclose(x.grad, torch.tensor(want) / 2)
    assert torch.allclose(head.weight.grad, torch.tensor(want).T @ x.detach() / 2)
    with pytest.raises(RuntimeError):
        total.backward()  # its gradients were scaled in place


class Largest(TorchDispatchMode):
    """Sizes of the tensors that any operation within makes."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)}
        return made


@pytest.mark.parametrize(("tied", "trained"), [(True, True), (False, True), (False, False)])
def test_no_tensor_holds_the_logits_of_all_places(tied, trained):
    """Forward and backward: nothing larger than a chunk's logits or the table; with frozen weights no such table."""
    vocabulary, width, chunk = 4096, 32, 8
    model = model_of(vocab_size=vocabulary, embedding_size=vocabulary, weight_tying=tied)
    if not trained:
        model.get_output_embeddings().weight.requires_grad_(False)
    table = vocabulary * width
    batch, noise = drawn("diffusion")
    places = int(noise.masked.sum())
    assert places * vocabulary > table > chunk * vocabulary
    sizes = {}
    for name, given in (("plain", None), ("chunks", chunk)):
        with Largest() as seen:
            OBJECTIVES["diffusion"].loss(model, batch, noise, MASK, given).total.backward()
        sizes[name] = max(seen.sizes)
    assert sizes["plain"] == places * vocabulary and sizes["chunks"] == table


def test_frozen_weights_have_no_gradient_and_without_gradients_none_is_computed():
    model = model_of()
    model.requires_grad_(False)
    model.model.transformer.blocks[0].q_proj.weight.requires_grad_()
    _, expected = gradients(model, "diffusion", None)
    _, found = gradients(model, "diffusion", 7)
    expected, found = ({n: one for n, one in g.items() if one is not None} for g in (expected, found))
    assert list(found) == ["model.transformer.blocks.0.q_proj.weight"] and apart(expected, found) < 5e-6
    batch, noise = drawn("diffusion")
    with torch.no_grad(), Largest() as seen:
        loss = OBJECTIVES["diffusion"].loss(model, batch, noise, MASK, 7)
    assert not loss.total.requires_grad and seen.sizes


def test_no_places_give_no_loss_and_a_gradient_of_zero():
    head, x = Head(4, 6), torch.zeros(0, 4, requires_grad=True)
    total, ce = head(x, Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0), 3))
    total.backward()
    assert float(total.detach()) == 0 and ce.shape == (0,) and x.grad.shape == (0, 4)
    assert not head.weight.grad.any() and not head.bias.grad.any()  # there is one, for the processes that wait for it


def test_a_replaced_head_gives_its_logits():
    """An adapter around the projection, or a quantised one, is not gone around."""
    model = model_of()
    _, expected = gradients(model, "diffusion", 7)
    model.model.transformer["ff_out"] = torch.nn.Sequential(model.model.transformer.ff_out)
    _, found = gradients(model, "diffusion", 7)
    assert apart(dict(enumerate(expected.values())), dict(enumerate(found.values()))) < 2e-5


def test_through_adapters():
    """PEFT passes the targets on; the head has none, and no gradient."""
    pytest.importorskip("peft")
    model = add_lora(model_of(), 2, 4.0, ("q_proj", "ff_out"), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, which would keep every gradient of the other half at zero
            torch.nn.init.normal_(parameter.data, std=0.1)
    (_, expected), (_, found) = (gradients(model, "diffusion", chunk) for chunk in (None, 7))
    expected, found = ({n: one for n, one in g.items() if one is not None} for g in (expected, found))
    assert len(found) == 2 * 2 * 2 and all("lora" in name for name in found) and apart(expected, found) < 5e-6


def test_every_form_of_places():
    """Indices (B, M) and all places (B, Q), in row order."""
    model, tokens = model_of(), torch.arange(10).view(2, 5)
    for keep in (None, torch.tensor([[0, 3], [4, 1]])):
        logits = model.predict(tokens, logits_to_keep=keep).flatten(0, 1)
        truth, weight = torch.arange(len(logits)), torch.rand(len(logits))
        found = model.predict(tokens, logits_to_keep=keep, targets=Targets(truth, weight, 3))
        for one, other in zip(found, weighted_sum(logits, truth, weight), strict=True):
            assert torch.allclose(one, other, rtol=1e-5)


def test_fsdp_does_not_round_the_weights():
    """It casts every fp32 tensor among the inputs of a sharded module, in tuples and dataclasses too, to bf16."""
    targets = Targets(torch.tensor([1]), torch.tensor([1.001]), 1)
    given = _apply_to_tensors(lambda tensor: tensor.bfloat16(), {"targets": targets})
    assert given["targets"].weight.dtype == torch.float32


def test_fp16_is_refused():
    x, targets = torch.ones(1, 4, requires_grad=True), Targets(torch.tensor([1]), torch.ones(1), 1)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="use bf16"):
        weighted_cross_entropy(x, torch.ones(3, 4), None, targets)


# ---------------------------------------------------------------- the setting


def test_when_logits_are_worth_a_chunk(tmp_path):
    assert loss_chunk(32 * 256, 8192) is None and WHOLE == 2**27
    assert loss_chunk(8 * 2048, 126_464) == 1061 and loss_chunk(10, WHOLE) == 1
    given = {value: settings(tmp_path, loss_chunk=value).chunk(8 * 2048, 126_464) for value in (None, 0, 64)}
    assert given == {None: 1061, 0: None, 64: 64}
    half = settings(tmp_path, precision="fp16", optimizer="adamw")
    assert half.chunk(8 * 2048, 126_464) is None
    for changes in ({"loss_chunk": -1}, {"loss_chunk": 8, "precision": "fp16", "optimizer": "adamw"}):
        with pytest.raises(ValueError, match=r"loss_chunk (is )?-?\d"):
            settings(tmp_path, **changes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_in_chunks_has_the_same_weights(tmp_path, measured, monkeypatch, objective):
    """Accumulated, with a moving average and validation: as without."""
    asked = []
    monkeypatch.setattr(Targets, "__init__", _noting(Targets.__init__, asked))
    changes = {"objective": objective, "accumulation": 2, "valid": tiny_data(seed=1), "valid_every": 3, "max_steps": 3}
    if objective == "block_diffusion":
        changes["block_length"] = 4
    plain, first = train(tmp_path / "plain", optimizer="adamw", **changes)
    assert not asked
    chunked, second = train(tmp_path / "chunked", optimizer="adamw", loss_chunk=5, **changes)
    assert set(asked) == {5} and len(asked) > 6  # validation too
    measured(f"weights, a run in chunks: {objective}", (weights(plain) - weights(chunked)).abs().max(), 1e-4)
    assert second.validation.bound == pytest.approx(first.validation.bound, rel=1e-5)


def _noting(inner, asked):
    def init(self, tokens, weight, chunk):
        asked.append(chunk)
        inner(self, tokens, weight, chunk)

    return init

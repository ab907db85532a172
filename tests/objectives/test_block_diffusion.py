"""Block diffusion: what is visible by hand, one forward against one a block, and blocks of one token."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import dlm
from dlm.checkpoints import save
from dlm.data.examples import Example, pack
from dlm.models.attention import block_causal
from dlm.models.attention import block_diffusion as visibility
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.objectives.losses import block_diffusion, masked_diffusion
from dlm.objectives.noise import NoiseSettings, draw_noise
from dlm.training.config import TrainingConfig
from dlm.training.trainer import fit
from dlm.training.validation import validate
from tests.helpers.ranks import settings, tiny_data

VOCAB, MASK = 24, 23


def tiny_model():
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=VOCAB, max_sequence_length=64,
        weight_tying=True, mask_token_id=MASK, eos_token_id=22, pad_token_id=22, init_fn="normal", init_std=0.3,
    )  # fmt: skip
    return LLaDAModelLM(config)


def packed(sizes=(5, 7, 3, 9), length=24):
    random = np.random.default_rng(0)
    made = [Example(random.integers(0, 20, n), np.arange(n) > 0, i) for i, n in enumerate(sizes)]
    return made, pack([[(0, example) for example in made]], length, 22)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_visibility_by_hand():
    """Two documents of three and one tokens, blocks of two: rows of 4 slots, so x_0 stands in slots 4 to 7."""
    segments, positions = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 1, 2, 0]])
    slots = torch.arange(8)
    seen = visibility(segments, positions, 2)(torch.zeros(1, 1, dtype=torch.long), slots[:, None], slots[None, :])
    assert seen.int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],  # x_t, first block: itself alone
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 1, 1, 0, 0],  # second block: itself, and the first one clean
        [0, 0, 0, 1, 0, 0, 0, 0],  # the other document
        [0, 0, 0, 0, 1, 1, 0, 0],  # x_0: blocks up to its own, clean
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def one_forward_a_block(model, examples, batch, noise, block_length):
    """The same bound, slowly: each block alone at the end of a row of clean blocks, under `block_causal`."""
    total = 0.0
    for number, example in enumerate(examples):
        own = batch.segments[0] == number
        masked, weight = noise.masked[0, own], noise.weight[0, own]
        tokens = torch.from_numpy(example.tokens)
        for start in range(0, len(tokens), block_length):
            end = min(start + block_length, len(tokens))
            row = tokens[:end].clone()
            row[start:][masked[start:end]] = MASK
            logits = model.predict(row[None], visible=block_causal(block_length))[0]
            ce = F.cross_entropy(logits[start:].double(), tokens[start:end], reduction="none")
            total = total + (ce * weight[start:end])[masked[start:end]].sum()
    return total


@pytest.mark.parametrize("block_length", [1, 2, 4, 16])
@pytest.mark.parametrize("estimator", ["count", "uniform"])
def test_one_forward_equals_one_forward_a_block(block_length, estimator):
    examples, batch = packed()
    noise = draw_noise(batch, NoiseSettings(estimator, block_length=block_length), seed=4)
    model = tiny_model().double()
    loss = block_diffusion(model, batch, noise, MASK)
    loss.total.backward()
    fast = gradient(model)
    model.zero_grad()
    slow = one_forward_a_block(model, examples, batch, noise, block_length)
    slow.backward()
    # the weights and the softmax are fp32, so the sums agree to that
    assert float(loss.total.detach()) == pytest.approx(float(slow.detach()), rel=1e-6)
    assert (fast - gradient(model)).abs().max() < 1e-5 * fast.abs().max()
    assert loss.count == int(batch.target.sum()) and float(loss.total.detach()) > 1


def test_blocks_of_one_token_are_the_autoregressive_loss():
    """With one token a block, all masked, each is predicted from all before it: -log p(x) of a left-to-right model."""
    examples, batch = packed()
    noise = draw_noise(batch, NoiseSettings("count", block_length=1), seed=0)
    assert torch.equal(noise.masked, batch.target) and torch.equal(noise.weight, batch.target.float())
    model = tiny_model().double()
    nll = 0.0
    with torch.no_grad():
        for example in examples:
            tokens = torch.from_numpy(example.tokens)
            for place in range(1, len(tokens)):
                row = torch.cat([tokens[:place], torch.tensor([MASK])])
                nll -= float(model.predict(row[None], visible=block_causal(1))[0, -1].log_softmax(-1)[tokens[place]])
        loss = block_diffusion(model, batch, noise, MASK)
    assert float(loss.total) == pytest.approx(nll, rel=1e-6)


def test_one_block_over_all_is_masked_diffusion():
    _, batch = packed()
    model = tiny_model().double()
    blocks = draw_noise(batch, NoiseSettings("count", block_length=64), seed=2)
    whole = draw_noise(batch, "count", seed=2)
    assert torch.equal(blocks.masked, whole.masked)
    with torch.no_grad():
        one, other = block_diffusion(model, batch, blocks, MASK), masked_diffusion(model, batch, whole, MASK)
    assert float(one.total) == pytest.approx(float(other.total), rel=1e-12)
    assert torch.equal(one.rate, other.rate) and torch.allclose(one.examples, other.examples)


def test_packed_equals_padded():
    examples, batch = packed()
    rows = pack([[(0, example)] for example in examples], 10, 22)
    found = []
    for layout in (batch, rows):
        model = tiny_model().double()
        noise = draw_noise(layout, NoiseSettings("count", block_length=4), seed=1)
        block_diffusion(model, layout, noise, MASK).total.backward()
        found.append(gradient(model))
    assert (found[0] - found[1]).abs().max() < 1e-6 * found[0].abs().max()


def test_the_rate_of_a_token_is_its_blocks():
    _, batch = packed()
    noise = draw_noise(batch, NoiseSettings("count", block_length=4), seed=1)
    loss = block_diffusion(tiny_model().double(), batch, noise, MASK)
    units = noise.units[noise.masked]
    for unit in units.unique():
        members = (noise.units == unit) & batch.target
        rate = float(noise.masked[members].float().mean())
        assert loss.rate[units == unit].tolist() == pytest.approx([rate] * int((units == unit).sum()))


def test_a_full_attention_model_becomes_a_block_model(tmp_path):
    """Trained under clipped rates, with the whole bound in the validation; the folder says the block length."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = tiny_model()
    assert model.config.block_length is None
    config = settings(
        tmp_path / "run", objective="block_diffusion", block_length=4, estimator="uniform", lowest_rate=0.4,
        highest_rate=0.9, valid_every=6,
    )  # fmt: skip
    lines = []
    result = fit(model, None, tiny_data(), tiny_data(seed=1), config, mask_id=MASK, report=lines.append)
    save.save_model(model, tmp_path / "model", weights=result.ema)
    model, _ = dlm.load(tmp_path / "model", device="cpu")
    assert model.config.block_length == 4
    out = dlm.generate(model, [[21, 3, 4]], dlm.SamplingConfig(gen_length=8, method="block_causal"))
    assert out.sequences.shape == (1, 8)
    # clipped training draws no rate above 0.9, the validation does: what is logged is the bound over all rates
    assert result.validation.buckets[-1] is not None
    again = {"objective": "block_diffusion", "mask_id": MASK, "pad_id": 22, "seed": 0, "micro_batch": 4}
    whole, clipped = (
        validate(model.eval(), tiny_data(seed=1), Accelerator(), estimator=noise, **again)
        for noise in (NoiseSettings("count", block_length=4), config.noise())
    )
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    [logged] = [record for record in records if record["kind"] == "valid"]
    assert logged["bound"] == pytest.approx(whole.bound, rel=1e-6)
    assert abs(logged["bound"] - clipped.bound) > 1e-3


def test_block_length_and_objective_belong_together():
    for changes in ({"objective": "block_diffusion"}, {"block_length": 4}):
        with pytest.raises(ValueError, match="give a block_length with objective block_diffusion"):
            TrainingConfig(output=".", max_steps=1, **changes)

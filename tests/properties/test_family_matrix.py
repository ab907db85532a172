"""What every family can do: the same model and the same loop, so the same tests, a cell of the table each."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dlm
from dlm.checkpoints.inspect import describe
from dlm.data.examples import Batch
from dlm.models.families import family_of
from dlm.models.predictor import guess_places
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import NoiseSettings, draw_noise
from tests.helpers import families

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
RECORDED = sorted(folder.name for folder in FOLDER.iterdir())
MASK = 298
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MADE = {  # families without recorded cases: random weights
    "illada": {"model_type": "illada", "tie_word_embeddings": True},
    "sdar_moe": {"model_type": "sdar_moe", "head_dim": 8, "block_size": 4, **MOE},
    "a2d_smollm3": {"model_type": "a2d-smollm3", "no_rope_layers": [1, 0], "block_length": 4},
}
NAMES = [*RECORDED, *MADE]
PROMPTS = [[5, 17, 33, 2, 9, 41, 7], [8, 3], [100, 20, 31, 77, 6, 1, 90, 12, 44, 61]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made, root = {name: FOLDER / name for name in RECORDED}, tmp_path_factory.mktemp("families")
    for name, fields in MADE.items():
        families.checkpoint(root / name, {**families.BASE, "vocab_size": 300, "mask_token_id": MASK, **fields})
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def models(folders):
    found = {}
    for name in NAMES:
        found[name] = dlm.load(folders[name], dtype="float64")[0]
        found[name].config.mask_token_id = MASK
        if found[name].config.block_length is not None:
            found[name].config.block_length = 4
    return found


def settings(model, **changes):
    own = {key: value for key, value in family_of(model).sampling.items() if key not in ("stop_at_eos", "temperature")}
    if "sub_block_length" in own:
        own["sub_block_length"] = 2
    if own.get("block_length", 0) > 64:
        own["block_length"] = 64
    return dlm.SamplingConfig(**{**own, "gen_length": 11, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_equals_its_rows(models, name):
    model, config = models[name], settings(models[name])
    together = dlm.generate(model, PROMPTS, config)
    assert together.sequences.shape == (3, 11) and not (together.sequences == MASK).any()
    for row, prompt in enumerate(PROMPTS):
        alone = dlm.generate(model, [prompt], config)
        assert alone.sequences[0].tolist() == together.sequences[row].tolist()
        assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_cache_equals_none(models, name):
    """Block-causal keys are final once a block is; a full-attention family under method block_causal alike."""
    model = models[name]
    if "block_causal" not in dlm.sampling.methods.methods_for(model.config):
        pytest.skip("full attention: its caches are approximate, and the recorded cases hold them to the authors'")
    changes = {"commit_first": False, "sub_block_length": None, "block_length": 4}
    cached = dlm.generate(model, PROMPTS, settings(model, method="block_causal", **changes))
    if model.config.block_length is None:
        model.config.block_length = 4
        plain = dlm.generate(model, PROMPTS, settings(model, method="none", **changes))
        model.config.block_length = None
    else:
        plain = dlm.generate(model, PROMPTS, settings(model, method="none", **changes))
    assert cached.sequences.tolist() == plain.sequences.tolist()
    assert (cached.positions_computed < plain.positions_computed).all()


@pytest.mark.parametrize("name", NAMES)
def test_infilling_keeps_what_is_given(models, name):
    template = [5, 17, MASK, MASK, 33, MASK, 2, 9, 41, MASK, MASK, 7, 8]
    canvas = dlm.Canvas.from_templates([template], MASK)
    out = dlm.generate(models[name], canvas, settings(models[name], grow="none"))  # iLLaDA grows prompts alone
    tokens = out.canvas.tokens[0, : len(template)].tolist()
    assert MASK not in tokens
    assert all(got == given for got, given in zip(tokens, template, strict=True) if given != MASK)


def batch_of(rows):
    tokens = torch.tensor(rows)
    count, length = tokens.shape
    return Batch(
        tokens=tokens,
        target=torch.ones_like(tokens, dtype=torch.bool),
        segments=torch.arange(count)[:, None].expand(count, length).contiguous(),
        positions=torch.arange(length).expand(count, length).contiguous(),
        index=torch.arange(count),
        epoch=torch.zeros(count, dtype=torch.int64),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_of_the_guess_for_each_place_and_training_lowers_it(models, name):
    """The objective's cross entropies against those of the raw logits, shifted by hand; then three steps of SGD."""
    model = models[name]
    config = model.config
    rows = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(1)).tolist()
    batch, blocks = batch_of(rows), config.block_length
    noise = draw_noise(batch, NoiseSettings(block_length=blocks) if blocks else NoiseSettings(), seed=0)
    objective = OBJECTIVES[config.objective]
    loss = objective.loss(model, batch, noise, MASK)
    xt, number = torch.where(noise.masked, MASK, batch.tokens), 0
    for row in range(2):
        for slot in noise.scored[row].nonzero()[:, 0].tolist():
            seen = xt[row].clone()
            if blocks:
                seen[: slot // blocks * blocks] = batch.tokens[row, : slot // blocks * blocks]
            with torch.no_grad():
                logits = model.predict(seen[None])[0, max(slot - 1, 0) if config.shift_logits else slot]
            want = F.cross_entropy(logits[None], batch.tokens[row, slot, None])
            assert abs(float(loss.ce[number]) - float(want)) < 1e-4, (row, slot)
            number += 1
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    losses = []
    for _ in range(3):
        total = objective.loss(model, batch, noise, MASK).total
        losses.append(total.item())
        model.zero_grad()
        total.backward()
        # not the embeddings: that of the mask is zero in the folders with tied weights, where a norm has no slope
        moved = [weight for key, weight in model.named_parameters() if weight.grad is not None and "wte" not in key]
        norm = sum(weight.grad.square().sum() for weight in moved).sqrt()
        with torch.no_grad():
            for weight in moved:
                weight -= 1e-4 * weight.grad / norm
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", NAMES)
def test_where_the_guess_for_a_place_stands(models, name):
    scored = torch.tensor([[True, True, False, True]])
    places = guess_places(models[name], scored, torch.arange(4)[None])
    assert places.tolist() == ([0, 0, 2] if models[name].config.shift_logits else scored.tolist())
    two = guess_places(models[name], scored, torch.arange(4)[None], block_length=3)  # of [x_t ; x_0]
    assert two.tolist() == ([0, 0, 6] if models[name].config.shift_logits else [[*scored[0].tolist(), *[False] * 4]])


@pytest.mark.parametrize("name", NAMES)
def test_info_and_the_authors_defaults(folders, name):
    facts = describe(folders[name])
    opened = dlm.load_pretrained(folders[name])
    assert facts["layers"] == opened.config.n_layers and facts["heads"] == 4
    dlm.SamplingConfig(**opened.defaults)
    assert "stop_at_eos" not in opened.defaults or opened.has_end
    assert opened.predictor is not None


@pytest.mark.parametrize("name", ["dream", "llada2", "a2d_qwen2"])
def test_lora(models, name):
    peft = pytest.importorskip("peft")
    model, _ = dlm.load(FOLDER / name)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    batch = batch_of([[1, 2, 3, 4, 5, 6, 7, 8]])
    blocks = model.config.block_length
    noise = draw_noise(batch, NoiseSettings(block_length=blocks) if blocks else NoiseSettings(), seed=0)
    OBJECTIVES[model.config.objective].loss(adapted, batch, noise, MASK).total.backward()
    trained = [key for key, weight in adapted.named_parameters() if weight.grad is not None]
    assert trained and all("lora" in key for key in trained)

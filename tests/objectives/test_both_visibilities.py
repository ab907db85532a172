"""One network under both visibilities: it samples and scores as a model of either kind with its weights would."""

import json

import pytest
import torch

from dlm.checkpoints.generation import generate
from dlm.models.attention import full
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.objectives.exact import exact_bound
from dlm.objectives.likelihood import LikelihoodConfig, answer, bound
from dlm.sampling.config import SamplingConfig
from dlm.sampling.methods import METHODS, methods_for

MASK = 19


def model(**changes):
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=20, max_sequence_length=64, weight_tying=True,
        mask_token_id=MASK, eos_token_id=18, pad_token_id=18, init_fn="normal", init_std=0.3, **changes,
    )  # fmt: skip
    return LLaDAModelLM(config).double().eval()


BOTH = {"block_length": 4, "full_attention": True}


def test_the_configuration_says_it_and_keeps_it(tmp_path):
    model(**BOTH).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["full_attention"] is True and fields["objective"] == "block_diffusion" and fields["block_length"] == 4
    config = LLaDAConfig.from_pretrained(tmp_path)
    assert config.full_attention and config.attention == "full" and methods_for(config) == list(METHODS)
    assert "full_attention" not in LLaDAConfig(block_length=4).to_diff_dict()


def test_it_belongs_beside_a_block_length():
    with pytest.raises(ValueError, match="block_length"):
        LLaDAConfig(full_attention=True)


def test_without_a_rule_it_sees_everything():
    tokens = torch.arange(12)[None]
    both = model(**BOTH)
    assert torch.equal(both.predict(tokens), both.predict(tokens, visible=full))


@pytest.mark.parametrize(("method", "other"), [("none", {}), ("dual", {}), ("block_causal", {"block_length": 4})])
def test_it_samples_as_a_model_of_either_kind(method, other):
    block_length = None if other else 3
    config = SamplingConfig(gen_length=10, method=method, block_length=block_length, temperature=1.0, seed=3)
    found = [generate(one, [[1, 2, 3]], config).sequences for one in (model(**BOTH), model(**other))]
    assert torch.equal(*found)


def test_its_blocks_are_those_it_was_trained_with():
    with pytest.raises(ValueError, match="trained with blocks of 4"):
        generate(model(**BOTH), [[1, 2]], SamplingConfig(gen_length=8, method="block_causal", block_length=8))


@pytest.mark.parametrize(("visibility", "other"), [(None, {}), ("full", {}), ("block_causal", {"block_length": 4})])
@pytest.mark.parametrize("estimator", ["count", "chain", "block"])
def test_it_scores_as_a_model_of_either_kind(visibility, other, estimator):
    text = [answer([1, 2], [3, 4, 5, 6, 7, 8, 9])]
    found = bound(model(**BOTH), text, LikelihoodConfig(estimator, 4, visibility=visibility), mask_id=MASK)
    plain = bound(model(**other), text, LikelihoodConfig(estimator, 4), mask_id=MASK)
    assert found[0].nats == pytest.approx(plain[0].nats, rel=1e-12)


def test_a_visibility_that_was_not_trained_is_refused():
    with pytest.raises(ValueError, match="trained under 'full' alone"):
        bound(model(), [answer([1], [2, 3])], LikelihoodConfig(visibility="block_causal"), mask_id=MASK)
    with pytest.raises(ValueError, match="visibility"):
        LikelihoodConfig(visibility="causal")


def test_exact_scores_see_everything():
    text = answer([1, 2], [3, 4, 5, 6])
    found = [exact_bound(one, text, mask_id=MASK).nats for one in (model(**BOTH), model())]
    assert found[0] == pytest.approx(found[1], rel=1e-12)

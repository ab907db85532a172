"""When a row ends: `stop_at_eos` saves passes and changes nothing before the end."""

import dataclasses

import pytest
import torch

from dlm import Canvas, SamplingConfig, generate
from tests.helpers.toys import Probabilities, Table, tiny_model

EOS = 3


def region(*rows):
    """One prompt slot, then these probabilities of tokens 0 1 2 and end of text; the mask 4 has none."""
    return Probabilities([[0.2] * 5, *[[*row, 0.0] for row in rows]])


def test_a_row_ends_once_everything_before_its_end_is_there():
    # Surest first: place 3 (end), 1, 0, 2 (end), then nothing more is needed of 4 and 5.
    model = region(
        [0.7, 0.3, 0, 0], [0, 0.8, 0.2, 0], [0.35, 0, 0, 0.65], [0, 0.05, 0, 0.95], [0.6, 0.4, 0, 0], [0, 0.4, 0.6, 0]
    )
    canvas = Canvas.from_prompts([[0]], 6, 4)
    options = {"gen_length": 6, "block_length": 6, "eos_token_id": EOS}
    without = generate(model, canvas, SamplingConfig(**options))
    assert without.sequences.tolist() == [[0, 1, EOS, EOS, 0, 2]]
    assert without.nfe.tolist() == [6]
    out = generate(model, canvas, SamplingConfig(**options, stop_at_eos=True))
    assert out.nfe.tolist() == [4]
    assert out.sequences[0, :3].tolist() == [0, 1, EOS]
    assert 4 not in out.sequences


def test_blocks_after_the_end_are_not_begun():
    model = region([0.7, 0.3, 0, 0], [0, 0, 0.1, 0.9], [0.6, 0.4, 0, 0], [0.6, 0.4, 0, 0])
    config = SamplingConfig(gen_length=4, block_length=2, eos_token_id=EOS, stop_at_eos=True)
    out = generate(model, Canvas.from_prompts([[0]], 4, 4), config)
    assert out.nfe.tolist() == [2]
    assert out.sequences[0, :2].tolist() == [0, EOS]
    assert out.tokens_per_forward.tolist() == [1.0]


def test_the_end_of_text_in_a_prompt_ends_nothing():
    model = region([0.7, 0.3, 0, 0], [0.6, 0.4, 0, 0])
    config = SamplingConfig(gen_length=2, block_length=2, eos_token_id=EOS, stop_at_eos=True)
    assert generate(model, Canvas.from_prompts([[EOS]], 2, 4), config).sequences.tolist() == [[0, 0]]


def test_stop_at_eos_without_an_end_of_text_is_refused():
    """Nothing says what the end of text is: neither the settings nor the predictor."""
    with pytest.raises(ValueError, match="eos_token_id"):
        config = SamplingConfig(gen_length=2, stop_at_eos=True)
        generate(Table(torch.zeros(1, 5)), Canvas.from_prompts([[0]], 2, 4), config)


def test_end_of_text_of_the_checkpoint_is_used_and_overridden():
    """38 in the config of the tiny model, unless the settings say otherwise."""
    model = tiny_model(0)
    with torch.no_grad():
        model.model.transformer.ff_out.weight.zero_()  # uniform: token 0 is always proposed, from left to right
    config = SamplingConfig(gen_length=4, block_length=2, stop_at_eos=True)
    assert generate(model, [[1]], config).nfe.tolist() == [4]
    assert generate(model, [[1]], dataclasses.replace(config, eos_token_id=0)).nfe.tolist() == [1]
    assert generate(model, [[1]], dataclasses.replace(config, eos_token_id=(5, 0))).nfe.tolist() == [1]
    model.config.eos_token_id = 0
    assert generate(model, [[1]], config).nfe.tolist() == [1]


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("commit", ["quota", "threshold"])
def test_early_end_changes_nothing_before_it(method, temperature, commit):
    model, fewer = tiny_model(3, vocab_size=12, embedding_size=12, mask_token_id=11, eos_token_id=5), 0
    for seed in range(12):
        options = {"gen_length": 12, "block_length": 4, "method": method, "temperature": temperature, "commit": commit}
        config = SamplingConfig(**options, threshold=0.5, seed=seed, eos_token_id=(5, 6))
        prompts = [[seed % 10, 1, 2], [3, seed % 7], [7]]
        full = generate(model, prompts, config)
        short = generate(model, prompts, dataclasses.replace(config, stop_at_eos=True))
        assert (short.nfe <= full.nfe).all()
        fewer += int((short.nfe < full.nfe).sum())
        for a, b in zip(full.sequences.tolist(), short.sequences.tolist(), strict=True):
            end = next((i for i, token in enumerate(a) if token in (5, 6)), len(a) - 1)
            assert a[: end + 1] == b[: end + 1]
            assert 11 not in b
    assert fewer > 0

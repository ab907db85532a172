"""What generate refuses, in one line that names the value: broken logits, prompts and canvases that do not fit."""

import dataclasses
import math

import pytest
import torch

from dlm import Canvas, SamplingConfig, generate
from tests.helpers.toys import MASK, VOCAB, BreaksAt, Predictor, tiny_model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("method", ["none", "dual", "c2f"])
def test_logits_that_are_not_numbers_name_the_pass(value, number, method):
    model = BreaksAt(5, number, value)
    config = SamplingConfig(gen_length=6, block_length=3, method=method)
    with pytest.raises((ValueError, ArithmeticError, RuntimeError), match=rf"(?i)pass {number}\b.*\b{value}\b"):
        generate(model, Canvas.from_prompts([[0]], 6, 4), config)
    assert len(model.calls) == number


def test_logits_that_are_not_numbers_at_a_temperature(value=math.nan):
    """A drawn token lay past a vocabulary that 64 does not divide: an IndexError in place of the reason."""
    config = SamplingConfig(gen_length=6, block_length=3, temperature=1.0)
    with pytest.raises(FloatingPointError, match="pass 2"):
        generate(BreaksAt(5, 2, value), Canvas.from_prompts([[0]], 6, 4), config)


def test_one_bad_row_is_an_error_too():
    class OneRow(Predictor):
        def logits(self, tokens, slots):
            out = torch.zeros(*slots.shape, 5)
            out[tokens[:, 0] == 2] = math.nan
            return out

    config = SamplingConfig(gen_length=2, block_length=2)
    with pytest.raises((ValueError, ArithmeticError, RuntimeError), match=r"(?i)nan"):
        generate(OneRow(), Canvas.from_prompts([[1], [2]], 2, 4), config)


def test_longer_than_the_model(tiny):
    with pytest.raises(ValueError, match="256") as error:
        generate(tiny, [[1] * 250], SamplingConfig(gen_length=7))
    assert "257" in str(error.value) or ("250" in str(error.value) and "7" in str(error.value))
    assert generate(tiny, [[1] * 250], SamplingConfig(gen_length=6, steps=1)).sequences.shape == (1, 6)


def test_prompt_that_holds_the_mask_token(tiny):
    with pytest.raises(ValueError, match="mask") as error:
        generate(tiny, [[1, MASK, 2]], SamplingConfig(gen_length=4))
    assert str(MASK) in str(error.value)


@pytest.mark.parametrize("token", [40, 1000, -1])
def test_prompt_with_an_id_the_model_does_not_have(tiny, token):
    for inputs in ([[1, token, 2]], Canvas.from_templates([[1, token, MASK]], MASK)):  # a canvas was an IndexError
        with pytest.raises(ValueError, match=str(token)):
            generate(tiny, inputs, SamplingConfig(gen_length=4))


@pytest.mark.parametrize("option", ["suppress_eos", "delay_eos", "stop_at_eos"])
def test_an_end_of_text_the_model_does_not_have(tiny, option):
    """It can never be proposed: either nothing changes, or one line says so."""
    config = SamplingConfig(gen_length=4, block_length=2, eos_token_id=1000)
    want = generate(tiny, [[1]], config).sequences
    try:
        assert torch.equal(generate(tiny, [[1]], dataclasses.replace(config, **{option: True})).sequences, want)
    except ValueError as error:
        assert "1000" in str(error)


@pytest.mark.parametrize("inputs", [[[1.5]], torch.tensor([[1.0]]), torch.zeros(1, 2, 3, dtype=torch.int64), [None]])
def test_what_is_no_prompt(tiny, inputs):
    with pytest.raises(ValueError, match="prompt 0"):
        generate(tiny, inputs, SamplingConfig(gen_length=4))


def test_no_rows(tiny):
    """A tensor of no rows was read as one empty prompt."""
    for nothing in ([], torch.zeros(0, 5, dtype=torch.int64), {"input_ids": torch.zeros(0, 5, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="at least one row"):
            generate(tiny, nothing, SamplingConfig(gen_length=4))
    with pytest.raises(ValueError, match="at least one row"):
        tiny.generate(torch.zeros(0, 5, dtype=torch.int64), gen_length=4)


@pytest.mark.parametrize("inputs", [None, 5, {1, 2}, iter([[1, 2]]), torch.tensor(3)])
def test_what_holds_no_prompts(tiny, inputs):
    with pytest.raises(ValueError, match="prompt"):
        generate(tiny, inputs, SamplingConfig(gen_length=4))


@pytest.mark.parametrize("grow", ["none", "confidence"])
def test_a_region_longer_than_the_model_is_refused_before_memory_is_taken(tiny, grow):
    """A gen_length of 10**12 ended in a MemoryError, or took what memory there was."""
    config = SamplingConfig(gen_length=10**12, grow=grow)
    for inputs in ([[1, 2]], Canvas.from_prompts([[1, 2]], 4, MASK)):
        if isinstance(inputs, list) or grow != "none":
            with pytest.raises(ValueError, match="max_sequence_length 256"):
                generate(tiny, inputs, config)


def test_the_autoregressive_twin_checks_its_settings_too():
    model = tiny_model(0, objective="autoregressive", embedding_size=48, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] *= 100  # rows past the vocabulary
    prompt = torch.tensor([[1, 2]])
    assert int(model.generate(prompt, gen_length=8, temperature=1.0).max()) < VOCAB
    for bad, message in (({"temperature": -1.0}, "temperature"), ({"gen_length": 0}, "gen_length"),
                         ({"gen_length": 255}, "max_sequence_length")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, **bad)


def test_an_empty_prompt_generates_from_nothing(tiny):
    out = generate(tiny, [[], [1, 2]], SamplingConfig(gen_length=4))
    assert out.sequences.shape == (2, 4)
    assert torch.equal(out.sequences[0], generate(tiny, [[]], SamplingConfig(gen_length=4)).sequences[0])


def test_block_causal_needs_a_block_causal_model(tiny):
    with pytest.raises(ValueError, match="block_causal"):
        generate(tiny, [[1]], SamplingConfig(gen_length=4, block_length=2, method="block_causal"))


def test_block_causal_needs_the_blocks_of_its_model():
    model = tiny_model(0, block_length=4)
    with pytest.raises(ValueError, match="block_length") as error:
        generate(model, [[1]], SamplingConfig(gen_length=8, block_length=2, method="block_causal"))
    assert "4" in str(error.value)


@pytest.mark.parametrize("method", ["prefix", "dual", "vicinity", "c2f"])
def test_caches_of_full_attention_on_a_block_causal_model_work_or_are_refused(method):
    model = tiny_model(0, block_length=4)
    try:
        out = generate(model, [[1, 2, 3, 4]], SamplingConfig(gen_length=8, block_length=4, method=method))
    except ValueError as error:
        assert "block_causal" in str(error)
    else:
        assert MASK not in out.sequences


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", ["none", "dual", "c2f"])
def test_fewer_passes_than_blocks(tiny, steps, method):
    config = SamplingConfig(gen_length=8, block_length=2, steps=steps, method=method)
    with pytest.raises(ValueError, match="steps") as error:
        generate(tiny, [[1, 2]], config)
    assert str(steps) in str(error.value)
    assert "4" in str(error.value)
    assert "block_length" in str(error.value)
    generate(tiny, [[1, 2]], dataclasses.replace(config, steps=4))


def test_other_commit_rules_do_not_read_steps(tiny):
    config = SamplingConfig(gen_length=8, block_length=2, steps=1, commit="threshold")
    assert generate(tiny, [[1, 2]], config).nfe.item() >= 4


def test_steps_of_a_template_do_not_depend_on_gen_length(tiny):
    """gen_length is not read where a canvas is given: three blanks in one block, two passes."""
    canvas = Canvas.from_templates([[1, MASK, 2, MASK, MASK]], MASK)
    assert generate(tiny, canvas, SamplingConfig(steps=2, block_length=8)).nfe.tolist() == [2]


def test_fewer_passes_than_blocks_of_a_template(tiny):
    """A template's blocks are known only with it."""
    canvas = Canvas.from_templates([[MASK] * 9], MASK)
    with pytest.raises(ValueError, match="steps"):
        generate(tiny, canvas, SamplingConfig(gen_length=4, block_length=2, steps=2))

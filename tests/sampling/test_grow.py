"""Growth: the model sees one block more at a time, and a row ends after the block with its end-of-text."""

import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise, generate
from tests.helpers.toys import MASK, Recorder, Table, tiny_model

END = 38


def run(model, rows, length, **options):
    config = SamplingConfig(gen_length=length, grow="block", **options)
    return list(denoise(model, Canvas.from_prompts(rows, length, MASK), config, eos_token_ids=(END,)))


@pytest.mark.parametrize("method", ["none", "block_causal"])
def test_a_block_causal_model_writes_the_same_as_without_growth(method):
    """Nothing sees a later block, so hiding it changes nothing but what is computed."""
    model = tiny_model(1, block_length=4)
    options = {"gen_length": 12, "method": method}
    want = generate(model, [[1, 2, 3], [4, 5, 6, 7, 8]], SamplingConfig(**options, eos_token_id=0))
    *_, last = denoise(
        model,
        Canvas.from_prompts([[1, 2, 3], [4, 5, 6, 7, 8]], 12, MASK),
        SamplingConfig(**options, grow="block", eos_token_id=MASK - 2),
    )
    for got, whole in zip(last.canvas.tokens, want.canvas.tokens, strict=True):
        written = got[got != MASK]
        assert torch.equal(written[: len(whole)], whole[: len(written)][: len(written)])


def test_the_model_never_sees_a_block_that_is_not_open():
    model = Recorder(tiny_model(2))
    run(model, [[1, 2, 3]], 9, block_length=3, suppress_eos=True)
    widths = [call[0].shape[1] for call in model.calls]
    assert widths == [6] * 3 + [9] * 3 + [12] * 3


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity"])
def test_each_block_is_that_of_a_canvas_which_ends_there(method):
    model = tiny_model(3)
    states = run(model, [[1, 2]], 6, block_length=3, method=method, suppress_eos=True)
    config = SamplingConfig(gen_length=3, block_length=3, method=method, suppress_eos=True, eos_token_id=END)
    first = generate(model, [[1, 2]], config)
    assert states[2].canvas.tokens[0, 2:5].tolist() == first.sequences[0].tolist()
    second = generate(model, [[1, 2, *first.sequences[0].tolist()]], config)
    assert states[-1].canvas.tokens[0, 5:8].tolist() == second.sequences[0].tolist()


def test_rows_end_after_the_block_that_holds_end_of_text_each_at_its_own_pace():
    table = torch.zeros(20, 40)
    table[:, 5] = 9.0
    table[6, END] = 20.0  # at slot 6: of the first row the second block, of the second row the first
    states = run(Table(table), [[1, 2], [1, 2, 3, 4]], 12, block_length=4)
    canvas = states[-1].canvas
    assert canvas.valid.sum(1).tolist() == [2 + 8, 4 + 4]
    assert states[-1].nfe.tolist() == [8, 4]
    assert not canvas.masked.any()
    out = generate(
        Table(table), Canvas.from_prompts([[1, 2], [1, 2, 3, 4]], 12, MASK),
        SamplingConfig(grow="block", block_length=4, eos_token_id=END),
    )  # fmt: skip
    assert out.sequences.shape == (2, 8)
    assert out.sequences[1, 4:].tolist() == [END] * 4


def test_random_settings_with_growth():
    rng, model, ended = random.Random(0), tiny_model(4, sharp=2.5), 0
    for _ in range(60):
        options = {
            "block_length": rng.randint(1, 5),
            "method": rng.choice(["none", "prefix", "dual", "vicinity"]),
            "commit": rng.choice(["quota", "threshold", "ancestral"]),
            "threshold": 0.2,
            "revise": rng.choice(["none", "edit", "remask"]),
            "temperature": rng.choice([0.0, 2.0]),
            "cfg_scale": rng.choice([0.0, 0.0, 0.5]),
            "seed": rng.randrange(100),
        }
        rows, length = [[rng.randrange(38) for _ in range(rng.randint(1, 4))] for _ in range(2)], rng.randint(3, 9)
        last = run(model, rows, length, **options)[-1].canvas
        assert not last.masked.any()
        for row, prompt in enumerate(rows):
            size = int(last.valid[row].sum()) - len(prompt)
            assert 1 <= size <= length
            text = last.tokens[row, len(prompt) : len(prompt) + size].tolist()
            assert size == length or END in text
            ended += size < length
        alone = run(model, rows[1:], length, **options | {"seed": options["seed"] + 1})[-1].canvas
        size = int(alone.valid.sum())
        assert torch.equal(alone.tokens[0, :size], last.tokens[1, :size]), options
    assert ended > 0


@pytest.mark.parametrize("bad", ["no_end", "behind", "c2f"])
def test_what_cannot_grow_is_refused(bad):
    model = tiny_model(0)
    with pytest.raises(ValueError, match="grow"):
        if bad == "no_end":
            next(denoise(model, Canvas.from_prompts([[1]], 4, MASK), SamplingConfig(grow="block")))
        elif bad == "behind":
            canvas = Canvas.from_templates([[1, MASK, 2]], MASK)
            next(denoise(model, canvas, SamplingConfig(grow="block"), eos_token_ids=(END,)))
        else:
            SamplingConfig(grow="block", method="c2f")

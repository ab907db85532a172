"""The canvas: where rows of different lengths, regions to fill and padding lie."""

import dataclasses

import pytest
import torch

import dlm

M = 99  # the mask


def test_prompts_of_different_lengths_are_laid_from_the_left():
    canvas = dlm.Canvas.from_prompts([[1, 2, 3], [4]], 2, M)
    assert canvas.tokens.shape == (2, 5)
    assert canvas.tokens.dtype == torch.int64
    assert canvas.tokens[0].tolist() == [1, 2, 3, M, M]
    assert canvas.tokens[1, :3].tolist() == [4, M, M]
    assert canvas.editable.tolist() == [[False, False, False, True, True], [False, True, True, False, False]]
    assert canvas.valid.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert torch.equal(canvas.masked, canvas.editable)
    assert canvas.mask_id == M


def test_masked_is_what_is_still_to_fill():
    canvas = dlm.Canvas.from_prompts([[1, 2]], 3, M)
    tokens = canvas.tokens.clone()
    tokens[0, 3] = 7
    again = dataclasses.replace(canvas, tokens=tokens)
    assert again.masked.tolist() == [[False, False, True, False, True]]
    padding = dataclasses.replace(canvas, valid=torch.tensor([[True, True, True, True, False]]))
    assert padding.masked.tolist() == [[False, False, True, True, False]]


def test_templates_are_filled_where_they_are_masked():
    canvas = dlm.Canvas.from_templates([[1, M, 3, M], [M, 5]], M)
    assert canvas.tokens[0].tolist() == [1, M, 3, M]
    assert canvas.tokens[1, :2].tolist() == [M, 5]
    assert canvas.editable.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert canvas.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(canvas.masked, canvas.editable)


def test_a_template_masked_at_its_end_is_an_extension():
    one, other = dlm.Canvas.from_prompts([[1, 2]], 3, M), dlm.Canvas.from_templates([[1, 2, M, M, M]], M)
    for field in ("tokens", "editable", "valid"):
        assert torch.equal(getattr(one, field), getattr(other, field))


def test_frozen():
    canvas = dlm.Canvas.from_prompts([[1]], 1, M)
    with pytest.raises(dataclasses.FrozenInstanceError):
        canvas.tokens = None


@pytest.mark.parametrize("length", [0, -3])
def test_gen_length_of_zero_or_below(length):
    with pytest.raises(ValueError, match=f"gen_length.*{length}"):
        dlm.Canvas.from_prompts([[1]], length, M)


def test_no_prompts():
    with pytest.raises(ValueError, match="prompt"):
        dlm.Canvas.from_prompts([], 4, M)
    with pytest.raises(ValueError, match=r"prompt|template"):
        dlm.Canvas.from_templates([], M)


def test_prompt_that_contains_the_mask_token():
    with pytest.raises(ValueError, match=str(M)) as error:
        dlm.Canvas.from_prompts([[1, 2], [3, M]], 4, M)
    assert "mask" in str(error.value)


def test_template_without_a_blank():
    with pytest.raises(ValueError, match="mask"):
        dlm.Canvas.from_templates([[1, M], [1, 2]], M)


@pytest.mark.parametrize("field", ["tokens", "editable", "valid"])
def test_shapes_must_agree(field):
    canvas = dlm.Canvas.from_prompts([[1, 2]], 3, M)
    wrong = torch.zeros(1, 4, dtype=getattr(canvas, field).dtype)
    with pytest.raises((ValueError, AssertionError)):
        dataclasses.replace(canvas, **{field: wrong})


def test_ids_are_whole_numbers():
    canvas = dlm.Canvas.from_prompts([[1, 2]], 3, M)
    with pytest.raises(ValueError, match="int64"):
        dataclasses.replace(canvas, tokens=canvas.tokens.float())


def test_lists_in_place_of_tensors_are_one_line():
    """Was: an AttributeError about 'ndim'."""
    good = dlm.Canvas.from_prompts([[1]], 1, M)
    for name in ("tokens", "editable", "valid"):
        with pytest.raises(TypeError, match=rf"^canvas {name} is a list: give a tensor \(rows, slots\), or .*$"):
            dataclasses.replace(good, **{name: getattr(good, name).tolist()})
    for wrong in (None, "99", 99.0, True):
        with pytest.raises(TypeError, match=r"^canvas mask_id is .*: give the id of the mask token"):
            dataclasses.replace(good, mask_id=wrong)


def test_another_mask_than_the_model_s_is_refused(tiny):
    """Was: taken in silence, and the model read the masks as a token of the vocabulary."""
    canvas = dlm.Canvas.from_prompts([[1, 2]], 3, 37)
    with pytest.raises(ValueError, match=r"^the canvas has mask_id 37, and the model's mask token is 39: "):
        dlm.generate(tiny, canvas)
    with pytest.raises(ValueError, match="mask_id 37"):
        next(dlm.denoise(tiny, canvas))

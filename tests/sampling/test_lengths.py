"""Blanks of unknown length: the search by hand, and a model that knows one text finds its length."""

import pytest
import torch

import dlm
from dlm import SamplingConfig
from dlm.checkpoints.files import SHIPPED
from dlm.sampling.lengths import choose_lengths, fill_lengths, search
from dlm.tokenizer import blank_lengths, blank_ranges, blanks, load_tokenizer
from tests.helpers.toys import Predictor


def far_from(*wanted):
    """A score that is lowest at these lengths, and the choices that were asked about, call by call."""
    asked = []

    def score(choices):
        asked.append(choices)
        return [sum(abs(a - b) for a, b in zip(lengths, wanted, strict=True)) for lengths in choices]

    return score, asked


def test_few_choices_are_tried_together():
    score, asked = far_from(3, 1)
    assert search([(1, 8), (1, 8)], score) == (3, 1)
    assert len(asked) == 1 and len(asked[0]) == 64


def test_many_choices_one_blank_at_a_time():
    score, asked = far_from(9, 2, 5)
    assert search([(1, 20), (1, 20), (5, 5)], score) == (9, 2, 5)
    # The first round tries 20 lengths of either blank around the middle (10, 10, 5), the second knows half of them.
    assert [len(choices) for choices in asked] == [20, 19, 19]


def test_ties_take_the_shorter_text_and_nothing_is_tried_twice():
    assert search([(2, 6)], lambda choices: [1.0] * len(choices)) == (2,)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


class Knows(Predictor):
    """Certain of one text where the row has its length; elsewhere of no token."""

    def __init__(self, ids, vocab):
        super().__init__()
        self.ids, self.vocab = torch.tensor(ids), vocab

    def __call__(self, tokens, positions=None, *, valid=None, **options):
        self.lengths = [tokens.shape[1]] * len(tokens) if valid is None else valid.sum(dim=1).tolist()
        return super().__call__(tokens, positions, valid=valid, **options)

    def logits(self, tokens, slots):
        out = torch.zeros(*tokens.shape, self.vocab)
        for row, length in enumerate(self.lengths):
            if length == len(self.ids):
                out[row, torch.arange(length), self.ids] = 9.0
        return out


def test_the_length_with_the_lowest_bound_is_chosen(tokenizer):
    whole = tokenizer("Once upon a time there was a cat.")["input_ids"]
    model, mask = Knows(whole, len(tokenizer)), tokenizer.mask_token_id
    known = {"tokenizer": tokenizer, "mask_id": mask, "draws": 4}
    text = "Once upon ___{1..6} cat."
    found = fill_lengths(model, text, SamplingConfig(block_length=8), **known)
    assert list(found.ids) == whole and found.lengths == (5,)
    assert set(found.tried) == {(size,) for size in range(1, 7)}
    assert min(found.tried, key=found.tried.get) == (5,) and found.tried[5,] == found.nats
    calls = len(model.calls)
    assert choose_lengths(model, "Once ___{3} a time", SamplingConfig(), **known) == (3,)
    assert len(model.calls) == calls  # nothing to choose
    two = fill_lengths(model, "Once ___{1..3} a time there ___* cat.", SamplingConfig(block_length=8), **known)
    assert list(two.ids) == whole and two.lengths == (1, 2)


def test_lengths_that_no_pattern_fits_are_left_out(tokenizer):
    pytest.importorskip("outlines_core")
    model = Knows([0], len(tokenizer))
    known = {"tokenizer": tokenizer, "mask_id": tokenizer.mask_token_id, "eos": (tokenizer.eos_token_id,), "draws": 2}
    found = fill_lengths(model, "Tom is___{1..4:/ [0-9][0-9][0-9]/}.", SamplingConfig(), **known)
    assert (1,) not in found.tried and found.tried
    start, length = found.blanks[0]
    ids = [token for token in found.ids[start : start + length] if token != tokenizer.eos_token_id]
    assert tokenizer.decode(ids).strip().isdigit()
    with pytest.raises(ValueError, match="fits any length"):
        fill_lengths(model, "Tom is___{1..2:/[0-9]{9}/}.", SamplingConfig(), **known)


def test_ranges_as_they_are_written(tokenizer):
    assert blank_ranges("a ___ b ___{7} c ___{2..20} d ___* e ___{2..5:/a{2}/}", 4) == [
        (4, 4), (7, 7), (2, 20), (1, 16), (2, 5),
    ]  # fmt: skip
    ids, places = blanks(tokenizer, "a ___{2..5} b", 4, tokenizer.mask_token_id, lengths=[3])
    assert [length for _, length, _ in places] == [3] and ids.count(tokenizer.mask_token_id) == 3
    with pytest.raises(ValueError, match="several lengths"):
        blank_lengths("a ___{2..5}", 4)


@pytest.mark.parametrize("text", ["___{5..2}", "___{0..3}", "___{1..5000}", "___{2..}", "___{..3}", "___{1..9e9}"])
def test_bad_ranges_are_one_line(text):
    with pytest.raises(ValueError) as found:
        blank_ranges(text, 4)
    assert "\n" not in str(found.value) and "___" in str(found.value)


@pytest.mark.slow
def test_the_model_that_ships():
    opened = dlm.load_pretrained()
    found = dlm.infill(opened, "Once upon a time, there was ___{1..8} named Tim.")
    assert 1 <= found.lengths[0] <= 8 and opened.mask_id not in found.ids
    again = dlm.infill(opened, "Once upon a time, there was ___{1..8} named Tim.")
    assert again.ids == found.ids

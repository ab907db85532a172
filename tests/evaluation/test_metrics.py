"""Numbers about text and about grids, worked by hand."""

import math

import pytest

from dlm.evaluation.metrics import aup, distinct, is_degenerate, perplexity, repetition, unigram_entropy
from dlm.utils.stats import fit, geometric_mean, pareto, proportion


def test_unigram_entropy():
    assert unigram_entropy([7, 7, 8, 8]) == pytest.approx(math.log(2))
    assert unigram_entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert unigram_entropy([5] * 300) == 0.0 and unigram_entropy([]) is None


def test_distinct_and_repetition():
    text = [1, 2, 1, 2, 1, 2]
    assert distinct(text, 1) == pytest.approx(2 / 6)
    assert distinct(text, 2) == pytest.approx(2 / 5)
    assert repetition(text) == pytest.approx(1 - 2 / 3)  # 1212, 2121, 1212
    assert distinct([1, 2], 3) is None and repetition([1, 2, 3]) is None


@pytest.mark.parametrize(
    "text, degenerate",
    [
        ([9] * 300, True),  # one word 300 times
        ([1, 2] * 150, True),
        ([], True),
        ([4], False),
        (list(range(40)), False),
        (list(range(20)) * 2, False),  # 17 of 37 4-grams are repeated: below half
        (list(range(10)) * 4, True),  # 27 of 37
        ([0] * 30 + list(range(1, 11)), True),  # one token fills three quarters
    ],
)
def test_degenerate(text, degenerate):
    assert is_degenerate(text) is degenerate


def test_real_text_is_not_degenerate():
    text = (
        "The old man rowed out before dawn because the wind would rise with the sun, and when the wind rose the boats "
        "stayed in the harbour and the children had nothing to carry home."
    )
    assert not is_degenerate(text.split())


def test_perplexity():
    assert perplexity(3 * math.log(5), 3) == pytest.approx(5) and perplexity(0.0, 0) is None
    assert math.isfinite(perplexity(1e9, 1))


def test_means():
    assert geometric_mean([2, 8]) == pytest.approx(4) and geometric_mean([]) is None
    share, error = proportion([True, True, False, True])
    assert share == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert proportion([True]) == (1.0, None)


def test_aup_by_hand():
    """Points at 1, 2, 4 tokens a pass; the third has lost more than 5 points and goes; the weight uses the best."""
    weight = math.exp(-3 * (1 - 76 / 80))
    assert aup([(2, 76), (1, 80), (4, 60)]) == pytest.approx(80 + 1 * (80 + 76 * weight) / 2)
    assert aup([(1, 80)], best=90) == pytest.approx(80)
    better = math.exp(-3 * (1 - 80 / 90)), math.exp(-3 * (1 - 76 / 90))
    assert aup([(1, 80), (2, 76)], best=90) == pytest.approx(80 + (80 * better[0] + 76 * better[1]) / 2)
    assert aup([(1, 50), (3, 60)], best=50) == pytest.approx(50 + 2 * (50 + 60) / 2)  # a weight is at most 1
    assert aup([(1, 0), (2, 0)]) == 0
    for points, message in (([], "no point"), ([(0, 5)], "above 0"), ([(1, 101)], "0 to 100")):
        with pytest.raises(ValueError, match=message):
            aup(points)


def test_fits_by_hand():
    line = fit([2, 4, 9], [1, 2, 3])
    assert (line.slopes[0], line.intercept) == (pytest.approx(3.5), pytest.approx(-2))
    assert line.r2 == pytest.approx(1 - 1.5 / 26) and fit([1, 3], [0, 4]).r2 == pytest.approx(1)
    plane = fit([3, 5, 4, 9], [0, 1, 0, 2], [0, 0, 1, 2])  # 3 + 2a + b
    assert (
        plane.intercept == pytest.approx(3) and plane.slopes == pytest.approx((2, 1)) and plane.r2 == pytest.approx(1)
    )
    with pytest.raises(ValueError, match="do not determine 2 coefficients"):
        fit([1, 3], [2, 2])


def test_pareto():
    assert pareto([(3, 1), (1, 5), (2, 5), (2, 3), (4, 1)]) == [1, 3, 0]

"""Written texts and their quality: by hand, and two models at one entropy."""

import math

import pytest

from dlm.evaluation.generations import Quality, at_entropy, open_writer, quality, until_end, write
from dlm.evaluation.judge import Score
from dlm.sampling.config import SamplingConfig
from dlm.utils.stats import Measure
from tests.helpers.commandline import checkpoint, make_checkpoint, tokenizer  # noqa: F401


class Judge:
    """Says 2 nats for each token of the text."""

    def __init__(self, tokenizer):  # noqa: F811
        self.tokenizer = tokenizer

    def score(self, pairs):
        counts = [len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text in pairs]
        return [Score(2.0 * count, count) for count in counts]


def point(judged, entropy, errors=(0.0, 0.0)):
    nothing = Measure(0.0, 0.0)
    return Quality(1, Measure(judged, errors[0]), Measure(entropy, errors[1]), *[nothing] * 5)


def test_quality_by_hand(tokenizer):  # noqa: F811
    found = quality(["bbbbbbbb", "bdfgjkq"], Judge(tokenizer))  # 8 tokens of one kind, 7 of seven
    assert found.judged.value == pytest.approx(2.0) and found.judged.error == pytest.approx(0.0)
    assert found.perplexity.value == pytest.approx(math.exp(2))
    assert found.entropy.value == pytest.approx(math.log(7) / 2)
    assert found.entropy.error == pytest.approx(math.log(7) / 2), "of 0 and h: half their distance"
    assert found.distinct_2.value == pytest.approx((1 / 7 + 1) / 2)
    assert found.degenerate.value == 0.5 and found.length.value == 7.5
    with pytest.raises(ValueError, match="all 2 texts are empty"):
        quality(["", ""], Judge(tokenizer))


def test_a_frontier_is_read_between_its_points():
    points = [point(3.0, 5.0, (0.1, 0.2)), point(1.0, 3.0, (0.3, 0.4))]
    found = at_entropy(points, 3.5)
    assert found.value == pytest.approx(1.5)
    parts = (0.75 * 0.3, 0.25 * 0.1, 1.0 * 0.75 * 0.4, 1.0 * 0.25 * 0.2)
    assert found.error == pytest.approx(math.sqrt(sum(part**2 for part in parts)))
    assert at_entropy(points, 5.1) is None and at_entropy(points[:1], 5.0) is None


def test_texts_do_not_depend_on_the_batch(checkpoint, tmp_path_factory, tokenizer):  # noqa: F811
    """Of either kind, each with its own seed, and cut at end-of-text."""
    twin = make_checkpoint(tmp_path_factory.mktemp("twin") / "twin", tokenizer, objective="autoregressive")
    config = SamplingConfig(gen_length=12, temperature=1.0, seed=3)
    for folder, causal in ((checkpoint, False), (twin, True)):
        writer = open_writer(folder)
        assert writer.autoregressive is causal
        prompts = [[tokenizer.bos_token_id]] * 5
        told = []
        some = write(writer, prompts, config, batch_size=2, report=told.append)
        assert some == write(writer, prompts, config, batch_size=5) and told == [2, 4, 5]
        assert len({tuple(row) for row in some}) == 5
        assert not any(writer.mask_id in row or tokenizer.eos_token_id in row for row in some)
    assert until_end([1, 2, 3, 2], [3, 9]) == [1, 2] and until_end([1], [3]) == [1]

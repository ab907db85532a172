"""Noise: estimators against enumeration and by hand; noise belongs to the example."""

from itertools import combinations

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, pack
from dlm.objectives.noise import corrupt, draw_count, draw_noise, draw_uniform
from dlm.utils.random import VALIDATION, example_generator


def toy_cost(masked: tuple[int, ...]) -> float:
    """A made-up sum of cross entropies that depends on the masked set, not only on its size."""
    return sum((place + 1) * (1 + 0.5 * len(masked)) + 0.3 * (0 in masked) for place in masked)


def exact_bound(length: int) -> float:
    """sum over l of (1/l) E[cost of a random l-subset], by listing every subset."""
    total = 0.0
    for size in range(1, length + 1):
        costs = [toy_cost(subset) for subset in combinations(range(length), size)]
        total += np.mean(costs) / size
    return total


@pytest.mark.parametrize("draw", [draw_count, draw_uniform])
def test_estimator_mean_is_the_enumerated_bound(draw):
    length, draws = 4, 20000
    values = []
    for index in range(draws):
        masked, weight, _ = draw(length, example_generator(0, 0, index))
        values.append(weight * toy_cost(tuple(np.flatnonzero(masked))))
    # `uniform` leaves out t <= 1e-3, which is less than the standard error here
    error = np.std(values) / np.sqrt(draws)
    assert abs(np.mean(values) - exact_bound(length)) < 4 * error


def test_count_weights_by_hand():
    seen = set()
    for index in range(200):
        masked, weight, rate = draw_count(5, example_generator(1, 0, index))
        assert weight == 5 / masked.sum() and rate == masked.sum() / 5
        seen.add(int(masked.sum()))
    assert seen == {1, 2, 3, 4, 5}


def test_uniform_takes_a_given_rate():
    masked, weight, rate = draw_uniform(1000, example_generator(0, 0, 0), t=0.25)
    assert (weight, rate) == (4.0, 0.25) and 180 < masked.sum() < 320


def batch_of(indices, rows, epoch=0):
    examples = {i: Example(np.arange(3 + i), np.arange(3 + i) > 0, i) for i in indices}
    return pack([[(epoch, examples[i]) for i in row] for row in rows], 24, 0)


def masked_of(batch, noise, index):
    e = int((batch.index == index).nonzero()[0])
    own = batch.segments == e
    return noise.masked[own].tolist(), noise.weight[own].tolist(), float(noise.rate[e])


@pytest.mark.parametrize("estimator", ["count", "uniform"])
def test_noise_does_not_depend_on_the_batch(estimator):
    together = batch_of([2, 5, 7], [[7, 2], [5]])
    noise = draw_noise(together, estimator, seed=3)
    for index in (2, 5, 7):
        alone = batch_of([index], [[index]])
        assert masked_of(together, noise, index) == masked_of(alone, draw_noise(alone, estimator, seed=3), index)


def test_noise_depends_on_seed_epoch_index_and_stream():
    def draws(*key, **more):
        return example_generator(*key, **more).random(4).tolist()

    drawn = [draws(0, 0, 1), draws(1, 0, 1), draws(0, 1, 1), draws(0, 0, 2), draws(0, 0, 1, stream=VALIDATION)]
    assert len({tuple(d) for d in drawn}) == 5
    assert draws(0, 0, 1) == drawn[0]
    with pytest.raises(ValueError, match="negative"):
        example_generator(0, -1, 0)


def test_only_targets_are_masked_and_unknown_estimators_are_refused():
    batch = batch_of([2, 5, 7], [[7, 2], [5]])
    noise = draw_noise(batch, "count", seed=0)
    assert not (noise.masked & ~batch.target).any() and noise.masked.any()
    assert ((noise.weight > 0) == noise.masked).all()
    # each example's weights add up to its number of targets: L/l on each of l tokens
    for e in range(3):
        own = batch.segments == e
        assert noise.weight[own].sum().item() == pytest.approx(batch.target[own].sum().item())
    with pytest.raises(ValueError, match="count, uniform"):
        draw_noise(batch, "cuont", seed=0)


def test_corrupt():
    assert corrupt(torch.tensor([[4, 5]]), torch.tensor([[False, True]]), 9).tolist() == [[4, 9]]

"""Estimators and noise schedules against enumeration on a toy whose likelihood can be listed, and by hand.

The toy has 3 tokens of 3 letters. `conditionals` is p(letter at a place | visible letters) for every set of visible
letters, made up at random, so it belongs to no joint distribution: the bound is then strict.
"""

import math
from itertools import pairwise, permutations, product

import numpy as np
import pytest

from dlm.data.examples import Example, pack
from dlm.objectives.noise import (
    EPSILON,
    NOISE_SCHEDULES,
    NoiseSettings,
    cosine,
    deal_strata,
    draw_count,
    draw_d3pm,
    draw_noise,
    draw_uniform,
    geometric,
    linear,
    polynomial,
)
from dlm.utils.random import example_generator

LENGTH, LETTERS = 3, 3
TEXTS = list(product(range(LETTERS), repeat=LENGTH))
HIDDEN = -1
SCHEDULES = {name: make(2.0) for name, make in NOISE_SCHEDULES.items()}


@pytest.fixture(scope="module")
def conditionals():
    random = np.random.default_rng(0)
    contexts = product(range(HIDDEN, LETTERS), repeat=LENGTH)
    return {context: random.dirichlet([0.6] * LETTERS, LENGTH) for context in contexts}


@pytest.fixture(scope="module")
def joint():
    return dict(zip(TEXTS, np.random.default_rng(1).dirichlet([0.5] * len(TEXTS)), strict=True))


def exact_conditionals(joint):
    """The conditionals of a joint distribution."""
    table = {}
    for context in product(range(HIDDEN, LETTERS), repeat=LENGTH):
        rows = np.zeros((LENGTH, LETTERS))
        for text, p in joint.items():
            if all(c in (HIDDEN, letter) for c, letter in zip(context, text, strict=True)):
                rows[range(LENGTH), text] += p
        table[context] = rows / rows.sum(1, keepdims=True)
    return table


def cost(table, text, masked) -> float:
    """Sum of CE at the masked places, given the others."""
    context = tuple(HIDDEN if m else letter for m, letter in zip(masked, text, strict=True))
    return -sum(math.log(table[context][place][text[place]]) for place in range(LENGTH) if masked[place])


def at_rate(table, text, rate) -> float:
    """E[sum of CE] where each token is masked with this probability: all subsets."""
    return sum(
        rate ** sum(masked) * (1 - rate) ** (LENGTH - sum(masked)) * cost(table, text, masked)
        for masked in product((0, 1), repeat=LENGTH)
    )


def continuous(table, text, low=0.0, high=1.0) -> float:
    """Mean over r in [low, high] of at_rate / r, a polynomial of degree L - 1: exact with two Gauss points or more."""
    x, w = np.polynomial.legendre.leggauss(4)
    rates = low + (high - low) * (x + 1) / 2
    return sum(weight / 2 * at_rate(table, text, r) / r for r, weight in zip(rates, w, strict=True))


def discrete(table, text, steps, schedule) -> float:
    rates = [0.0, *(schedule.rate(i / steps) for i in range(1, steps)), 1.0]
    return sum((r - before) / r * at_rate(table, text, r) for before, r in pairwise(rates))


def likelihood_by_orders(table, text) -> float:
    """-log of the probability of the generator that reveals one place at a time, in a random order."""
    total = 0.0
    for order in permutations(range(LENGTH)):
        masked, chance = [1] * LENGTH, 1.0
        for place in order:
            context = tuple(HIDDEN if m else letter for m, letter in zip(masked, text, strict=True))
            chance *= table[context][place][text[place]]
            masked[place] = 0
        total += chance / math.factorial(LENGTH)
    return -math.log(total)


def likelihood_in_steps(table, text, steps) -> float:
    """-log of the probability of the generator with T steps: a place is revealed in step i with probability 1/T."""
    total = 0.0
    for when in product(range(1, steps + 1), repeat=LENGTH):
        chance = steps**-LENGTH
        for place in range(LENGTH):  # at step i, what is revealed later in q's time (a greater i) is visible
            context = tuple(text[k] if when[k] > when[place] else HIDDEN for k in range(LENGTH))
            chance *= table[context][place][text[place]]
        total += chance
    return -math.log(total)


def sample_mean(draw, table, text, draws=20000):
    values = np.empty(draws)
    for index in range(draws):
        masked, weight, _ = draw(LENGTH, example_generator(0, 0, index))
        values[index] = weight * cost(table, text, masked)
    return values.mean(), values.std() / math.sqrt(draws)


TEXT = (2, 0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_the_same_mean(conditionals, name):
    """The bound does not depend on the schedule, the variance does."""
    exact = continuous(conditionals, TEXT, EPSILON, 1.0)
    mean, error = sample_mean(lambda length, g: draw_uniform(length, g, schedule=SCHEDULES[name]), conditionals, TEXT)
    assert abs(mean - exact) < 4 * error and error < 0.06 * exact


def test_a_narrow_range_of_rates_has_the_mean_over_that_range(conditionals):
    exact = continuous(conditionals, TEXT, 0.05, 0.3)
    assert abs(exact - continuous(conditionals, TEXT)) > 0.02
    for name in ("linear", "cosine"):
        mean, error = sample_mean(
            lambda length, g, s=SCHEDULES[name]: draw_uniform(length, g, low=0.05, high=0.3, schedule=s),
            conditionals, TEXT,
        )  # fmt: skip
        assert abs(mean - exact) < 4 * error


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_d3pm_has_the_mean_of_its_own_bound(conditionals, steps, name):
    schedule = SCHEDULES[name]
    mean, error = sample_mean(
        lambda length, g: draw_d3pm(length, g, steps=steps, schedule=schedule), conditionals, TEXT, 8000
    )
    assert abs(mean - discrete(conditionals, TEXT, steps, schedule)) <= max(4 * error, 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_d3pm_goes_to_the_continuous_bound(joint, name):
    """Twice the steps, half the distance; from above where more context helps, as it does for a joint distribution."""
    table = exact_conditionals(joint)
    limit = sum(p * continuous(table, text) for text, p in joint.items())
    gaps = [
        sum(p * discrete(table, text, steps, SCHEDULES[name]) for text, p in joint.items()) - limit
        for steps in (64, 128, 256, 512)
    ]
    assert all(gap > 0 for gap in gaps) and gaps[-1] < 0.02
    assert [a / b for a, b in pairwise(gaps)][1:] == pytest.approx([2.0, 2.0], rel=0.1)


def test_bounds_lie_above_the_negative_log_likelihood(conditionals):
    for text in TEXTS:
        assert continuous(conditionals, text) >= likelihood_by_orders(conditionals, text)
        for steps in (1, 2, 3):
            bound = discrete(conditionals, text, steps, linear())
            assert bound >= likelihood_in_steps(conditionals, text, steps) - 1e-12
    assert continuous(conditionals, TEXT) > likelihood_by_orders(conditionals, TEXT) + 1e-3


def test_the_bound_is_the_likelihood_for_conditionals_of_one_joint(joint):
    """Every order multiplies to p(x), so the continuous bound has no gap; in T steps, tokens part and there is one."""
    table = exact_conditionals(joint)
    gap = sum(p * (discrete(table, text, 4, linear()) + math.log(p)) for text, p in joint.items())
    assert gap > 1e-3
    for text, p in joint.items():
        assert continuous(table, text) == pytest.approx(-math.log(p), abs=1e-9)


def exact_variance(table, text, second_moment) -> float:
    """Variance of one term from E[term^2], for an estimator without bias (but for the rates below EPSILON)."""
    return second_moment - continuous(table, text) ** 2


def count_moment(table, text) -> float:
    """E[(L/l cost)^2] of `count`: l uniform on 1..L, then every l-subset."""
    total = 0.0
    for masked in product((0, 1), repeat=LENGTH):
        if count := sum(masked):
            total += (LENGTH / count * cost(table, text, masked)) ** 2 / (LENGTH * math.comb(LENGTH, count))
    return total


def uniform_moment(table, text) -> float:
    """E[(cost/t)^2] of `uniform`, linear schedule: all subsets, and t by quadrature over log t from EPSILON to 1."""
    x, w = np.polynomial.legendre.leggauss(60)
    span, total = -math.log(EPSILON), 0.0
    for place, weight in zip((x + 1) / 2, w / 2, strict=True):
        t = EPSILON * math.exp(span * place)
        for masked in product((0, 1), repeat=LENGTH):
            count = sum(masked)
            chance = t**count * (1 - t) ** (LENGTH - count)
            total += weight * span * t * chance * (cost(table, text, masked) / t) ** 2 / (1 - EPSILON)
    return total


def test_count_has_the_least_variance_of_an_example(conditionals, measured):
    """Exactly, by enumeration, for `count` and `uniform`; every schedule and d3pm by sampling."""
    for text in TEXTS:
        exact = [exact_variance(conditionals, text, m(conditionals, text)) for m in (count_moment, uniform_moment)]
        assert 2 * exact[0] < exact[1]
    exact = {"count": count_moment, "uniform": uniform_moment}
    for name, moment in exact.items():
        measured(f"variance of an example, {name}", exact_variance(conditionals, TEXT, moment(conditionals, TEXT)))
    draws = {f"uniform, {n}": lambda n, g, s=s: draw_uniform(n, g, schedule=s) for n, s in SCHEDULES.items()}
    draws |= {"count": draw_count, "d3pm of 1000": lambda n, g: draw_d3pm(n, g, steps=1000)}
    spread = {name: sample_mean(draw, conditionals, TEXT, 4000)[1] ** 2 * 4000 for name, draw in draws.items()}
    assert min(spread, key=spread.get) == "count"
    assert spread["count"] == pytest.approx(exact_variance(conditionals, TEXT, count_moment(conditionals, TEXT)), 0.1)


def test_count_has_the_least_variance_of_a_step(conditionals, measured):
    """Strata spread the rates of a step evenly, but leave the weights' long tail at low rates, which `count` has not.

    Sixteen texts, the same in every step; variance of their mean over steps that differ in noise alone, times 16.
    """
    texts = [TEXTS[index] for index in np.random.default_rng(0).integers(0, len(TEXTS), 16)]
    batch, keys = batch_of(range(16), LENGTH), [(0, index) for index in range(16)]
    spread = {}
    for name in ("count", "uniform", "stratified"):
        means = []
        for seed in range(600):
            noise = draw_noise(batch, NoiseSettings(name), seed, strata=deal_strata(keys, seed, 0))
            drawn = zip(noise.weight.amax(1).tolist(), texts, noise.masked.tolist(), strict=True)
            means.append(np.mean([weight * cost(conditionals, text, masked) for weight, text, masked in drawn]))
        spread[name] = float(np.var(means)) * 16
        exact = np.mean([continuous(conditionals, text) for text in texts])
        assert abs(np.mean(means) - exact) < 4 * np.std(means) / math.sqrt(600)
        measured(f"variance of a step, times its 16 examples: {name}", spread[name])
    assert spread["count"] < 0.5 * min(spread["uniform"], spread["stratified"])


def test_schedules_by_hand():
    t = 0.25
    assert (linear().rate(t), linear().weight(t)) == (0.25, 4.0)
    assert polynomial(2).rate(t) == 0.0625 and polynomial(2).weight(t) == pytest.approx(2 / 0.25)
    assert cosine().rate(t) == pytest.approx(math.cos(0.75 * math.pi / 2))
    assert cosine().weight(t) == pytest.approx(math.pi / 2 * math.tan(0.75 * math.pi / 2))
    s = 1e-5**0.75 * 20**0.25
    assert geometric().rate(t) == pytest.approx(1 - math.exp(-s))
    assert geometric().weight(t) == pytest.approx(s * math.log(20 / 1e-5) / (math.exp(s) - 1))
    for schedule in SCHEDULES.values():
        assert schedule.rate(0) == pytest.approx(0, abs=2e-5) and schedule.rate(1) == pytest.approx(1)
        for rate in (EPSILON, 0.2, 0.9):
            assert schedule.rate(schedule.time(rate)) == pytest.approx(rate)
        step = 1e-6  # the slope is the derivative of the rate
        slope = (schedule.rate(0.6 + step) - schedule.rate(0.6 - step)) / (2 * step)
        assert schedule.slope(0.6) == pytest.approx(slope, rel=1e-6)


def batch_of(indices, length=6):
    rows = [[(0, Example(np.arange(length), np.ones(length, bool), index))] for index in indices]
    return pack(rows, length, 0)


def test_strata_cover_the_step_once_and_do_not_depend_on_how_it_is_cut():
    keys = [(0, index) for index in range(32)]
    strata = deal_strata(keys, seed=5, step=3)
    assert sorted(place for place, _ in strata.values()) == list(range(32))
    assert {size for _, size in strata.values()} == {32}
    assert strata != deal_strata(keys, seed=5, step=4) and strata != deal_strata(keys, seed=6, step=3)
    settings = NoiseSettings("stratified")
    whole = draw_noise(batch_of(range(32)), settings, 5, strata=strata)
    halves = [draw_noise(batch_of(part), settings, 5, strata=strata) for part in (range(0, 32, 2), range(1, 32, 2))]
    assert np.array_equal(whole.masked[::2], halves[0].masked) and np.array_equal(whole.masked[1::2], halves[1].masked)
    # rate 1 - (1 - eps) u: one u in each interval of 1/32
    places = np.floor((1 - whole.rate.double().numpy()) / (1 - EPSILON) * 32).astype(int)
    assert sorted(places) == list(range(32))
    assert [places[index] for index in range(32)] == [strata[0, index][0] for index in range(32)]


def test_strata_leave_the_mean_and_lower_the_variance_of_a_step():
    """The mean over a step of 16 examples: the same with and without strata, with less spread."""
    means = {"uniform": [], "stratified": []}
    batch, keys = batch_of(range(16)), [(0, index) for index in range(16)]
    for name, values in means.items():
        for seed in range(400):
            noise = draw_noise(batch, NoiseSettings(name), seed, strata=deal_strata(keys, seed, 0))
            rate = noise.rate[batch.segments]
            values.append(float((noise.weight * rate).sum(1).mean()))  # a token's cost grows with the rate
    exact = 6 * (1 + EPSILON) / 2
    for values in means.values():
        assert abs(np.mean(values) - exact) < 4 * np.std(values) / 20
    assert np.var(means["stratified"]) < 0.6 * np.var(means["uniform"])


@pytest.mark.parametrize("estimator", ["count", "uniform", "stratified", "d3pm"])
def test_a_block_has_its_own_draw(estimator):
    """Blocks are counted from the example's start, over all its tokens, targets or not."""
    example = Example(np.arange(10), np.arange(10) >= 3, 7)
    batch = pack([[(0, Example(np.arange(2), np.ones(2, bool), 1)), (0, example)]], 14, 0)
    noise = draw_noise(batch, NoiseSettings(estimator, block_length=4), seed=0)
    assert noise.block_length == 4 and len(noise.rate) == 4  # 1 + 3 blocks
    assert noise.units[0, :2].tolist() == [0, 0]
    assert noise.units[0, 5:12].tolist() == [1, 2, 2, 2, 2, 3, 3]
    assert len(set(noise.rate.tolist())) > 1 and not noise.masked[~batch.target].any()


def test_counts_keep_to_their_range_of_rates():
    for index in range(100):
        masked, weight, rate = draw_count(10, example_generator(0, 0, index), low=0.25, high=0.6)
        assert 3 <= masked.sum() <= 6 and weight == 10 / masked.sum() and rate == masked.sum() / 10
    assert draw_count(1, example_generator(0, 0, 0), low=0.3, high=0.8)[1] == 1.0  # a block of one token: all of it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "strata"}, "did you mean 'stratified'"),
        ({"estimator": "uniform", "noise_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"noise_schedule": "cosine"}, "changes nothing under estimator count"),
        ({"lowest_rate": 0.5, "highest_rate": 0.4}, "from 0.5 to 0.4"),
        ({"estimator": "d3pm", "highest_rate": 0.5}, "takes all mask rates"),
        ({"estimator": "d3pm", "diffusion_steps": 0}, "give 1 or more"),
        ({"block_length": 0}, "block_length is 0"),
        ({"noise_exponent": 0}, "above 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseSettings(**settings)

"""Bounds: against enumeration, by hand, and what must not change them; the width of their intervals."""

import math
import random
from itertools import permutations

import numpy as np
import pytest
import torch

from dlm.data.examples import Example
from dlm.objectives.exact import exact_bound, exact_likelihood, greedy, order_likelihood
from dlm.objectives.likelihood import LikelihoodConfig, answer, bound
from dlm.objectives.noise import EPSILON
from tests.helpers.toys import MASK, Predictor, Probabilities, Recorder, tiny_model


def random_example(rng, longest=6, index=0):
    """A few tokens, some of them given, anywhere."""
    size = rng.randint(1, longest)
    target = [True] * size + [False] * rng.randint(0, 4)
    rng.shuffle(target)
    return Example(np.array([rng.randrange(38) for _ in target]), np.array(target), index)


class Lookup(Predictor):
    """Random probabilities for each set of masked places: 4 places of the true tokens 0, 1, 2, 3."""

    def __init__(self, seed=1):
        super().__init__()
        spread = torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = 0.7 * spread

    def logits(self, tokens, slots):
        return self.table[((tokens == MASK) * 2 ** torch.arange(4)).sum(dim=1)]


FOUR = np.arange(4)


# ------------------------------------------------------------------------------------------------------ enumeration


def test_enumeration_by_hand():
    """Two tokens: the bound is 1/2 CE(1|2) + 1/2 CE(2|1) + 1/2 (CE(1) + CE(2)), -log p of the average of two orders."""
    p = {0b01: [0.5, 1.0], 0b10: [1.0, 0.25], 0b11: [0.2, 0.125]}  # of the true token, at the places of each set

    class Two(Predictor):
        def logits(self, tokens, slots):
            sets = ((tokens == MASK) * torch.tensor([1, 2])).sum(dim=1)
            chosen = torch.tensor([p[int(s)] for s in sets], dtype=torch.float64)
            return torch.stack([chosen, 1 - chosen], dim=-1).log()

    example = answer([], [0, 0])
    wanted = -(math.log(0.5) + math.log(0.25) + math.log(0.2) + math.log(0.125)) / 2
    found = exact_bound(Two(), example, mask_id=MASK)
    assert found.nats == pytest.approx(wanted) and (found.error, found.evaluations, found.tokens) == (0, 3, 2)
    first, second = 0.2 * 0.25, 0.125 * 0.5
    assert exact_likelihood(Two(), example, mask_id=MASK).nats == pytest.approx(-math.log((first + second) / 2))
    by_order = [order_likelihood(Two(), [example], order, mask_id=MASK)[0].nats for order in ((0, 1), (1, 0))]
    assert by_order == pytest.approx([-math.log(first), -math.log(second)])
    assert exact_bound(Two(), example, mask_id=MASK, block_length=1).nats == pytest.approx(-math.log(first))


def test_the_mean_over_orders_is_the_likelihood_and_the_bound():
    model, example = tiny_model(3), answer([5, 9], [1, 2, 3, 4])
    orders = [order_likelihood(model, [example], order, mask_id=MASK)[0].nats for order in permutations(range(4))]
    likelihood = exact_likelihood(model, example, mask_id=MASK).nats
    assert likelihood == pytest.approx(-math.log(np.mean(np.exp(-np.array(orders)))))
    tight = exact_bound(model, example, mask_id=MASK).nats
    assert tight == pytest.approx(np.mean(orders)) and tight > likelihood


def test_block_bounds_meet_the_chain_rule_and_the_whole():
    model, example = tiny_model(4), answer([5], [1, 2, 3, 4, 7])
    chain = order_likelihood(model, [example], mask_id=MASK)[0]
    assert exact_bound(model, example, mask_id=MASK, block_length=1).nats == pytest.approx(chain.nats)
    whole = exact_bound(model, example, mask_id=MASK).nats
    assert exact_bound(model, example, mask_id=MASK, block_length=5).nats == pytest.approx(whole)
    assert exact_bound(model, example, mask_id=MASK, block_length=2).nats != pytest.approx(whole, rel=1e-3)


def test_block_causal_models_see_no_later_block():
    """Rows are cut after the block that they score, which must change nothing."""
    model, example = tiny_model(2, block_length=3), answer([5, 6], [1, 2, 3, 4, 7])
    config = LikelihoodConfig(draws=2)
    told = Recorder(model)
    told.config = model.config
    [cut] = bound(told, [example], config, mask_id=MASK)
    assert {tokens.shape[1] for tokens, _, _ in told.calls} == {7}  # rows of 3 and 6 padded to the longest, 7
    assert cut.nats > 0 and exact_bound(model, example, mask_id=MASK).evaluations == 1 + 7 + 1
    longer = answer([5, 6], [1, 2, 3, 4, 7, 8, 9])
    target = longer.target & (np.arange(9) < 7)
    same = exact_bound(model, Example(longer.tokens, target, 0), mask_id=MASK).nats
    assert exact_bound(model, example, mask_id=MASK).nats == pytest.approx(same)
    with pytest.raises(ValueError, match="trained with blocks of 3"):
        bound(model, [example], LikelihoodConfig(block_length=2), mask_id=MASK)


# ------------------------------------------------------------------------------------------------------- estimators


def test_estimators_agree_with_enumeration():
    """50 random cases of model, prompt, length, estimator and guidance: within 4 standard errors."""
    rng = random.Random(0)
    off = []
    models = [tiny_model(seed) for seed in range(4)] + [tiny_model(9, block_length=2)]
    for case in range(50):
        model, example = rng.choice(models), random_example(rng, index=case)
        causal = model.config.block_length is not None
        name = rng.choice(["block"] if causal else ["count", "uniform", "stratified", "chain", "block"])
        length = int(example.target.sum())
        block = None if causal or name != "block" else rng.randint(1, 4)
        scale = rng.choice([0.0, 0.0, 1.5])
        draws = {"chain": 3, "uniform": 2048, "stratified": 2048}.get(name, 256)  # 1/t has a heavy tail
        config = LikelihoodConfig(name, draws=draws, block_length=block, cfg_scale=scale, seed=1, batch_size=256)
        [found] = bound(model, [example], config, mask_id=MASK)
        whole = 1 if name == "chain" else block if name == "block" else None
        low = EPSILON if name in ("uniform", "stratified") and length > 1 else 0.0
        exact = exact_bound(model, example, mask_id=MASK, block_length=whole, cfg_scale=scale, low=low).nats
        assert found.error < exact and found.tokens == length
        assert abs(found.nats - exact) <= 4 * found.error + 1e-9, (case, name, found, exact)
        if found.error > 0:
            off.append((found.nats - exact) / found.error)
    assert len(off) > 25 and 0.5 < np.std(off) < 1.5, "errors that are far too wide pass the line above"


def repeated(name, repetitions, draws):
    """(exact value, bounds) of the same four tokens under that many seeds of noise."""
    low = EPSILON if name in ("uniform", "stratified") else 0.0
    block = 2 if name == "block" else None
    exact = exact_bound(Lookup(), answer([], FOUR), mask_id=MASK, low=low, block_length=block).nats
    examples = [answer([], FOUR, index) for index in range(repetitions)]
    config = LikelihoodConfig(name, draws, block, batch_size=10**6)
    return exact, bound(Lookup(), examples, config, mask_id=MASK)


def test_intervals_cover():
    """The 95% interval holds the exact value in 93% to 97% of 2,000 repetitions."""
    exact, found = repeated("count", 2000, 64)
    assert 0.93 < np.mean([abs(one.nats - exact) < 1.96 * one.error for one in found]) < 0.97


def test_errors_are_the_spread_over_repetitions():
    """For every estimator. (The intervals of those that draw a time cover less than they should: 1/t is skewed.)"""
    spreads = {}
    for name in ("count", "uniform", "stratified", "block"):
        exact, found = repeated(name, 400, 32)
        values = np.array([one.nats for one in found])
        spreads[name] = values.std()
        assert np.sqrt(np.mean([one.error**2 for one in found])) == pytest.approx(values.std(), rel=0.12), name
        assert abs(values.mean() - exact) < 4 * values.std() / 20, name
    assert spreads["count"] < 0.5 * min(spreads["uniform"], spreads["stratified"])


def test_the_chain_is_exact_when_it_has_met_every_place():
    model, example = tiny_model(1), answer([5], [1, 2, 3, 4])
    exact = order_likelihood(model, [example], mask_id=MASK)[0]
    [found] = bound(model, [example], LikelihoodConfig("chain", draws=8), mask_id=MASK)
    assert found.nats == pytest.approx(exact.nats) and (found.error, found.evaluations) == (0, 4)
    alone = [bound(model, [answer([5], [1, 2, 3, 4], i)], LikelihoodConfig("chain", draws=2), mask_id=MASK)[0]
             for i in range(300)]  # fmt: skip
    spread = np.std([one.nats for one in alone])
    assert np.sqrt(np.mean([one.error**2 for one in alone])) == pytest.approx(spread, rel=0.1)


def test_lladas_estimator_has_the_same_mean():
    """LLaDA's, from its definition: a batch of b copies whose mask counts stand L/b apart around the circle 1..L from
    one drawn place, as many tokens masked at random, each cross entropy over its mask rate, the mean over the batch."""
    model, example, batch, rounds = tiny_model(5), answer([7, 8, 9], [1, 2, 3, 4, 5]), 4, 400
    length, generator = 5, torch.Generator().manual_seed(0)
    values = []
    for _ in range(rounds):
        first = torch.randint(1, length + 1, (), generator=generator)
        spread = torch.linspace(float(first), float(first + (batch - 1) * (length / batch)), steps=batch)
        counts = (spread.round().long() - 1) % length + 1
        tokens = torch.from_numpy(example.tokens).repeat(batch, 1)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        for row, count in enumerate(counts):
            masked[row, 3 + torch.randperm(length, generator=generator)[:count]] = True
        with torch.no_grad():
            logits = model.predict(tokens.masked_fill(masked, MASK))
        ce = torch.nn.functional.cross_entropy(logits[masked], tokens[masked], reduction="none")
        rate = (counts / length)[:, None].expand_as(tokens)[masked]
        values.append(float((ce / rate).sum()) / batch)
    theirs, error = np.mean(values), np.std(values) / math.sqrt(rounds)
    exact = exact_bound(model, example, mask_id=MASK).nats
    [ours] = bound(model, [example], LikelihoodConfig(draws=rounds * batch, batch_size=200), mask_id=MASK)
    assert abs(theirs - exact) < 4 * error < 0.1 * exact
    assert abs(theirs - ours.nats) < 4 * math.hypot(error, ours.error)


def test_more_draws_until_the_error_is_small_enough():
    examples = [answer([], FOUR, index) for index in range(20)]
    config = LikelihoodConfig(draws=8, target_error=0.2, max_draws=10_000, batch_size=10**4)
    found = bound(Lookup(), examples, config, mask_id=MASK)
    assert all(one.error <= 0.2 for one in found) and len({one.evaluations for one in found}) > 1
    assert all(one.evaluations % 8 == 0 for one in found)
    [capped] = bound(Lookup(), examples[:1], LikelihoodConfig(draws=8, target_error=1e-9, max_draws=24), mask_id=MASK)
    assert capped.evaluations == 24 and capped.error > 1e-9


# ------------------------------------------------------------------------------------------------ what changes nothing


def test_one_token_is_exact():
    model = tiny_model(0)
    with torch.no_grad():
        wanted = -model.predict(torch.tensor([[5, 6, MASK]])).log_softmax(-1)[0, 2, 11]
    for name in ("count", "uniform", "stratified", "chain", "block"):
        [found] = bound(model, [answer([5, 6], [11])], LikelihoodConfig(name), mask_id=MASK)
        assert found.nats == pytest.approx(float(wanted))
        assert (found.error, found.evaluations, found.tokens) == (0, 1, 1)


def test_an_example_does_not_depend_on_the_batch():
    rng = random.Random(1)
    model, examples = tiny_model(0), [random_example(rng, index=i) for i in range(12)]
    for name in ("count", "uniform", "block"):
        together = bound(model, examples, LikelihoodConfig(name, 8, 2, cfg_scale=0.5, batch_size=32), mask_id=MASK)
        for example, found in zip(examples, together, strict=True):
            [alone] = bound(model, [example], LikelihoodConfig(name, 8, 2, cfg_scale=0.5, batch_size=3), mask_id=MASK)
            assert found.nats == pytest.approx(alone.nats, rel=1e-12)
            assert found.error == pytest.approx(alone.error, rel=1e-9, abs=1e-12)
    assert bound(model, [Example(np.array([1, 2]), np.zeros(2, bool), 0)], mask_id=MASK)[0].evaluations == 0


def test_options_of_a_question_meet_the_same_noise():
    """Two options of one length under one index are masked at the same places, so that what they share cancels."""
    told = Recorder(tiny_model(0))
    prompt, options = [5, 6], [[1, 2, 3, 4], [7, 8, 9, 10]]
    for option in options:
        bound(told, [answer(prompt, option, 3)], LikelihoodConfig(draws=6, batch_size=6), mask_id=MASK)
    bound(told, [answer(prompt, options[0], 4)], LikelihoodConfig(draws=6, batch_size=6), mask_id=MASK)
    masks = [tokens == MASK for tokens, _, _ in told.calls]
    assert (masks[0] == masks[1]).all() and not (masks[0] == masks[2]).all()


def test_guidance_by_hand():
    """l = u + (w + 1)(c - u), the prompt masked in u: with one token to score."""
    model, scale = tiny_model(0), 2.0
    with torch.no_grad():
        told = model.predict(torch.tensor([[5, 6, MASK]]))[0, 2]
        untold = model.predict(torch.tensor([[MASK, MASK, MASK]]))[0, 2]
    wanted = -(untold + 3 * (told - untold)).log_softmax(-1)[11]
    [found] = bound(model, [answer([5, 6], [11])], LikelihoodConfig(cfg_scale=scale), mask_id=MASK)
    assert found.nats == pytest.approx(float(wanted)) and found.evaluations == 2


def test_going_on_from_a_draw():
    example, config = answer([], FOUR), LikelihoodConfig(draws=4)
    first, second = (bound(Lookup(), [example], config, mask_id=MASK, first_draw=n)[0].nats for n in (0, 4))
    [both] = bound(Lookup(), [example], LikelihoodConfig(draws=4, target_error=1e-9, max_draws=8), mask_id=MASK)
    assert both.nats == pytest.approx((first + second) / 2) and first != second


# ------------------------------------------------------------------------------------------------------------ orders


def test_confident_order_and_greedy_by_hand():
    """Place 1 is the surest, then 2, then 0; greedy decoding writes 2, 1, 0."""
    model = Probabilities([[0.3, 0.3, 0.4], [0.05, 0.9, 0.05], [0.7, 0.2, 0.1]])
    right, wrong = answer([], [2, 1, 0]), answer([], [2, 1, 1])
    found = order_likelihood(model, [right, wrong], "confident", mask_id=2)
    assert [one.nats for one in found] == pytest.approx([-math.log(0.4 * 0.9 * 0.7), -math.log(0.4 * 0.9 * 0.2)])
    assert [one.evaluations for one in found] == [3, 3]
    model.calls.clear()
    free = Probabilities([[0.3, 0.3, 0.4, 0.0], [0.05, 0.9, 0.05, 0.0], [0.7, 0.2, 0.1, 0.0]])
    assert greedy(free, [right, wrong], mask_id=3) == [True, False]
    assert len(free.calls) == 3 and free.calls[-1][0] == 1, "an example is over at its first other token"


def test_greedy_is_what_the_sampler_writes():
    import dlm

    for seed in range(4):
        model = tiny_model(seed)
        out = dlm.generate(model, [[5, 6]], dlm.SamplingConfig(gen_length=5, steps=5)).sequences[0].tolist()
        other = [*out[:-1], (out[-1] + 1) % 38]
        assert greedy(model, [answer([5, 6], out), answer([5, 6], other)], mask_id=MASK) == [True, False]


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"estimator": "cuont"}, "did you mean 'count'"),
        ({"draws": 0}, "give 1 or more"),
        ({"draws": 7}, "an even number"),
        ({"draws": 1, "target_error": 0.1}, "one draw has no standard error"),
        ({"target_error": 0.0}, "above 0"),
        ({"cfg_scale": -1.0}, "0 or more"),
        ({"seed": -1}, "0 or more"),
        ({"seed": 2**70}, "below 2"),
        ({"draws": "x"}, "a whole number"),
        ({"draws": 2.0}, "a whole number"),
        ({"cfg_scale": math.inf}, "0 or more"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodConfig(**fields)


def test_examples_are_checked():
    model = tiny_model(0, max_sequence_length=8)
    with pytest.raises(ValueError, match="above the model's max_sequence_length 8"):
        bound(model, [answer([1] * 5, [2] * 5)], mask_id=MASK)
    with pytest.raises(ValueError, match="mask token"):
        bound(model, [answer([1], [MASK])], mask_id=MASK)
    with pytest.raises(ValueError, match="holds id 200, but the model's ids go from 0 to 39"):  # was an IndexError
        bound(model, [answer([1], [200])], mask_id=MASK)
    with pytest.raises(ValueError, match="give at most 14"):
        exact_bound(tiny_model(0), answer([], [1] * 15), mask_id=MASK)
    with pytest.raises(ValueError, match=r"each of 0\.\.1"):
        order_likelihood(model, [answer([], [1, 2])], (0, 0), mask_id=MASK)
    with pytest.raises(FloatingPointError, match="no numbers"):
        bound(Probabilities(torch.full((4, 3), float("nan"))), [answer([], [1, 2])], mask_id=MASK)

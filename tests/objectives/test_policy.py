"""Policy gradients by hand: on an enumerated toy their mean against the exact gradient, and the bias of one pass."""

import itertools
import math

import pytest
import torch

from dlm.data.examples import Batch
from dlm.models.attention import block_causal, full
from dlm.models.predictor import as_predictor
from dlm.objectives.policy import Policy, advantages_of, one_pass, trace_passes
from dlm.objectives.reference import frozen
from dlm.sampling.config import SamplingConfig
from dlm.training.rollouts import write
from tests.helpers.toys import tiny_model

WORDS, MASK, GROUP = 3, 3, 4  # ids 0 to 2 are proposed; 3 is the mask, 4 never appears
PROMPT = [0, 2]


def toy(seed=0):
    """A transformer that knows five ids."""
    shape = {"d_model": 8, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 16}
    ids = {"vocab_size": 5, "embedding_size": 5, "mask_token_id": MASK, "eos_token_id": 4, "pad_token_id": 4}
    return tiny_model(seed, **shape, **ids)


def reward_of(answer) -> float:
    """A number for each answer, without a pattern."""
    return math.sin(1 + 7 * sum(token * 3**place for place, token in enumerate(answer)))


def states_log_p(model, length):
    """log p (states, length, WORDS) at every place of every canvas, and the number of each canvas; a place holds 0 to 2
    or the mask, 3."""
    states = list(itertools.product(range(WORDS + 1), repeat=length))
    tokens = torch.tensor([[*PROMPT, *state] for state in states])
    logits = as_predictor(model)(tokens, torch.arange(tokens.shape[1]).repeat(len(tokens), 1))
    log_p = logits[:, len(PROMPT) :, :WORDS].double().log_softmax(-1)
    return log_p, {state: number for number, state in enumerate(states)}


def log_probabilities(model, length):
    """log p of every answer (WORDS^length,), its tokens written one by one in an order drawn at random."""
    log_p, number = states_log_p(model, length)
    answers = list(itertools.product(range(WORDS), repeat=length))
    by_order = []
    for order in itertools.permutations(range(length)):
        total = 0
        for turn, place in enumerate(order):
            seen = [number[tuple(a[k] if k in order[:turn] else MASK for k in range(length))] for a in answers]
            total = total + log_p[seen, place, [a[place] for a in answers]]
        by_order.append(total)
    return answers, torch.stack(by_order).logsumexp(0) - math.log(math.factorial(length))


def flat(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def exact_gradient(model, length):
    """The gradient of the expected reward."""
    answers, log_p = log_probabilities(model, length)
    return flat((log_p.exp() * torch.tensor([reward_of(a) for a in answers])).sum(), model)


def estimates(model, method, length, groups, seed=0):
    """(groups, parameters) the gradient of each group, as a step would take it, with its sign turned.

    The mean over a group holds each answer's own reward, which shrinks the gradient by (G - 1) / G: undone here.
    """
    sampling = SamplingConfig(gen_length=length, block_length=length, temperature=1.0, confidence="random")
    rows, _, _ = write(
        model, [PROMPT] * groups * GROUP, range(seed, seed + groups * GROUP), sampling, mask_id=MASK, vocab_size=WORDS,
        ends=(), rows=512,
    )  # fmt: skip
    tokens, order, region, target = (
        torch.stack([row[name] for row in rows]) for name in ("tokens", "order", "region", "target")
    )
    rewards = torch.tensor([reward_of(row[len(PROMPT) :]) for row in tokens.tolist()])
    advantages = advantages_of(method, rewards, GROUP).double()
    policy, found = Policy(method, forbidden=(4,)), []
    for start in range(0, len(tokens), GROUP):
        some = slice(start, start + GROUP)
        count, width = tokens[some].shape
        numbers = torch.arange(count)
        batch = Batch(
            tokens[some], numbers[:, None].expand(count, width), target[some], torch.arange(width).repeat(count, 1),
            numbers, numbers, advantages[some],
        )  # fmt: skip
        if policy.method.traced:
            parts = trace_passes(target[some], region[some], order[some])
        else:
            parts = one_pass(target[some], region[some], torch.zeros_like(region[some]))
        total = sum(policy.loss(model, batch, part, MASK).total for part in parts)
        found.append(-flat(total, model) / count * GROUP / (GROUP - 1))
    return torch.stack(found)


def deviations(found, wanted):
    """How many standard errors the mean of estimates is from what it should be, for each parameter that moves."""
    error = found.std(0) / math.sqrt(len(found))
    moves = error > 1e-9
    return ((found.mean(0) - wanted).abs() / error)[moves]


@pytest.mark.parametrize("method", ["diffu_grpo", "trace"])
def test_of_one_token_answers_the_mean_is_the_exact_gradient(method, measured):
    model = toy()
    away = deviations(estimates(model, method, 1, 200), exact_gradient(model, 1))
    assert len(away) > 100
    measured(f"standard errors from the exact gradient, {method}, one token", away.max(), 4)


def test_a_trace_in_random_order_has_the_exact_gradient_of_longer_answers(measured):
    model = toy()
    away = deviations(estimates(model, "trace", 4, 150), exact_gradient(model, 4))
    measured("standard errors from the exact gradient, trace, four tokens", away.max(), 4)


def test_the_bias_of_one_pass(measured):
    """Its mean is that of the enumerated mean-field gradient, which is not the exact one; how far apart is measured."""
    model = toy()
    answers, log_p = log_probabilities(model, 4)
    states, number = states_log_p(model, 4)
    alone = states[number[(MASK,) * 4]]  # (4, WORDS) everything masked
    rewards = torch.tensor([reward_of(a) for a in answers], dtype=torch.float64)
    weight = log_p.exp().detach() * (rewards - (log_p.exp() * rewards).sum().detach())
    field = sum(alone[place, [a[place] for a in answers]] for place in range(4)) / 4
    expected = flat((weight * field).sum(), model)
    away = deviations(estimates(model, "diffu_grpo", 4, 150), expected)
    measured("standard errors from the mean-field gradient, one pass, four tokens", away.max(), 4)
    exact = exact_gradient(model, 4)
    measured("bias of one pass, relative to the exact gradient", (4 * expected - exact).norm() / exact.norm())
    cosine = torch.nn.functional.cosine_similarity(expected, exact, dim=0)
    measured("1 - cosine of the one-pass gradient and the exact one", 1 - cosine)
    assert 0.1 < cosine < 0.999  # it points the same way, and is another gradient


def batch_of_two(model):
    tokens = torch.tensor([[0, 2, 1, 0], [0, 2, 2, 1]])
    region = torch.tensor([[False, False, True, True]] * 2)
    batch = Batch(
        tokens, torch.arange(2)[:, None].expand(2, 4), region, torch.arange(4).repeat(2, 1), torch.arange(2),
        torch.arange(2), torch.tensor([1.0, -1.0]),
    )  # fmt: skip
    return batch, one_pass(region, region, torch.zeros_like(region))[0]


def test_the_clip_by_hand():
    """Ratios of 2 and of 0.5: where the clip binds, the gradient ends, and it is counted."""
    model, policy = toy(), Policy(ratio_clip=0.2, forbidden=(4,))
    batch, answers = batch_of_two(model)
    log_p, _ = policy.log_probs(model, batch, answers, MASK)
    old = torch.zeros(2, 4)
    ratios = torch.tensor([2.0, 1.1, 0.5, 0.9])
    old[answers.scored] = (log_p.detach() - ratios.log()).float()
    loss = policy.loss(model, batch, type(answers)(answers.hidden, answers.scored, answers.weight, old), MASK)
    assert float(loss.total.detach()) == pytest.approx(-(1.2 + 1.1 - 0.8 - 0.9) / 2, abs=1e-5)
    assert float(loss.notes["clip_share"]) == pytest.approx(1.0)  # half of each answer's tokens, over two answers
    wanted = flat(-(1.1 * log_p[1] - 0.9 * log_p[3]) / 2, model)
    assert (flat(loss.total, model) - wanted).abs().max() < 1e-5


def test_it_sees_what_the_sampler_saw():
    """A regression test: a model that knows both visibilities wrote in blocks and was scored under full attention."""
    model = toy()
    batch, answers = batch_of_two(model)
    xt = batch.tokens.masked_fill(answers.hidden, MASK)
    for rule in (block_causal(1), full):
        log_p, _ = Policy(visible=rule).log_probs(model, batch, answers, MASK)
        logits = model.predict(xt, visible=rule)[answers.scored]
        wanted = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
        assert torch.allclose(log_p, wanted.gather(1, batch.tokens[answers.scored][:, None])[:, 0])


def test_kl_by_hand():
    """exp(d) - d - 1, d = log p_ref - log p; 0 where the policy is its reference."""
    model, other = toy(), frozen(toy(1))
    batch, answers = batch_of_two(model)
    policy = Policy(reference=other, kl=0.5, forbidden=(4,))
    mine, _ = policy.log_probs(model, batch, answers, MASK)
    theirs, _ = policy.log_probs(other, batch, answers, MASK)
    apart = (theirs - mine).detach()
    loss = policy.loss(model, batch, answers, MASK)
    assert float(loss.notes["kl"]) == pytest.approx(float((apart.exp() - apart - 1).sum() / 2), rel=1e-5)
    same = Policy(reference=frozen(model), kl=0.5, forbidden=(4,)).loss(model, batch, answers, MASK)
    assert float(same.notes["kl"]) == pytest.approx(0, abs=1e-9)
    assert policy.identity != Policy(reference=frozen(model)).identity


def test_passes_of_a_trace():
    """Two tokens in the first pass, one in the second, an early end: what each pass sees, scores and weighs."""
    region = torch.tensor([[False, True, True, True, True]])
    order = torch.tensor([[0, 2, 1, 1, 0]])
    target = torch.tensor([[False, True, True, True, False]])
    first, second = trace_passes(target, region, order)
    assert first.hidden.tolist() == region.tolist() and first.weight.tolist() == [[0, 0, 0.5, 0.5, 0]]
    assert second.hidden.tolist() == [[False, True, False, False, True]]
    assert second.scored.tolist() == [[False, True, False, False, False]]
    [both] = trace_passes(target, region, order, shrink=2)
    assert both.scored.tolist() == target.tolist() and both.hidden.tolist() == region.tolist()


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    assert advantages_of("diffu_grpo", rewards, 4).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    up, down = math.exp(0.5), math.exp(-0.5)
    first = 4 * (up - down) / (2 * up + 2 * down)
    assert advantages_of("wd1", rewards, 4).tolist() == pytest.approx([first, -first, -first, first, 0, 0, 0, 0])


def test_what_is_never_proposed_has_no_probability():
    model = toy()
    batch, answers = batch_of_two(model)
    policy = Policy(forbidden=(4,), temperature=0.5)
    log_p, entropy = policy.log_probs(model, batch, answers, MASK)
    xt = torch.tensor([[0, 2, MASK, MASK]])
    logits = as_predictor(model)(xt, torch.arange(4)[None])[0, 2:, :WORDS] / 0.5
    assert log_p[:2].tolist() == pytest.approx(logits.log_softmax(-1)[[0, 1], [1, 0]].tolist(), abs=1e-5)
    assert bool((entropy <= math.log(WORDS) + 1e-6).all())


@pytest.mark.parametrize("changes", [{"ratio_clip": 0.0}, {"kl": -1.0}, {"temperature": 0.0}])
def test_settings_that_cannot_be(changes):
    with pytest.raises(ValueError, match="give a clip and a temperature above 0"):
        Policy(**changes)
    with pytest.raises(ValueError, match="diffu_grpo"):
        Policy("grpo")

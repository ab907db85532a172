"""Remasking and verifying: chances as in the paper's code, exact marginals on an enumerated toy, and hand cases."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise
from dlm.sampling.remask import chances, looped, shares
from dlm.sampling.rows import Batch
from tests.helpers.toys import MASK, Predictor, Table, Watch, tiny_model

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "remdm" / "expected.json").read_text())
NAMES = {  # the authors' samplers -> our settings
    "mdlm": {},
    "forward-backward": {"revise": "remask", "remask": "forward_backward"},
    "remdm-cap": {"revise": "remask", "remask": "cap"},
    "remdm-rescale": {"revise": "remask", "remask": "rescale"},
    "remdm-conf": {"revise": "remask", "remask": "confidence"},
    "remdm-loop": {"revise": "remask", "remask": "loop"},
}


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda case: f"{case['sampler']}-{case['steps']}-{case['t']:.3f}"
)
def test_a_step_draws_from_what_the_papers_code_draws_from(case):
    """ReMDM's own update function on three committed and three masked places: chances of masking again, of staying
    masked, and of each token at the first masked place."""
    eta = case.get("eta")
    config = SamplingConfig(
        commit="ancestral", **NAMES[case["sampler"]], **({} if eta is None else {"remask_eta": eta})
    )
    t, s = case["t"], case["t"] - case["dt"]
    chance = chances(config, t, s)
    if "t_on" in case and (case["t_on"], case["t_off"], case["alpha_on"]) != (0.55, 0.05, 0.9):
        chance = looped(t, s, eta, case["t_on"], case["t_off"], case["alpha_on"])
    sure = -torch.tensor(RECORDED["conf_of_committed"] + [0.0] * 3)
    back = shares(chance, sure, torch.tensor([True] * 3 + [False] * 3))[:3].tolist()
    tolerance = 2e-3 if case["sampler"] == "remdm-conf" else 2e-6  # whose confidences are kept in bfloat16
    assert back == pytest.approx(case["remask_probability_of_committed"], abs=tolerance)
    assert [1 - chance.take] * 3 == pytest.approx(case["stay_masked_probability_of_masked"], abs=2e-6)
    tokens = [chance.take * p for p in RECORDED["p_x0_of_masked"][0][:-1]]
    assert tokens == pytest.approx(case["probability_of_each_token_at_masked_place_0"][:-1], abs=2e-6)


def test_all_recorded_steps_are_compared():
    assert len(RECORDED["cases"]) == 71 and {case["sampler"] for case in RECORDED["cases"]} == set(NAMES)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "geometric"])
def test_chances_of_the_ancestral_sampler_make_the_schedule(schedule):
    """The share still masked after all steps but the last is the schedule's."""
    config, share = SamplingConfig(commit="ancestral", noise_schedule=schedule), 1.0
    for i in range(15):
        share *= 1 - chances(config, 1 - i / 16, 1 - (i + 1) / 16).take
    t = 1 / 16
    want = {
        "linear": t,
        "cosine": math.cos(math.pi / 2 * (1 - t)),
        "polynomial": t**2,
        "geometric": 1 - math.exp(-(1e-5 ** (1 - t)) * 20**t),
    }
    start = {"geometric": 1 - math.exp(-20)}.get(schedule, 1.0)
    assert share == pytest.approx(want[schedule] / start, rel=1e-6)


# --- the law of what comes out -------------------------------------------------------------------------------------

WORDS = {(0, 0, 0): 0.4, (1, 1, 0): 0.3, (1, 0, 1): 0.2, (0, 1, 1): 0.1}
HIDDEN = 2  # the mask of the toy


def guess(canvas):
    """p(x_i = v | what is not masked), for every place: the perfect predictor of WORDS."""
    fits = {w: p for w, p in WORDS.items() if all(c in (HIDDEN, v) for c, v in zip(canvas, w, strict=True))}
    total = sum(fits.values()) or 1.0
    return [[sum(p for w, p in fits.items() if w[i] == v) / total if fits else 0.5 for v in (0, 1)] for i in range(3)]


class Perfect(Predictor):
    table = {c: guess(c) for c in itertools.product((0, 1, HIDDEN), repeat=3)}

    def logits(self, tokens, slots):
        p = torch.tensor([self.table[tuple(row)] for row in tokens.tolist()], dtype=torch.float64)
        return torch.nn.functional.pad(p.log().clamp_min(-60), (0, 1), value=-60.0)


def exact(config, steps):
    """The law of the canvas after all steps, by multiplying out every transition of every canvas; a state holds how
    sure each token was when it was committed, too."""
    law = {((HIDDEN,) * 3, (1.0,) * 3): 1.0}
    for i in range(steps):
        chance, after = chances(config, 1 - i / steps, 1 - (i + 1) / steps), {}
        last = i == steps - 1
        for (canvas, sure), weight in law.items():
            p, options = guess(canvas), []
            held = [math.exp(-c) if token != HIDDEN else 0.0 for token, c in zip(canvas, sure, strict=True)]
            for place, token in enumerate(canvas):
                if token == HIDDEN:
                    take = 1.0 if last else chance.take
                    options.append(
                        [
                            (HIDDEN, 1.0, 1 - take),
                            *((v, p[place][v] if chance.shared else 1.0, take * p[place][v]) for v in (0, 1)),
                        ]
                    )
                else:
                    share = held[place] / sum(held) if chance.shared else 1.0
                    again = 0.0 if last else chance.again * share
                    options.append([(HIDDEN, 1.0, again), (token, sure[place], 1 - again)])
            for found in itertools.product(*options):
                part = weight * math.prod(part for *_, part in found)
                if part > 1e-12:
                    name = tuple(token for token, *_ in found), tuple(round(sure, 9) for _, sure, _ in found)
                    after[name] = after.get(name, 0.0) + part
        law = after
    words = {}
    for (canvas, _), part in law.items():
        words[canvas] = words.get(canvas, 0.0) + part
    return words


def sampled(config, rows):
    canvas = Canvas.from_prompts([[]] * rows, 3, HIDDEN)
    *_, last = denoise(Perfect(), canvas, config)
    assert not last.canvas.masked.any()
    found = last.canvas.tokens.tolist()
    return {word: found.count(list(word)) / rows for word in map(tuple, found)}, last


def distance(a, b):
    return sum(abs(a.get(word, 0.0) - b.get(word, 0.0)) for word in set(a) | set(b)) / 2


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 4),
        ({"noise_schedule": "cosine"}, 4),
        ({"revise": "remask", "remask": "cap", "remask_eta": 0.3}, 6),
        ({"revise": "remask", "remask": "rescale", "remask_eta": 0.5}, 6),
        ({"revise": "remask", "remask": "loop", "remask_eta": 0.05}, 20),
        ({"revise": "remask", "remask": "confidence"}, 6),
        ({"revise": "remask", "remask": "forward_backward", "remask_eta": 0.5}, 6),
        ({"noise_schedule": "polynomial"}, 4),
        ({"noise_schedule": "geometric"}, 4),
    ],
)
def test_the_law_is_the_exact_one(options, steps):
    rows = 1200
    config = SamplingConfig(gen_length=3, block_length=3, steps=steps, commit="ancestral", temperature=1.0, **options)
    found, _ = sampled(config, rows)
    want = exact(config, steps)
    # The distance of an empirical law of n draws from the true one: its mean is below half the sum of the deviations.
    noise = sum(math.sqrt(p * (1 - p) / rows) for p in want.values() if p > 0) / 2
    assert distance(found, want) < 2.5 * noise, (found, want)


def test_many_small_steps_with_cap_give_the_data():
    config = SamplingConfig(
        gen_length=3, block_length=3, steps=64, commit="ancestral", temperature=1.0, revise="remask", remask_eta=0.02
    )
    assert distance(exact(config, 64), WORDS) < 0.03
    found, last = sampled(config, 600)
    assert distance(found, WORDS) < 0.08
    assert int(last.nfe.max()) < 64  # steps that change nothing cost no pass


# --- in the loop ---------------------------------------------------------------------------------------------------


def test_random_settings_with_revision_end_and_hold_what_is_given():
    rng, models = random.Random(3), [tiny_model(5, sharp=3.0), tiny_model(6, sharp=1.0)]
    kinds, done = set(), 0
    while done < 100 or len(kinds) < 15:
        try:
            config = SamplingConfig(
                block_length=rng.randint(1, 5),
                steps=rng.choice([None, 12]),
                method=rng.choice(["none", "none", "prefix", "dual", "vicinity", "c2f"]),
                commit=rng.choice(["quota", "threshold", "factor", "entropy_bound", "ancestral"]),
                threshold=0.2,
                factor=30.0,
                revise=rng.choice(["edit", "remask", "verify"]),
                edit_threshold=rng.choice([0.0, 0.3]),
                max_post_passes=rng.choice([0, 1, 4]),
                remask=rng.choice(["cap", "rescale", "confidence", "loop", "forward_backward"]),
                remask_eta=rng.choice([None, 0.5, 1.0]),
                verify_threshold=rng.choice([0.3, 1.0]),
                noise_schedule=rng.choice(["linear", "cosine", "geometric"]),
                temperature=rng.choice([0.0, 1.0]),
                cfg_scale=rng.choice([0.0, 0.0, 0.5]),
                seed=rng.randrange(100),
            )
        except ValueError as error:
            assert "verify" in str(error) or "remask" in str(error)
            continue
        # At least one given token: masks alone predict the same at every place, and rounding would choose among them.
        rows = [[rng.randrange(MASK) for _ in range(rng.randint(1, 4))] + [MASK] * 6 for _ in range(2)]
        canvas = Canvas.from_templates(rows, MASK)
        model = rng.choice(models)
        states = []
        for state in denoise(model, canvas, config):
            assert state.step < 200, config
            assert (state.canvas.tokens == canvas.tokens)[~canvas.editable].all()
            assert not (state.revised & ~canvas.editable).any()
            states.append(state)
        assert not states[-1].canvas.masked.any()
        alone = Canvas.from_templates([rows[1]], MASK)
        seeded = SamplingConfig(**{**vars_of(config), "seed": config.seed + 1})
        *_, other = denoise(model, alone, seeded)
        size = len(rows[1])
        assert torch.equal(other.canvas.tokens[0], states[-1].canvas.tokens[1, :size]), config
        kinds.add((config.revise, config.commit))
        done += 1
    assert len(kinds) == 15


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


class Shadowed(Table):
    """Predicts 1 everywhere; where a slot's own token is hidden it says what SHOULD stand there."""

    def __init__(self):
        super().__init__(torch.zeros(1, 5))

    def logits(self, tokens, slots):
        best = torch.ones_like(tokens)
        length = int(slots[0].argmax()) + 1
        best[:, length:] = torch.where(slots[:, length:] == 0, 1, 3)  # a shadow doubts all but slot 0
        return 6.0 * torch.nn.functional.one_hot(best, 5).float() - torch.arange(tokens.shape[1])[:, None] * 1e-3


def test_verify_masks_again_what_everything_else_contradicts_and_always_fewer_than_were_written():
    config = SamplingConfig(gen_length=6, block_length=6, steps=3, revise="verify", verify_threshold=0.5)
    states = list(denoise(Shadowed(), Canvas.from_prompts([[]], 6, 4), config))
    assert states[0].revised.sum() == 0  # nothing was committed before the first pass
    for state in states[1:]:
        assert state.revised.sum() < max(1, state.committed.sum())
        assert not state.revised[0, 0]
    assert states[1].revised.sum() == 1  # two were written, one is doubted
    assert not states[-1].canvas.masked.any()


def test_verify_repairs_a_text_that_came_without_a_mask():
    canvas = Canvas.from_prompts([[]], 6, 4)
    wrong = torch.tensor([[1, 1, 2, 0, 1, 2]])
    config = SamplingConfig(gen_length=6, block_length=6, revise="verify", verify_threshold=0.5)
    states = list(denoise(Shadowed(), dataclasses.replace(canvas, tokens=wrong), config))
    assert states[0].revised.sum() == 5  # all but slot 0, and fewer than the six
    assert states[-1].canvas.tokens.tolist() == [[1] * 6]
    assert not states[-1].canvas.masked.any()


def test_edit_with_shadows_mends_what_a_prediction_that_sees_it_repeats():
    """Fault: a model trained on masks alone repeats the token that it sees, so that edit never found another."""
    canvas, wrong = Canvas.from_prompts([[]], 6, 4), torch.tensor([[1, 1, 2, 0, 1, 2]])
    filled = dataclasses.replace(canvas, tokens=wrong)
    config = SamplingConfig(gen_length=6, block_length=6, revise="edit", edit_shadow=True, edit_threshold=0.5)
    states = list(denoise(Shadowed(), filled, config))
    assert states[0].revised.tolist() == [[False, True, True, True, True, True]]  # shadows say 1, 3, 3, 3, 3, 3
    assert states[-1].canvas.tokens.tolist() == [[1, 3, 3, 3, 3, 3]] and len(states) == 2
    seen = list(denoise(Shadowed(), filled, dataclasses.replace(config, edit_shadow=False)))
    assert seen[-1].canvas.tokens.tolist() == [[1] * 6]  # what it says where it sees the token


@pytest.mark.parametrize("steps", [2, 5])
def test_steps_are_the_passes_of_remask_over_a_text_that_came_without_a_mask(steps):
    """Fault: they were ignored there, and the rule took as many passes as there are places."""
    canvas = Canvas.from_prompts([[]], 6, 4)
    filled = dataclasses.replace(canvas, tokens=torch.tensor([[1, 1, 2, 0, 1, 2]]))
    config = SamplingConfig(
        gen_length=6, block_length=6, steps=steps, commit="ancestral", revise="remask", remask="rescale", remask_eta=0.5
    )
    *_, last = denoise(Shadowed(), filled, config)
    assert 1 <= int(last.nfe[0]) <= steps and not last.canvas.masked.any()
    [row] = Batch(Shadowed(), vocab_size=None, eos_token_ids=()).join(filled, config)
    assert row.times == (1.0, 1 - 1 / steps)


def test_a_shadow_sees_all_but_its_own_slot():
    """Its prediction is that of a canvas where this slot alone is masked, if the model does not look at shadows."""
    from dlm.models.attention import full
    from dlm.sampling.step import Request, compute_shadows

    model = tiny_model(2)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    canvas = Canvas(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool), MASK)
    slots = torch.tensor([[1, 4]])
    request = Request(None, None, slots, [2], torch.ones_like(slots, dtype=torch.bool), None)
    with torch.no_grad():
        logits, shadows = compute_shadows(model, canvas, request, full)
        plain = (model.predict if hasattr(model, "predict") else model)(tokens)
        assert torch.allclose(logits[0], plain[0, [1, 4]])
        # one layer alone would make it the masked canvas exactly; with two, others have seen the slot's token
        assert not torch.allclose(shadows, logits)
        other = tokens.clone()
        other[0, 1] = 9
        changed = Canvas(other, canvas.editable, canvas.valid, MASK)
        one = tiny_model(2, n_layers=1)
        a = compute_shadows(one, canvas, request, full)[1]
        b = compute_shadows(one, changed, request, full)[1]
        assert torch.allclose(a[0, 0], b[0, 0])  # its own token is not seen
        assert not torch.allclose(a[0, 1], b[0, 1])  # the other shadow sees it


@pytest.mark.parametrize(
    "options",
    [
        {"revise": "verify", "cfg_scale": 1.0},
        {"revise": "edit", "edit_shadow": True, "cfg_scale": 1.0},
        {"revise": "edit", "edit_shadow": 1},
        {"revise": "remask", "remask": "confidence", "confidence": "entropy"},
        {"revise": "remask", "remask_eta": 1.5},
        {"revise": "undo"},
    ],
)
def test_contradictions_are_refused(options):
    with pytest.raises(ValueError):
        SamplingConfig(**options)


# --- with caches ---------------------------------------------------------------------------------------------------

RULES = [
    {"revise": "edit", "edit_threshold": 0.0, "max_post_passes": 3},
    {"revise": "edit", "edit_threshold": 0.0, "max_post_passes": 3, "edit_shadow": True},
    {"revise": "remask", "remask_eta": 0.5, "steps": 12},
    {"revise": "verify", "verify_threshold": 1.0, "steps_per_block": 2},  # it masks fewer than a pass commits
]


def canvases(rng):
    rows = [[rng.randrange(MASK) for _ in range(rng.randint(1, 5))] + [MASK] * 7 for _ in range(2)]
    rows[1][-2] = 3  # given text in the middle of the region
    return Canvas.from_templates(rows, MASK)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["revise"])
def test_block_causal_with_its_cache_is_recomputing_everything(rule):
    model, revised = tiny_model(2, block_length=5, sharp=2.5), 0
    for seed in range(6):
        canvas = canvases(random.Random(seed))
        plain = list(denoise(model, canvas, SamplingConfig(method="none", seed=seed, **rule)))
        cached = list(denoise(model, canvas, SamplingConfig(method="block_causal", seed=seed, **rule)))
        assert len(plain) == len(cached)
        for a, b in zip(plain, cached, strict=True):
            assert torch.equal(a.canvas.tokens, b.canvas.tokens)
            revised += int(b.revised.sum())
        assert int(cached[-1].positions_computed.sum()) < int(plain[-1].positions_computed.sum())
    assert revised > 0


@pytest.mark.parametrize("method", ["prefix", "dual", "vicinity", "c2f", "block_causal"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["revise"])
def test_no_key_of_a_revised_place_is_read(rule, method):
    """Every slot that a pass can see has the keys of what stands there, however often that was changed."""
    causal = method == "block_causal"
    model, revised = Watch(tiny_model(2, sharp=2.5, **({"block_length": 5} if causal else {}))), 0
    guidance = 0.0 if rule["revise"] == "verify" or "edit_shadow" in rule else 0.5
    for seed in range(3):
        canvas, config = canvases(random.Random(seed)), SamplingConfig(
            method=method, block_length=5, window=1, seed=seed, cfg_scale=guidance,
            **rule,
        )  # fmt: skip
        model.stored.clear()
        states = denoise(model, canvas, config)

        def reach(state, row):
            return 1 + max(slot for index, slot in model.stored if index == row)

        for state in model.follow(states, canvas, reach if causal else None):
            revised += int(state.revised.sum())
        assert not state.canvas.masked.any()
    assert revised > 0


def test_shadows_beside_a_cache_are_those_of_a_whole_pass():
    from dlm.models.attention import full
    from dlm.models.kv_cache import KVCache
    from dlm.sampling.step import Request, compute_shadows

    model, canvas = tiny_model(2), canvases(random.Random(1))
    slots = canvas.masked.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :4].sort(dim=1).values
    request = Request(None, None, slots, [4, 4], torch.ones_like(slots, dtype=torch.bool), canvas.valid)
    with torch.no_grad():
        cache = KVCache(2, canvas.tokens.shape[1])
        for a, b in zip(
            compute_shadows(model, canvas, request, full), compute_shadows(model, canvas, request, full, cache),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a, b)

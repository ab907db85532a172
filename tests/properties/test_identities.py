"""What must be equal whatever the settings: each identity over 200 random ones, and every method against the oracle.

Models compute in float64, so that two ways to the same number differ by 1e-15 and no decision hangs on rounding.
"""

import dataclasses
import random

import pytest
import torch

import dlm
from dlm import Canvas, SamplingConfig, generate
from tests.helpers import oracle
from tests.helpers.toys import MASK, tiny_model, trace

N = 200
FULL_ATTENTION = ("none", "prefix", "dual", "vicinity", "c2f")


@pytest.fixture(scope="module")
def models():
    return [tiny_model(seed, n_layers=2) for seed in range(4)]


def prompt(rng, longest=9):
    return [rng.randrange(38) for _ in range(rng.randint(1, longest))]


def template(rng, longest=12):
    """Its first token is given: with nothing but masks in sight all places are the same, and rounding decides."""
    given, *rest = prompt(rng, longest)
    return [given, *(MASK if rng.random() < 0.5 else token for token in rest), MASK]


def commit_settings(rng):
    commit = rng.choice(["quota", "quota", "threshold", "factor", "entropy_bound"])
    extra = {
        "quota": {},
        "threshold": {"threshold": rng.choice([0.3, 0.6, 0.9])},
        "factor": {"factor": rng.choice([0.5, 1.0, 2.0])},
        "entropy_bound": {"entropy_bound": rng.choice([0.1, 1.0, 4.0])},
    }[commit]
    if commit != "entropy_bound":
        choices = ["probability", "margin"] if commit == "factor" else ["probability", "margin", "entropy", "random"]
        extra["confidence"] = rng.choice(choices)
    return {"commit": commit} | extra


def sampling_settings(rng):
    """Everything that does not touch blocks, passes and method."""
    found = commit_settings(rng)
    if rng.random() < 0.5:
        found["temperature"] = rng.choice([0.3, 1.0])
        found["top_k"] = rng.choice([None, 5])
        found["top_p"] = rng.choice([None, 0.9])
        found["tempered_confidence"] = rng.random() < 0.5
    if rng.random() < 0.3:
        found["cfg_scale"] = rng.choice([0.5, 2.0])
    found["seed"] = rng.randrange(1000)
    found["eos_token_id"] = rng.randrange(38)
    for option in ("suppress_eos", "delay_eos"):
        found[option] = rng.random() < 0.15
    return found


def same(one, other, *, nfe=True):
    assert one.sequences.tolist() == other.sequences.tolist()
    if nfe:
        assert one.nfe.tolist() == other.nfe.tolist()


@pytest.mark.parametrize("chunk", range(4))
def test_oracle_agrees(models, chunk):
    """Tokens, commit steps, passes and slots computed of a second implementation, for 200 random settings a method."""
    rng = random.Random(chunk)
    networks = [oracle.Network.of(model) for model in models]
    for number in range(N // 4):
        which = rng.randrange(4)
        row, block = prompt(rng), rng.choice([1, 2, 3, 4, 8])
        blocks = rng.randint(1, max(1, 12 // block))
        length = block * blocks
        options = {
            "gen_length": length,
            "steps": rng.choice([blocks, length, rng.randint(blocks, length + 3)]),
            "block_length": block,
            "cfg_scale": rng.choice([0.0, 0.0, 1.5]),
        }
        choice = commit_settings(rng)
        if choice.get("confidence") == "random":
            choice["confidence"] = "probability"
        options |= choice
        window, eos = rng.choice([0, 1, 3, 16]), rng.randrange(38)
        for method in FULL_ATTENTION:
            config = SamplingConfig(**options, method=method, window=window, eos_token_id=eos)
            settings = oracle.Settings(
                **options | {"confidence": options.get("confidence", "entropy")},
                method=method,
                window=window,
                eos=(eos,),
            )
            want = oracle.generate(networks[which], row, MASK, settings)
            states, steps = trace(models[which], Canvas.from_prompts([row], length, MASK), config, eos_token_ids=(38,))
            said = (chunk, number, config)
            assert states[-1].canvas.tokens[0, len(row) :].tolist() == want.tokens, said
            assert steps[0, len(row) :].tolist() == want.commit_step, said
            assert states[-1].nfe.tolist() == [want.nfe], said
            branches = 2 if options["cfg_scale"] else 1
            assert int(states[-1].positions_computed) in (
                sum(map(len, want.passes)),
                branches * sum(map(len, want.passes)),
            ), said


def test_coarse_to_fine_is_dual_where_one_block_is_everything(models):
    rng = random.Random(1)
    for _ in range(N):
        length = rng.randint(1, 10)
        options = {"gen_length": length, "block_length": length, "steps": rng.randint(1, length)} | sampling_settings(
            rng
        )
        rows = [prompt(rng) for _ in range(rng.choice([1, 1, 3]))]
        model = rng.choice(models)
        both = [generate(model, rows, SamplingConfig(**options, method=method)) for method in ("c2f", "dual")]
        same(*both)


def test_dual_is_none_where_every_block_takes_one_pass(models):
    rng = random.Random(2)
    for _ in range(N):
        block, blocks = rng.randint(1, 5), rng.randint(1, 4)
        options = sampling_settings(rng) | {"commit": "quota"}
        options |= {"gen_length": block * blocks, "block_length": block, "steps": blocks}
        rows = [prompt(rng) for _ in range(rng.choice([1, 1, 3]))]
        model = rng.choice(models)
        results = [
            generate(model, rows, SamplingConfig(**options, method=m)) for m in ("none", "dual", "prefix", "vicinity")
        ]
        for other in results[1:]:
            same(results[0], other)


def test_prefix_is_dual_where_one_block_is_left(models):
    rng = random.Random(3)
    for _ in range(N):
        block, left = rng.randint(2, 6), rng.randint(1, 6)
        block = max(block, left)
        options = sampling_settings(rng) | {"gen_length": left, "block_length": block, "steps": rng.randint(1, left)}
        # What earlier blocks generated is given: a template whose last places are masked.
        rows = [prompt(rng, 14) + [MASK] * left for _ in range(rng.choice([1, 1, 3]))]
        canvas, model = Canvas.from_templates(rows, MASK), rng.choice(models)
        both = [generate(model, canvas, SamplingConfig(**options, method=method)) for method in ("prefix", "dual")]
        same(*both)
        assert torch.equal(both[0].positions_computed, both[1].positions_computed)


@pytest.mark.parametrize(("window", "method", "seed"), [(100, "none", 4), (0, "dual", 5)])
def test_vicinity_of_everything_is_none_and_of_nothing_is_dual(models, window, method, seed):
    rng = random.Random(seed)
    for _ in range(N // 2):
        options = sampling_settings(rng) | {"gen_length": 8, "block_length": 4, "steps": rng.randint(2, 8)}
        rows, model = [prompt(rng) for _ in range(2)], rng.choice(models)
        same(
            generate(model, rows, SamplingConfig(**options, method="vicinity", window=window)),
            generate(model, rows, SamplingConfig(**options, method=method)),
        )


@pytest.mark.parametrize("infill", [False, True])
def test_cached_block_causal_is_uncached(infill):
    """One that the cache makes exact: prompts of any length, blocks counted from slot 0, every commit rule."""
    rng = random.Random(6 + infill)
    models = {size: tiny_model(size, block_length=size) for size in (1, 2, 3, 4, 8)}
    fewer = 0
    for _ in range(N):
        size = rng.choice(list(models))
        length = rng.randint(1, 10)
        options = sampling_settings(rng) | {"gen_length": length, "block_length": rng.choice([None, size])}
        if rng.random() < 0.5:
            options["steps"] = length + 2
        rows = [prompt(rng, 11) for _ in range(rng.choice([1, 3]))]
        if infill:
            canvas = Canvas.from_templates([template(rng) for _ in rows], MASK)
        else:
            canvas = Canvas.from_prompts(rows, length, MASK)
        options["steps"] = None if infill else options.get("steps")
        cached = generate(models[size], canvas, SamplingConfig(**options, method="block_causal"))
        uncached = generate(models[size], canvas, SamplingConfig(**options, method="none"))
        same(cached, uncached)
        assert (cached.positions_computed <= uncached.positions_computed).all()
        fewer += int((cached.positions_computed < uncached.positions_computed).sum())
    assert fewer > N / 2


def test_block_causal_equals_the_oracle():
    """Whole blocks after a prompt of whole blocks: nothing cached is wrong, against a network that recomputes all."""
    rng = random.Random(8)
    model = tiny_model(3, block_length=4)
    network = oracle.Network.of(model)
    for _ in range(40):
        row = [rng.randrange(38) for _ in range(4 * rng.randint(1, 2))]
        options = {"gen_length": 8, "steps": rng.randint(2, 8), "block_length": 4} | commit_settings(rng)
        if options.get("confidence") == "random":
            options["confidence"] = "margin"
        settings = oracle.Settings(**options | {"confidence": options.get("confidence", "entropy")})
        want = oracle.generate(network, row, MASK, settings)
        for method in ("none", "block_causal"):
            out = generate(model, [row], SamplingConfig(**options, method=method))
            assert out.sequences[0].tolist() == want.tokens
            assert out.nfe.tolist() == [want.nfe]


@pytest.mark.parametrize("method", [*FULL_ATTENTION, "block_causal"])
def test_a_batch_of_ragged_rows_is_each_row_alone(models, method):
    rng = random.Random(len(method))
    causal = tiny_model(9, block_length=4)
    for _ in range(N // 5):
        block = 4 if method == "block_causal" else rng.randint(1, 5)
        length = rng.randint(1, 9)
        config = SamplingConfig(**sampling_settings(rng), gen_length=length, block_length=block, method=method,
                                window=rng.choice([1, 16]), stop_at_eos=rng.random() < 0.3)  # fmt: skip
        model = causal if method == "block_causal" else rng.choice(models)
        rows = [prompt(rng, 12) for _ in range(rng.randint(2, 5))]
        if rng.random() < 0.4:  # infilling, with different numbers of blanks
            rows = [template(rng) for _ in rows]
            canvas = Canvas.from_templates(rows, MASK)
            alone = [Canvas.from_templates([row], MASK) for row in rows]
        else:
            canvas = Canvas.from_prompts(rows, length, MASK)
            alone = [Canvas.from_prompts([row], length, MASK) for row in rows]
        together = generate(model, canvas, config)
        for i, one in enumerate(alone):
            single = generate(model, one, dataclasses.replace(config, seed=config.seed + i))
            width = one.tokens.shape[1]
            assert together.canvas.tokens[i, :width].tolist() == single.canvas.tokens[0].tolist(), config
            assert together.nfe[i] == single.nfe[0]
            assert together.tokens_per_forward[i] == single.tokens_per_forward[0]


def test_order_of_rows_does_not_matter(models):
    rng = random.Random(11)
    for _ in range(N // 4):
        config = SamplingConfig(**sampling_settings(rng) | {"seed": (5, 6, 7)}, gen_length=6, block_length=3)
        rows, model = [prompt(rng) for _ in range(3)], rng.choice(models)
        one = generate(model, rows, config)
        other = generate(model, rows[::-1], dataclasses.replace(config, seed=config.seed[::-1]))
        assert torch.equal(one.sequences, other.sequences.flip(0))


def test_infilling_keeps_every_given_token(models):
    rng = random.Random(12)
    for _ in range(N):
        rows = [template(rng) for _ in range(rng.randint(1, 3))]
        rng.shuffle(rows[0])
        canvas = Canvas.from_templates(rows, MASK)
        config = SamplingConfig(
            **sampling_settings(rng), block_length=rng.randint(1, 6), method=rng.choice(FULL_ATTENTION)
        )
        out = generate(rng.choice(models), canvas, config)
        final = out.canvas.tokens
        for i, row in enumerate(rows):
            filled = final[i, : len(row)].tolist()
            assert all(a == b for a, b in zip(filled, row, strict=True) if b != MASK)
            assert MASK not in filled
            blanks = [a for a, b in zip(filled, row, strict=True) if b == MASK]
            assert out.sequences[i, : len(blanks)].tolist() == blanks


@pytest.mark.parametrize("method", FULL_ATTENTION)
def test_infilling_the_end_is_extension(models, method):
    rng = random.Random(13)
    for _ in range(N // 5):
        length = rng.randint(1, 9)
        config = SamplingConfig(
            **sampling_settings(rng), gen_length=length, block_length=rng.randint(1, 5), method=method
        )
        rows, model = [prompt(rng) for _ in range(rng.randint(1, 3))], rng.choice(models)
        extended = generate(model, rows, config)
        filled = generate(model, Canvas.from_templates([row + [MASK] * length for row in rows], MASK), config)
        same(extended, filled)


def test_fixed_point_of_the_package():
    """The names used above are the public ones."""
    for name in ("load", "generate", "denoise", "SamplingConfig", "GenerationOutput", "DenoiseState", "Canvas"):
        assert hasattr(dlm, name)

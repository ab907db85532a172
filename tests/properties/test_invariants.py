"""2,000 random valid settings: generation ends, never says the mask, never changes what was given, repeats itself."""

import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, generate
from tests.helpers.toys import MaskLover, Recorder, tiny_model, trace

VOCAB, REAL, MASK = 16, 13, 12  # embeddings; ids of the tokenizer; the mask, its last one
N = 2000


def tiny(seed, **changes):
    options = {"d_model": 8, "n_heads": 2, "n_kv_heads": 1, "n_layers": 1, "mlp_hidden_size": 12, "sharp": 3.0}
    sizes = {"vocab_size": VOCAB, "embedding_size": VOCAB, "mask_token_id": MASK, "eos_token_id": 3, "pad_token_id": 3}
    return tiny_model(seed, dtype=torch.float32, **options | sizes | changes)


def settings(rng, length, block):
    """Any settings at all; those that do not go together are refused by SamplingConfig itself."""
    return {
        "gen_length": length,
        "block_length": block,
        "steps": rng.choice([None, length, -(-length // block), rng.randint(-(-length // block), 2 * length + 1)]),
        "method": rng.choice(["none", "prefix", "dual", "vicinity", "c2f"]),
        "commit": rng.choice(["quota", "threshold", "factor", "entropy_bound"]),
        "split": rng.choice(["remainder_first", "rounded"]),
        "threshold": rng.choice([0.0, 0.3, 0.9, 1.0]),
        "factor": rng.choice([0.01, 1.0, 30.0]),
        "entropy_bound": rng.choice([0.0, 0.5, 100.0]),
        "confidence": rng.choice([None, None, "probability", "margin", "entropy", "random"]),
        "temperature": rng.choice([0.0, 0.0, 1e-4, 0.7, 1.0, 1000.0]),
        "tempered_confidence": rng.random() < 0.3,
        "top_k": rng.choice([None, None, 1, 3, 100]),
        "top_p": rng.choice([None, None, 1e-6, 0.5, 1.0]),
        "cfg_scale": rng.choice([0.0, 0.0, 0.5, 20.0]),
        "window": rng.choice([0, 2, 16]),
        "seed": rng.randrange(10**9),
        "stop_at_eos": rng.random() < 0.3,
        "eos_token_id": rng.choice([3, 3, (3, 5), 0]),
        "suppress_eos": rng.random() < 0.15,
        "delay_eos": rng.random() < 0.2,
    }


def canvas_of(rng, length):
    rows = [[rng.randrange(MASK) for _ in range(rng.randint(0, 7))] for _ in range(rng.choice([1, 1, 2, 4]))]
    if rng.random() < 0.3:
        rows = [[MASK if rng.random() < 0.5 else t for t in row] + [MASK] for row in rows]
        for row in rows:
            rng.shuffle(row)
        return Canvas.from_templates(rows, MASK), True
    return Canvas.from_prompts(rows, length, MASK), False


def check(model, canvas, config, infill):
    """Runs and checks one generation; returns its final tokens."""
    states, steps = trace(model, canvas, config, vocab_size=REAL)
    final = states[-1].canvas
    before = canvas.tokens
    nfe = torch.zeros(len(before), dtype=torch.int64)
    for number, state in enumerate(states, 1):
        assert state.step == number
        spent = state.nfe - nfe
        assert ((spent == 0) | (spent == 1)).all()
        assert ((spent > 0) == state.committed.any(1)).all(), "a pass that commits nothing"
        changed = state.canvas.tokens != before
        assert not (state.committed & ~changed).any(), "a place was committed twice"
        filled = changed & ~state.committed  # after a row's early end, with end of text
        assert not filled.any() or (config.stop_at_eos and (before[filled] == MASK).all()), "a committed token changed"
        assert not (state.committed & ~(canvas.editable & canvas.valid)).any()
        assert torch.isfinite(state.confidence).all()
        before, nfe = state.canvas.tokens, state.nfe
    generated = final.tokens[canvas.editable & canvas.valid]
    assert (final.tokens == canvas.tokens)[~canvas.editable].all(), "a given token changed"
    ended = config.stop_at_eos
    assert ended or not final.masked.any()
    assert ended or (steps > 0).sum() == canvas.masked.sum()
    assert (generated[generated != MASK] < REAL).all()
    assert (generated >= 0).all()
    assert ended or (generated != MASK).all()
    if config.commit == "quota" and config.steps:
        assert (nfe <= config.steps).all() or infill
    assert (nfe <= canvas.masked.sum(1)).all()
    return final.tokens, generated, nfe


def run(seed, count, models, **changes):
    rng, done, refused, over_vocabulary = random.Random(seed), 0, [], 0
    while done < count:
        length, block = rng.randint(1, 8), rng.randint(1, 9)
        options = settings(rng, length, block) | changes
        try:
            config = SamplingConfig(**options)
        except ValueError as error:
            refused.append(str(error))
            continue
        canvas, infill = canvas_of(rng, length)
        if infill and config.steps:
            needed = max(-(-int(n) // block) for n in canvas.masked.sum(1))
            config = SamplingConfig(**options | {"steps": max(config.steps, needed)})
        model = rng.choice(models)
        tokens, _, nfe = check(model, canvas, config, infill)
        if done % 10 == 0:
            again, _, same_nfe = check(model, canvas, config, infill)
            assert torch.equal(again, tokens)
            assert torch.equal(nfe, same_nfe)
        if done % 7 == 0:
            out = generate(model, canvas, config)
            assert MASK not in out.sequences
            over_vocabulary += int((out.sequences >= REAL).any())  # without a vocabulary size, nothing is past it
        done += 1
    return refused, over_vocabulary


@pytest.mark.parametrize("part", range(4))
def test_random_settings(part):
    refused, over_vocabulary = run(part, N // 4, [tiny(seed) for seed in range(3)])
    assert over_vocabulary > 0  # the rule against it was needed
    # What is refused is refused for a reason: an entropy bound of something else, a factor of what is no probability.
    assert all("commit" in said and "confidence" in said for said in refused)
    assert len(refused) < N // 4


def test_all_weight_on_the_mask():
    models = [MaskLover(VOCAB, MASK, other) for other in (0.0, -1e30)]
    weights = tiny(0)
    with torch.no_grad():  # and a real transformer, with every cache
        weights.model.transformer.ff_out.weight[MASK] = 0
        weights.model.transformer.ff_out.weight[:MASK] *= 1e-3
        weights.model.transformer.ln_f.weight.fill_(1)
    run(99, 150, [*models, weights])
    run(98, 50, [MaskLover(VOCAB, MASK, float("-inf"))], cfg_scale=0.0)  # guidance would be -inf minus -inf


@pytest.mark.parametrize("mask_id", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.5, 1.0, 1e6])
@pytest.mark.parametrize("other", [0.0, -1e30, float("-inf")])
def test_all_weight_on_the_mask_whatever_its_id(mask_id, temperature, other):
    for commit in ("quota", "threshold", "factor", "entropy_bound"):
        for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"tempered_confidence": True}, {"cfg_scale": 2.0}):
            if other == float("-inf") and "cfg_scale" in options:
                continue  # -inf minus -inf is no number: an error of its own
            config = SamplingConfig(gen_length=4, block_length=2, temperature=temperature, commit=commit, **options)
            out = generate(MaskLover(5, mask_id, other), Canvas.from_prompts([[1]], 4, mask_id), config)
            assert mask_id not in out.sequences
            assert (out.nfe <= 4).all()


def test_block_causal_models():
    rng = random.Random(5)
    models = {size: tiny(size, block_length=size) for size in (1, 3, 4)}
    for _ in range(100):
        size, length = rng.choice(list(models)), rng.randint(1, 8)
        options = settings(rng, length, size) | {"method": rng.choice(["none", "block_causal"]), "steps": None}
        try:
            config = SamplingConfig(**options)
        except ValueError:
            continue
        canvas, infill = canvas_of(rng, length)
        check(models[size], canvas, config, infill)


def test_different_seeds_differ():
    model = tiny(1)
    config = {"gen_length": 8, "block_length": 4, "temperature": 1.0}
    seen = {tuple(generate(model, [[1]], SamplingConfig(**config, seed=s)).sequences[0].tolist()) for s in range(20)}
    assert len(seen) > 10


def test_forward_passes_counted_are_those_made():
    for method in ("none", "prefix", "dual", "vicinity", "c2f"):
        model = Recorder(tiny(2))
        out = generate(
            model,
            Canvas.from_prompts([[1, 2, 3]], 8, MASK),
            SamplingConfig(gen_length=8, block_length=4, steps=5, method=method),
        )
        assert out.nfe.tolist() == [len(model.calls)] == [5]
        assert out.positions_computed.tolist() == [sum(call[0].shape[1] for call in model.calls)]

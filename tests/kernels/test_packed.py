"""The packed copy of the model: the same predictions and tokens as the plain path, and never of old weights."""

import random

import pytest
import torch

import dlm
from dlm import Canvas, SamplingConfig
from dlm.kernels import packed as copies
from dlm.kernels import packing
from dlm.kernels.linear import has_kernels
from dlm.kernels.packed import Packed
from dlm.kernels.packing import Direct, packed
from dlm.models.attention import block_causal
from dlm.models.kv_cache import KVCache
from tests.helpers.toys import MASK, tiny_model

LENGTH = 9
SHAPES = [
    {},
    {"n_kv_heads": 1},
    {"n_kv_heads": 4, "include_bias": True},
    {"attention_layer_norm": True, "include_qkv_bias": True},
    {"weight_tying": True, "scale_logits": True, "input_emb_norm": True},
    {"block_length": 4, "n_layers": 1},
    {"embedding_size": 64},
]

pytestmark = pytest.mark.skipif(not has_kernels(torch.float32), reason="oneDNN is not in this torch")


def model_of(seed=0, dtype=torch.float32, **changes):
    return tiny_model(seed, dtype=dtype, **changes)


def ids(rows, seed=0):
    return torch.randint(0, 39, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def close(got, want, tolerance=2e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_logits_are_the_models(changes):
    model, tokens = model_of(1, **changes), ids(2)
    copy = packed(model)
    assert type(copy) is Packed
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 6:] = False
    some = torch.tensor([[5, 2], [0, 4]])  # places asked about, each row its own
    for more in ({}, {"valid": valid}, {"visible": block_causal(3)}, {"visible": block_causal(2), "valid": valid}):
        close(copy(tokens, **more), model.predict(tokens, **more))
        close(copy(tokens, **more, logits_to_keep=some), model.predict(tokens, **more, logits_to_keep=some))
        kept = tokens > 15
        close(copy(tokens, **more, logits_to_keep=kept), model.predict(tokens, **more, logits_to_keep=kept))


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_with_a_cache(changes):
    """Every slot, then some slots of a changed canvas on what was stored; all rows, then one row alone."""
    model, tokens = model_of(2, **changes), ids(3)
    copy, caches = packed(model), [KVCache(3, LENGTH), KVCache(3, LENGTH)]
    every = torch.arange(LENGTH).expand(3, LENGTH)
    close(copy(tokens, every, cache=caches[0]), model.predict(tokens, every, cache=caches[1]))
    slots = torch.tensor([[2, 4, 5], [4, 7, 0], [1, 2, 3]])
    other, asked = (tokens.gather(1, slots) + 3) % 39, torch.tensor([[1], [2], [0]])
    for rows in (None, torch.tensor([1])):
        here = slice(None) if rows is None else rows
        got, want = (
            predictor(other[here], slots[here], cache=cache.at(rows), logits_to_keep=asked[here])
            for predictor, cache in zip((copy, model.predict), caches, strict=True)
        )
        close(got, want)


def test_a_cache_needs_positions():
    with pytest.raises(ValueError, match="positions"):
        packed(model_of())(ids(1), cache=KVCache(1, LENGTH))


@pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="bf16 is slow on this processor")
@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("widest", [0, 2**24])
@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_model_is(changes, widest, monkeypatch):
    monkeypatch.setattr(copies, "WIDEST", widest)  # 0: attention by the fused kernel
    exact, tokens = model_of(3, sharp=0.7, **changes), ids(2)
    want = exact(tokens)
    model = model_of(3, sharp=0.7, **changes).bfloat16()
    copy = packed(model)
    assert type(copy) is Packed
    rough, ours = (model.predict(tokens) - want).abs().mean(), (copy(tokens) - want).abs().mean()
    assert ours < 1.5 * rough


# ---------------------------------------------------------------- generation


METHODS = ("none", "prefix", "dual", "vicinity", "c2f")


@pytest.mark.parametrize("method", METHODS)
def test_generation_gives_the_tokens_of_the_plain_path(method):
    """Ragged rows, guidance, sampling, every commit rule: `eager` attention keeps the plain model."""
    rng = random.Random(method)
    models = [model_of(seed, n_kv_heads=rng.choice([1, 2, 4])) for seed in range(2)]
    for _ in range(12):
        model = rng.choice(models)
        config = SamplingConfig(
            gen_length=12,
            block_length=rng.choice([3, 4, 12]),
            steps=rng.choice([4, 6, 12]),
            method=method,
            commit=rng.choice(["quota", "threshold", "factor", "entropy_bound"]),
            temperature=rng.choice([0.0, 0.0, 0.7]),
            cfg_scale=rng.choice([0.0, 0.0, 1.5]),
            window=2,
            seed=rng.randrange(99),
        )
        prompts = [[rng.randrange(38) for _ in range(rng.randint(1, 6))] for _ in range(rng.choice([1, 3]))]
        model.config._attn_implementation = "sdpa"
        assert type(packed(model)) is Packed
        got = dlm.generate(model, prompts, config)
        model.config._attn_implementation = "eager"
        assert type(packed(model)) is Direct
        assert got.sequences.tolist() == dlm.generate(model, prompts, config).sequences.tolist(), config


def test_block_causal_generation_gives_the_tokens_of_the_plain_path():
    model = model_of(4, block_length=4)
    for method in ("none", "block_causal"):
        config = SamplingConfig(gen_length=13, method=method, steps=8)
        model.config._attn_implementation = "sdpa"
        got = dlm.generate(model, [[1, 2, 3], [4], [5, 6, 7, 8, 9]], config)
        model.config._attn_implementation = "eager"
        want = dlm.generate(model, [[1, 2, 3], [4], [5, 6, 7, 8, 9]], config)
        assert got.sequences.tolist() == want.sequences.tolist()


def test_a_row_is_what_it_is_alone():
    model = model_of(5)
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    for method in METHODS:
        config = SamplingConfig(gen_length=8, block_length=4, steps=4, method=method)
        together = dlm.generate(model, prompts, config).sequences.tolist()
        assert together == [dlm.generate(model, [prompt], config).sequences[0].tolist() for prompt in prompts]


def test_a_model_that_reads_very_many_slots_takes_no_memory_for_them(monkeypatch):
    """A table of rotary angles for each of max_sequence_length slots was gigabytes for 10^9; it grows when needed."""
    monkeypatch.setattr(copies, "TURNS", 4)
    model, far = model_of(4), model_of(4, max_sequence_length=10**9)
    tokens, slots = ids(1), torch.arange(LENGTH)[None] + 60
    copy = packed(far)
    assert len(copy.turns) == 4
    close(copy(tokens), packed(model)(tokens))
    close(copy(tokens, slots), far.predict(tokens, slots))
    assert len(copy.turns) == 2 * (60 + LENGTH) and len(copy.shorter) == 2


# ---------------------------------------------------------------- weights that change, and models that are not packed


def write_in_place(weight):
    with torch.no_grad():
        weight.mul_(-1)


def write_past_the_counter(weight):
    weight.data.mul_(-1)  # as adapters are merged; the version counter does not move


def replace(weight):
    weight.data = -weight.data


@pytest.mark.parametrize("change", [write_in_place, write_past_the_counter, replace])
@pytest.mark.parametrize("name", ["wte.weight", "blocks.0.v_proj.weight", "blocks.1.ff_norm.weight", "ff_out.weight"])
@torch.no_grad()
def test_changed_weights_are_noticed(change, name):
    model, tokens = model_of(6), ids(1)
    old = packed(model)
    before = old(tokens)
    assert packed(model) is old  # and unchanged ones are not copied again
    change(dict(model.model.transformer.named_parameters())[name])
    after = packed(model)(tokens)
    close(after, model.predict(tokens))
    assert (after - before).abs().max() > 1e-3


def test_a_training_step_and_loaded_weights_are_noticed():
    model, tokens = model_of(7), ids(1)
    packed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.predict(tokens).square().mean().backward()
    optimizer.step()
    close(packed(model)(tokens), model.predict(tokens).detach())
    model.load_state_dict(model_of(8).state_dict())
    close(packed(model)(tokens), model.predict(tokens).detach())


def test_what_is_not_plain_keeps_its_own_path():
    assert packed(predictor := lambda tokens: None) is predictor
    for changed in (model_of().train(), model_of(dtype=torch.float64), model_of(attn_implementation="eager")):
        assert type(packed(changed)) is Direct
    hooked = model_of()
    hooked.model.transformer.blocks[0].q_proj.register_forward_hook(lambda *_: None)
    assert type(packed(hooked)) is Direct
    patched = model_of()
    patched.model.transformer.blocks[0].forward = patched.model.transformer.blocks[0].forward
    assert type(packed(patched)) is Direct
    quantised = model_of()
    quantised.model.transformer.blocks[0].ff_out = type("Other", (torch.nn.Linear,), {})(48, 32, bias=False)
    assert type(packed(quantised)) is Direct


def test_lora_is_seen_and_merged_lora_too():
    peft = pytest.importorskip("peft")
    model = model_of(9)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    canvas = Canvas.from_prompts([[1, 2, 3]], 6, MASK)
    assert type(packed(model)) is Direct  # its q_proj are adapters now
    states = list(dlm.denoise(model, canvas, SamplingConfig(gen_length=6)))
    merged = wrapped.merge_and_unload()
    assert type(packed(merged)) is Packed
    again = list(dlm.denoise(merged, canvas, SamplingConfig(gen_length=6)))
    assert states[-1].canvas.tokens.tolist() == again[-1].canvas.tokens.tolist()


def test_a_second_copy_of_a_large_model_is_announced(monkeypatch):
    """Was: a 1.17 GB file took 4.68 GB at the first generate, without a word."""
    monkeypatch.setattr(packing, "TOLD", 0)
    with pytest.warns(UserWarning, match="packing takes .* GB beside .* keeps the packed weights alone"):
        packed(model_of())


def test_the_callers_modes_change_nothing():
    """Autocast, another default type and weights of inference mode each ended in an error of torch."""

    def texts(model):
        given = {"gen_length": 8, "block_length": 4, "temperature": 0.8}
        ways = ({}, {"method": "dual", "cfg_scale": 1.0}, {"revise": "remask", "split": "time", "steps": 5})
        return [
            dlm.generate(model, [[1, 2, 3], [4]], SamplingConfig(**given, **way)).sequences.tolist() for way in ways
        ]

    want = texts(model_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert texts(model_of()) == want
    with torch.inference_mode():
        made = model_of()
    assert texts(made) == want
    model = model_of()
    torch.set_default_dtype(torch.float64)
    try:
        assert texts(model) == want
    finally:
        torch.set_default_dtype(torch.float32)

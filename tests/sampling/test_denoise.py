"""generate and denoise: what they take, what they return, when a row ends, and what they refuse."""

import dataclasses
import math

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise, generate
from tests.helpers.toys import MASK, Recorder, Table, tiny_model, trace


@pytest.fixture(scope="module")
def spoken():
    """A tokenizer trained on two sentences, and a model with more embeddings than it has tokens."""
    from dlm.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["once upon a time there was a cat", "the cat sat on the mat"], 300)
    size = len(tokenizer) + 20
    model = tiny_model(0, vocab_size=size, embedding_size=size, mask_token_id=tokenizer.mask_token_id)
    return model, tokenizer


# --- inputs and outputs ------------------------------------------------------------------------------------------


def test_kinds_of_input(tiny):
    config = SamplingConfig(gen_length=6, block_length=3)
    want = generate(tiny, [[1, 2, 3], [4, 5, 6]], config)
    assert want.sequences.shape == (2, 6)
    assert want.sequences.dtype == torch.int64
    for inputs in (
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])],
        ((1, 2, 3), (4, 5, 6)),
        Canvas.from_prompts([[1, 2, 3], [4, 5, 6]], 6, MASK),
        Canvas.from_templates([[1, 2, 3] + [MASK] * 6, [4, 5, 6] + [MASK] * 6], MASK),
    ):
        assert torch.equal(generate(tiny, inputs, config).sequences, want.sequences)


def test_text_needs_a_tokenizer(tiny):
    with pytest.raises(ValueError, match="tokenizer"):
        generate(tiny, ["abc"], SamplingConfig(gen_length=4))
    with pytest.raises(ValueError, match="tokenizer"):
        generate(tiny, "abc", SamplingConfig(gen_length=4))


def test_text(spoken):
    model, tokenizer = spoken
    config = SamplingConfig(gen_length=6, block_length=3)
    one = generate(model, "the cat", config, tokenizer=tokenizer)
    assert one.sequences.shape == (1, 6)
    two = generate(model, ["the cat", "once upon a time"], config, tokenizer=tokenizer)
    assert torch.equal(two.sequences[0], one.sequences[0])
    bos = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    assert torch.equal(generate(model, [bos], config, tokenizer=tokenizer).sequences, one.sequences)


def test_text_that_contains_the_mask_token(spoken):
    model, tokenizer = spoken
    with pytest.raises(ValueError, match="mask"):
        generate(model, f"the {tokenizer.mask_token} sat", SamplingConfig(gen_length=4), tokenizer=tokenizer)


def test_nothing_past_the_tokenizer_is_proposed(spoken):
    model, tokenizer = spoken
    config = SamplingConfig(gen_length=64, block_length=8, temperature=50.0, steps=8)
    out = generate(model, ["the cat"] * 20, config, tokenizer=tokenizer).sequences
    assert out.max() < len(tokenizer)
    assert tokenizer.mask_token_id not in out
    assert generate(model, [[1]] * 20, config).sequences.max() >= len(tokenizer)  # without it, nobody knows


def test_output_is_per_row(tiny):
    out = generate(tiny, [[1, 2, 3], [4]], SamplingConfig(gen_length=6, block_length=3, steps=4))
    assert out.nfe.tolist() == [4, 4]
    assert out.tokens_per_forward.tolist() == [1.5, 1.5]
    assert out.positions_computed.shape == (2,)
    assert isinstance(out.canvas, Canvas)
    assert not out.canvas.masked.any()
    assert out.canvas.tokens[0, 3:9].tolist() == out.sequences[0].tolist()
    assert out.canvas.tokens[1, 1:7].tolist() == out.sequences[1].tolist()
    assert out["sequences"] is out.sequences  # a ModelOutput
    assert out[0] is out.sequences


def test_default_config_generates_128_tokens():
    assert SamplingConfig().gen_length == 128
    out = generate(Table(torch.zeros(1, 5)), Canvas.from_prompts([[0]], 128, 4))
    assert out.sequences.shape == (1, 128)
    assert out.nfe.tolist() == [128]


def test_infilling_returns_what_was_filled(tiny):
    canvas = Canvas.from_templates([[1, MASK, 3, MASK, MASK], [MASK, 2]], MASK)
    out = generate(tiny, canvas, SamplingConfig(block_length=8))
    final = out.canvas.tokens
    assert out.sequences.shape == (2, 3)
    assert out.sequences[0].tolist() == final[0, [1, 3, 4]].tolist()
    assert out.sequences[1, 0] == final[1, 0]
    assert MASK not in out.sequences
    assert final[0, [0, 2]].tolist() == [1, 3]
    assert final[1, 1] == 2
    assert out.nfe.tolist() == [3, 1]
    assert out.tokens_per_forward.tolist() == [1, 1]


def test_rows_with_nothing_to_fill(tiny):
    tokens = torch.tensor([[1, 2, 3, 4], [1, MASK, MASK, 4]])
    canvas = Canvas(tokens, tokens == MASK, torch.ones_like(tokens, dtype=torch.bool), MASK)
    for method in ("none", "dual", "c2f"):
        out = generate(tiny, canvas, SamplingConfig(method=method))
        assert out.nfe.tolist() == [0, 2]
        assert out.tokens_per_forward.tolist() == [0, 1]
        assert out.canvas.tokens[0].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="mask"):
        generate(tiny, dataclasses.replace(canvas, editable=torch.zeros_like(canvas.editable)))


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
def test_padding_may_be_anywhere(tiny, method):
    """A canvas padded on the left, as others build them, generates what the prompt alone does."""
    tokens = torch.tensor([[0, 0, 5, 6, MASK, MASK, MASK]])
    canvas = Canvas(tokens, tokens == MASK, torch.tensor([[False] * 2 + [True] * 5]), MASK)
    config = SamplingConfig(gen_length=3, block_length=2, method=method, cfg_scale=0.5)
    assert torch.equal(generate(tiny, canvas, config).sequences, generate(tiny, [[5, 6]], config).sequences)


@pytest.mark.parametrize("method", ["none", "prefix", "dual"])
def test_a_shifted_model_has_its_first_guess_behind_padding_too(method):
    """It was read at padding, or with a cache at whatever slot the batch happened to compute there."""
    model = tiny_model(0, shift_logits=True)
    tokens = torch.tensor([[0, 0, MASK, MASK, MASK, MASK]])
    canvas = Canvas(tokens, tokens == MASK, tokens != 0, MASK)
    config = SamplingConfig(gen_length=4, block_length=2, method=method)
    assert torch.equal(generate(model, canvas, config).sequences, generate(model, [[]], config).sequences)


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
@pytest.mark.parametrize("more", [{}, {"draft": 2}])
def test_padding_may_be_anywhere_in_a_packed_batch_too(method, more):
    """Packed rows that lie end to end were taken to begin in slot 0: the padding was read as prompt, without a word."""
    model = tiny_model(0, dtype=torch.float32)
    rows = [[0, 0, 5, 6, *[MASK] * 6, 0, 0], [7, 7, 7, 7, *[MASK] * 8], [0, 5, 0, 6, *[MASK] * 4, 0, MASK, MASK, 0]]
    tokens = torch.tensor(rows)
    valid = tokens != 0
    more = {} if method == "c2f" else more
    config = SamplingConfig(gen_length=6, block_length=2, method=method, cfg_scale=0.5, temperature=0.7, seed=1, **more)
    got = generate(model, Canvas(tokens, tokens == MASK, valid, MASK), config)
    for i, (prompt, length) in enumerate((([5, 6], 6), ([7] * 4, 8))):
        alone = generate(model, [prompt], dataclasses.replace(config, gen_length=length, seed=1 + i))
        assert torch.equal(got.sequences[i, :length], alone.sequences[0])
    alone = Canvas(tokens[2:], tokens[2:] == MASK, valid[2:], MASK)  # a gap: positions are those of the slots
    plain = tiny_model(0, dtype=torch.float32, attn_implementation="eager")
    for tried in (model, plain):
        want = generate(tried, alone, dataclasses.replace(config, seed=3)).sequences[0]
        assert torch.equal(got.sequences[2, : len(want)], want)


def test_generation_goes_on_from_a_half_filled_canvas(tiny):
    config = SamplingConfig(gen_length=6, block_length=6)
    states = list(denoise(tiny, Canvas.from_prompts([[1, 2]], 6, MASK), config))
    rest = generate(tiny, states[2].canvas, config)
    assert rest.nfe.tolist() == [3]
    assert torch.equal(rest.canvas.tokens, states[-1].canvas.tokens)


def test_states(tiny):
    canvas = Canvas.from_prompts([[1, 2, 3], [4]], 8, MASK)
    before, total = canvas.tokens.clone(), 0
    for number, state in enumerate(denoise(tiny, canvas, SamplingConfig(gen_length=8, block_length=4, steps=4)), 1):
        assert state.step == number
        assert state.nfe.tolist() == [number, number]
        assert state.block.tolist() == [(number - 1) // 2] * 2
        assert state.committed.sum(1).tolist() == [2, 2]
        assert torch.equal(state.canvas.tokens != before, state.committed)
        assert (state.confidence[state.committed] > 0).all()
        assert (state.confidence[~state.committed] == 0).all()
        before = state.canvas.tokens.clone()
        total += 1
    assert total == 4
    assert canvas.masked.sum() == 16  # what was passed in is as it was


def test_states_do_not_change_after_they_are_yielded(tiny):
    canvas = Canvas.from_prompts([[1, 2, 3]], 6, MASK)
    states, copies = [], []
    for state in denoise(tiny, canvas, SamplingConfig(gen_length=6, block_length=3)):
        states.append(state)
        copies.append([getattr(state, f).clone() for f in ("committed", "confidence", "nfe", "positions_computed")])
        copies[-1].append(state.canvas.tokens.clone())
    for state, copy in zip(states, copies, strict=True):
        kept = [getattr(state, f) for f in ("committed", "confidence", "nfe", "positions_computed")]
        assert all(torch.equal(a, b) for a, b in zip([*kept, state.canvas.tokens], copy, strict=True))


def test_no_gradient_is_recorded(tiny):
    out = generate(tiny, [[1]], SamplingConfig(gen_length=2))
    assert not out.sequences.requires_grad
    assert all(p.grad is None for p in tiny.parameters())
    torch.ones(1, requires_grad=True).add(1).sum().backward()  # grad mode is as it was


def test_stopping_early_leaves_grad_mode_alone(tiny):
    iterator = denoise(tiny, Canvas.from_prompts([[1]], 4, MASK), SamplingConfig(gen_length=4))
    next(iterator)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    iterator.close()
    assert torch.is_grad_enabled()


def test_the_global_generator_is_neither_read_nor_moved(tiny):
    config = SamplingConfig(gen_length=8, temperature=1.0, confidence="random")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(tiny, [[1]], config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(generate(tiny, [[1]], config).sequences, first.sequences)


def test_a_predictor_needs_no_config():
    class Bare:
        def __call__(self, tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
            return Table(torch.zeros(1, 5))(tokens, positions, logits_to_keep=logits_to_keep)

    for method in ("none", "prefix", "dual", "vicinity", "c2f"):
        config = SamplingConfig(gen_length=4, block_length=2, method=method)
        out = generate(Bare(), Canvas.from_prompts([[0]], 4, 4), config)
        assert out.sequences.tolist() == [[0, 0, 0, 0]]


# --- seeds -------------------------------------------------------------------------------------------------------


def test_seeds_belong_to_rows(tiny):
    config = SamplingConfig(gen_length=6, block_length=3, temperature=1.0, seed=10)
    together = generate(tiny, [[1, 2], [1, 2], [1, 2]], config).sequences
    for i in range(3):
        alone = generate(tiny, [[1, 2]], dataclasses.replace(config, seed=10 + i)).sequences
        assert torch.equal(alone[0], together[i])
    assert len({tuple(row) for row in together.tolist()}) == 3
    chosen = generate(tiny, [[1, 2], [1, 2]], dataclasses.replace(config, seed=(12, 10))).sequences
    assert torch.equal(chosen, together[[2, 0]])


def test_number_of_seeds_must_be_the_number_of_rows(tiny):
    with pytest.raises(ValueError, match="seed") as error:
        generate(tiny, [[1], [2], [3]], SamplingConfig(gen_length=2, seed=(1, 2)))
    assert "2" in str(error.value)
    assert "3" in str(error.value)


# --- what is computed --------------------------------------------------------------------------------------------


def slots_asked(calls):
    """Per call, per row: the set of slots computed."""
    found = []
    for tokens, positions, _ in calls:
        slots = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
        found.append([set(row) for row in slots.tolist()])
    return found


@pytest.mark.parametrize(
    ("method", "want"),
    [
        # prompt 0 1 2, blocks 3 4 5 and 6 7 8, each in two passes
        ("none", [range(9)] * 4),
        ("prefix", [range(9), range(3, 9), range(9), range(6, 9)]),
        ("dual", [range(9), range(3, 6), range(9), range(6, 9)]),
        ("vicinity", [range(9), range(2, 7), range(9), range(5, 9)]),
    ],
)
def test_slots_recomputed(tiny, method, want):
    model = Recorder(tiny)
    config = SamplingConfig(gen_length=6, block_length=3, steps=4, method=method, window=1)
    states, _ = trace(model, Canvas.from_prompts([[1, 2, 3]], 6, MASK), config)
    assert slots_asked(model.calls) == [[set(slots)] for slots in want]
    computed = torch.tensor([len(slots) for slots in want]).cumsum(0)
    got = [int(s.positions_computed[0]) for s in states]
    assert got in (computed.tolist(), [len(slots) for slots in want])


@pytest.mark.parametrize(
    ("method", "want"),
    [
        ("none", [range(7)] * 4),
        ("prefix", [range(7), range(1, 7), range(7), range(5, 7)]),
        ("dual", [range(7), (1, 3), range(7), (5, 6)]),
        ("vicinity", [range(7), range(5), range(7), range(4, 7)]),
    ],
)
def test_slots_recomputed_in_a_template(tiny, method, want):
    """A block is two blanks wherever they are: 1 and 3, then 5 and 6."""
    model = Recorder(tiny)
    canvas = Canvas.from_templates([[7, MASK, 8, MASK, 9, MASK, MASK]], MASK)
    config = SamplingConfig(gen_length=4, block_length=2, method=method, window=1)
    _, steps = trace(model, canvas, config)
    assert slots_asked(model.calls) == [[set(slots)] for slots in want]
    assert sorted(steps[0, [1, 3]].tolist()) == [1, 2]
    assert sorted(steps[0, [5, 6]].tolist()) == [3, 4]


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_kernels_generate_the_same(method, kernel):
    config = SamplingConfig(gen_length=8, block_length=4, method=method, window=2, cfg_scale=0.5)
    rows = [[1, 2, 3], [4], [5, 6]]
    want = generate(tiny_model(1), rows, config)
    got = generate(tiny_model(1, attn_implementation=kernel), rows, config)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(method, dtype):
    config = SamplingConfig(gen_length=8, block_length=4, method=method, cfg_scale=0.5, temperature=0.5)
    out = generate(tiny_model(1, dtype=dtype), [[1, 2, 3], [4]], config)
    assert MASK not in out.sequences
    assert out.nfe.tolist() == [8, 8]


def test_logits_are_asked_for_where_they_are_needed(tiny):
    """lm_head runs on masked places alone: never on the whole canvas."""
    model = Recorder(tiny)
    generate(
        model, Canvas.from_prompts([[1, 2, 3, 4, 5]], 8, MASK), SamplingConfig(gen_length=8, block_length=4, steps=8)
    )
    for tokens, positions, options in model.calls:
        keep = options["logits_to_keep"]
        assert keep is not None
        assert (int(keep.sum()) if keep.dtype == torch.bool else keep.numel()) <= 4
        assert positions is None or positions.shape == tokens.shape


def test_rows_that_are_done_stop_costing(tiny):
    """One row has four tokens to fill, the other one: after a pass only the first is computed."""
    model = Recorder(tiny)
    canvas = Canvas.from_templates([[1, MASK, MASK, MASK, MASK], [MASK, 2, 3, 4, 5]], MASK)
    out = generate(model, canvas, SamplingConfig(block_length=8))
    assert out.nfe.tolist() == [4, 1]
    assert [call[0].shape[0] for call in model.calls] == [2, 1, 1, 1]


@pytest.mark.parametrize("method", ["none", "dual"])
def test_guidance_is_the_formula(tiny, method):
    """l = u + (w + 1)(c - u), and u does not see the prompt."""
    w, prompt = 1.5, [1, 2, 3]
    canvas = Canvas.from_prompts([prompt], 4, MASK)
    tokens = canvas.tokens
    with torch.inference_mode():
        c = tiny.predict(tokens)[0, 3:]
        u = tiny.predict(torch.full_like(tokens, MASK))[0, 3:]
    logits = u + (w + 1) * (c - u)
    logits[:, MASK] = -math.inf
    config = SamplingConfig(gen_length=4, block_length=4, steps=1, cfg_scale=w, method=method)
    assert generate(tiny, canvas, config).sequences[0].tolist() == logits.argmax(-1).tolist()


def test_guidance_counts_a_pass_once(tiny):
    config = SamplingConfig(gen_length=4, block_length=4, steps=2, cfg_scale=1.0)
    assert generate(tiny, [[1, 2, 3]], config).nfe.tolist() == [2]


@pytest.mark.parametrize("method", ["prefix", "dual"])
def test_a_row_of_a_shifted_model_computes_what_it_does_alone(method):
    """Which slots a pass computed hung on when the plan was made, and so on the pace of the rows beside this one."""
    model = tiny_model(0, shift_logits=True)
    prompts = [[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11]]
    config = SamplingConfig(gen_length=16, block_length=4, method=method, commit="threshold", threshold=0.3)
    for seed in range(3):
        config = dataclasses.replace(config, temperature=0.8, seed=seed)
        whole = generate(model, prompts, config)
        for i, prompt in enumerate(prompts):
            alone = generate(model, [prompt], dataclasses.replace(config, seed=seed + i))
            assert torch.equal(whole.sequences[i], alone.sequences[0])
            assert whole.positions_computed[i] == alone.positions_computed[0]

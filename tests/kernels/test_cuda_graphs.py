"""Passes that are replayed: with a recorder that stands in for CUDA's, the tokens are those of passes that are not.

The stand-in keeps what a graph has: the function is run again on the memory that it was recorded with, and its result
lies where it lay at first. What it cannot show is whether CUDA can record these kernels.
"""

import random

import pytest
import torch

import dlm
from dlm import SamplingConfig
from dlm.kernels.cuda_graphs import KEPT, Graphs
from dlm.kernels.packing import packed
from dlm.models.kv_cache import KVCache
from dlm.sampling import denoise
from dlm.sampling.rows import Batch
from tests.helpers.toys import tiny_model


class Recorder:
    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function, pool):
        result = function().clone()
        self.recorded += 1

        def replay():
            self.replayed += 1
            result.copy_(function())

        return replay, result


def replaying(model):
    """The model's passes, replayed."""
    return Graphs(packed(model), Recorder())


@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
def test_tokens_are_those_of_plain_passes(method):
    """Prompts of many lengths, rows that come to their blocks at different passes, guidance, every commit rule."""
    rng, model = random.Random(method), tiny_model(3, dtype=torch.float32)
    runs = []
    for _ in range(12):
        config = SamplingConfig(
            gen_length=12, block_length=rng.choice([3, 4, 12]), steps=rng.choice([4, 6, 12]), method=method,
            commit=rng.choice(["quota", "quota", "threshold"]), temperature=rng.choice([0.0, 0.0, 0.7]),
            cfg_scale=rng.choice([0.0, 0.0, 1.5]), window=2, seed=rng.randrange(99),
        )  # fmt: skip
        prompts = [[rng.randrange(38) for _ in range(rng.choice([2, 4]))] for _ in range(rng.choice([1, 1, 2]))]
        runs.append((prompts, config, dlm.generate(model, prompts, config)))
    graphs = replaying(model)
    for prompts, config, want in runs:
        got = dlm.generate(graphs, prompts, config)
        assert got.sequences.tolist() == want.sequences.tolist(), config
        assert (got.nfe.tolist(), got.positions_computed.tolist()) == (
            want.nfe.tolist(),
            want.positions_computed.tolist(),
        )
    assert graphs.record.replayed > 2 * graphs.record.recorded > 0


def test_block_causal_too():
    model = tiny_model(4, dtype=torch.float32, block_length=4)
    config = SamplingConfig(gen_length=16, method="block_causal", steps=16)
    want = [dlm.generate(model, [prompt], config).sequences.tolist() for prompt in ([1, 2, 3], [4, 5, 6])]
    graphs = replaying(model)
    assert [dlm.generate(graphs, [prompt], config).sequences.tolist() for prompt in ([1, 2, 3], [4, 5, 6])] == want
    assert graphs.record.replayed > graphs.record.recorded > 0


def test_a_second_generation_records_nothing():
    model = tiny_model(5, dtype=torch.float32)
    graphs, config = replaying(model), SamplingConfig(gen_length=8, block_length=4, steps=8, method="dual")
    dlm.generate(graphs, [[1, 2]], config)
    dlm.generate(graphs, [[1, 3]], config)
    assert graphs.record.recorded == 2  # all slots, a block's slots
    before = graphs.record.replayed
    dlm.generate(graphs, [[5, 6]], config)
    assert (graphs.record.recorded, graphs.record.replayed) == (2, before + 8)


def test_generations_at_once_do_not_share_a_cache():
    model = tiny_model(6, dtype=torch.float32)
    config = SamplingConfig(gen_length=8, block_length=4, steps=8, method="dual")
    prompts = [[1, 2], [3, 4]]
    want = [dlm.generate(model, [prompt], config).sequences.tolist() for prompt in prompts]
    graphs = replaying(model)
    for _ in range(2):
        runs = [dlm.denoise(graphs, dlm.Canvas.from_prompts([prompt], 8, 39), config) for prompt in prompts]
        for states in zip(*runs, strict=True):  # turn by turn
            last = states
        assert [state.canvas.region(0).tolist() for state in last] == want


def test_caches_come_back_and_old_shapes_go():
    graphs = Graphs(packed(tiny_model(7, dtype=torch.float32)), Recorder())
    first = graphs.borrow(1, 8)
    assert graphs.borrow(1, 8) is not first
    graphs.give_back(first)
    assert graphs.borrow(1, 8) is first and isinstance(first, KVCache)
    graphs.give_back(first)
    for length in range(20, 20 + KEPT):
        graphs.borrow(1, length)
    assert graphs.borrow(1, 8) is not first


def test_a_generation_that_is_left_gives_its_cache_back():
    model = tiny_model(8, dtype=torch.float32)
    graphs, config = replaying(model), SamplingConfig(gen_length=8, block_length=4, steps=8, method="dual")
    states = dlm.denoise(graphs, dlm.Canvas.from_prompts([[1, 2]], 8, 39), config)
    next(states)
    states.close()
    assert len(graphs._canvas(1, 10).free) == 1


def test_a_processor_has_no_cuda_graphs():
    with pytest.raises(ValueError, match="cuda_graphs need one GPU, and the model goes to cpu"):
        dlm.load(device="cpu", cuda_graphs=True)
    model = tiny_model(9, dtype=torch.float32)
    model.cuda_graphs = True
    assert not isinstance(packed(model), Graphs)


@pytest.mark.parametrize("bad", [2, 4])
def test_a_check_that_lags_a_turn_names_the_pass_and_misses_none(bad):
    """As on a GPU: what is no number at pass 2 of 4 is said a turn later, and at the last pass at the end."""
    passes = 0

    def predictor(tokens, positions=None, *, logits_to_keep, **_):
        nonlocal passes
        passes += 1
        logits = torch.randn(*logits_to_keep.shape, 40)
        return logits * float("nan") if passes == bad else logits

    config = SamplingConfig(gen_length=4, block_length=4, steps=4)
    batch = Batch(predictor)
    batch.join(dlm.Canvas.from_prompts([[1, 2]], 4, 39), config)
    assert batch.lag == 0
    batch.lag = 1
    for _ in range(bad):
        denoise.turn(batch)
    with pytest.raises(FloatingPointError, match=f"pass {bad}: "):
        denoise.turn(batch) if batch.active else denoise.refuse_nan(batch, before=batch.turns + 1)
    assert passes == min(bad + 1, 4)


def test_longer_canvases_leave_what_recordings_read():
    """A table of rotary turns that grew was made anew, and recordings read the memory of the old one."""
    graphs = Graphs(packed(tiny_model(10, dtype=torch.float32, max_sequence_length=64)), Recorder())
    tokens, turns = torch.arange(8)[None], graphs.predictor.turns
    with torch.inference_mode():
        graphs(tokens)
        graphs(torch.arange(64)[None] % 38)
    assert graphs.predictor.turns is turns and len(turns) == 64
    with pytest.raises(ValueError, match="65 slots are above the model's max_sequence_length 64"):
        graphs(torch.zeros(1, 65, dtype=torch.int64))


# ---------------------------------------------------------------- on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["none", "dual", "c2f"])
def test_cuda_graphs(method, dtype):
    """Short, long and ragged canvases one after the other, each three times: tokens of passes that are not replayed,
    and in fp32 those of the plain model."""
    model = tiny_model(11, dtype=torch.float32, n_layers=3).to("cuda", dtype)
    prompts = [[[1, 2, 3]], [[4] * 40], [[5, 6], [7, 8, 9, 10]]]
    answers = {}
    for name, implementation, graphs in (
        ("plain", "eager", False),
        ("packed", "sdpa", False),
        ("graphs", "sdpa", True),
    ):
        model.config._attn_implementation, model.cuda_graphs = implementation, graphs
        assert isinstance(packed(model), Graphs) == graphs
        answers[name] = [
            dlm.generate(
                model, rows, SamplingConfig(gen_length=16, block_length=8, steps=steps, method=method)
            ).sequences.tolist()
            for _ in range(3)
            for rows in prompts
            for steps in (16, 4)
        ]
    assert answers["graphs"] == answers["packed"]
    if dtype == torch.float32:
        assert answers["packed"] == answers["plain"]
    assert any(each for canvas in packed(model)._canvases.values() for each in canvas.recordings.values())


@on_a_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_does_not_wait_within_a_block(graphs):
    model = tiny_model(12, dtype=torch.float32).to("cuda")
    model.cuda_graphs = graphs
    config = SamplingConfig(gen_length=16, block_length=16, steps=16, method="dual")
    for turn in range(2):
        try:
            for state in dlm.denoise(model, dlm.Canvas.from_prompts([[1, 2]], 16, 39, device="cuda"), config):
                if turn and state.step in (4, 15):
                    torch.cuda.set_sync_debug_mode("error" if state.step == 4 else "default")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("bad", [1, 3, 4])
def test_damage_is_said_on_a_gpu_too(bad):
    passes = 0

    def predictor(tokens, positions=None, *, logits_to_keep, **_):
        nonlocal passes
        passes += 1
        logits = torch.randn(*logits_to_keep.shape, 40, device="cuda")
        return logits * float("nan") if passes == bad else logits

    canvas = dlm.Canvas.from_prompts([[1, 2]], 4, 39, device="cuda")
    with pytest.raises(FloatingPointError, match=f"pass {bad}: "):
        list(dlm.denoise(predictor, canvas, SamplingConfig(gen_length=4, block_length=4, steps=4)))

"""Layers applied several times, and heads that see a grid: against models without them, cached, saved, refused."""

import pytest
import torch

import dlm
from dlm.models.attention import grid_views
from dlm.models.flops import pass_flops, training_flops
from dlm.models.kv_cache import KVCache
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from tests.helpers.toys import tiny_config, tiny_model

GRID = {"n_heads": 4, "n_kv_heads": 4, "grid_width": 5}  # 4 by 4: rows of a label and four cells, 20 slots
KINDS = {"recurrent": {"layer_repeats": 3}, "grid": GRID, "both": GRID | {"layer_repeats": 2}}


def ids(batch, length, seed=0):
    return torch.randint(0, 39, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_layers_applied_twice_are_a_deeper_model_with_the_same_weights():
    once, deep = tiny_model(1, layer_repeats=2), tiny_model(2, n_layers=2 * tiny_config().n_layers)
    weights, layers = once.state_dict(), once.config.n_layers
    for name in list(weights):
        if ".blocks." in name:
            head, _, rest = name.partition(".blocks.")
            layer, _, rest = rest.partition(".")
            weights[f"{head}.blocks.{int(layer) + layers}.{rest}"] = weights[name]
    deep.load_state_dict(weights)
    tokens = ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(once.predict(tokens), deep.predict(tokens))
    assert pass_flops(once.config, 9, 9, 3) == pass_flops(deep.config, 9, 9, 3)
    assert training_flops(once.config, 90, 9, 40) == training_flops(deep.config, 90, 9, 40)


def test_views_of_a_4_by_4_grid():
    slots = torch.arange(20)[None]
    row, column, box, everything = grid_views(slots, None, 5, 4)[0]
    assert row[7].nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9]  # the label of the second row and its cells
    assert column[7].nonzero()[:, 0].tolist() == [2, 7, 12, 17]
    assert box[7].nonzero()[:, 0].tolist() == [1, 2, 6, 7]
    assert box[10].nonzero()[:, 0].tolist() == [10, 15]  # labels of the lower boxes are among themselves
    assert everything.all()
    assert grid_views(slots, None, 5, 8).shape == (1, 8, 20, 20)


def test_views_of_a_sudoku_are_its_units():
    from dlm.evaluation.sudoku import CELLS, LENGTH, PEERS, ROW_LENGTH

    seen = grid_views(torch.arange(LENGTH)[None], None, ROW_LENGTH, 4)[0, :3][:, CELLS][:, :, CELLS].any(0)
    for cell, peers in enumerate(PEERS):
        assert set(seen[cell].nonzero()[:, 0].tolist()) == {cell, *peers}


def test_a_head_reads_nothing_outside_of_its_view():
    model = tiny_model(1, **GRID, n_layers=1)
    with torch.no_grad():
        size = model.config.head_dim
        model.model.transformer.blocks[0].attn_out.weight[:, 3 * size :] = 0  # the head that sees everything
    tokens = ids(1, 20)
    with torch.inference_mode():
        before = model.predict(tokens)
        tokens[0, 12] = (tokens[0, 12] + 1) % 39
        after = model.predict(tokens)
    changed = (before != after).any(-1)[0].nonzero()[:, 0].tolist()
    assert changed == [2, 7, 10, 11, 12, 13, 14, 16, 17]  # its row, column and box


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_cache_kernels_and_saving(changes, tmp_path):
    model, tokens = tiny_model(3, **changes), ids(2, 20)
    asked = torch.tensor([[3, 7, 19], [0, 8, 11]])
    with torch.inference_mode():
        want, cache = model.predict(tokens), KVCache(2, 20)
        every = torch.arange(20).expand(2, -1)
        assert torch.allclose(model.predict(tokens, every, cache=cache), want, atol=1e-12)
        some = model.predict(tokens.gather(1, asked), asked, cache=cache)  # keys and values of the rest are stored
        assert torch.allclose(some, want.take_along_dim(asked[..., None], 1), atol=1e-12)
        eager = tiny_model(3, attn_implementation="eager", **changes).predict(tokens)
        assert torch.allclose(eager, want, atol=1e-12)
    model.save_pretrained(tmp_path)
    again, _ = dlm.load(str(tmp_path), dtype="float64")
    with torch.inference_mode():
        assert torch.equal(again.predict(tokens), want)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("options", [{"method": "dual"}, {"revise": "verify"}, {"method": "dual", "revise": "verify"}])
def test_methods_and_shadows(changes, options):
    """The first pass of a cached method, and shadows with a cache and without one, are those of the whole canvas."""
    model = tiny_model(4, **changes)
    canvas = Canvas.from_prompts([ids(1, 10)[0].tolist()], 10, model.config.mask_token_id)
    config = SamplingConfig(gen_length=10, block_length=10, steps=1, **options)
    plain = dlm.generate(model, canvas, SamplingConfig(gen_length=10, block_length=10, steps=1))
    assert dlm.generate(model, canvas, config).sequences.shape == plain.sequences.shape
    if "method" in options and "revise" not in options:
        assert torch.equal(dlm.generate(model, canvas, config).sequences, plain.sequences)


def test_files_without_them_name_neither():
    fields = tiny_config().to_diff_dict()
    assert "layer_repeats" not in fields and "grid_width" not in fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_repeats": 0}, "layer_repeats=0: it must be 1 or more"),
        ({"grid_width": 9, "n_heads": 4, "n_kv_heads": 4}, "grid_width=9: a row is a label and a square number"),
        ({"grid_width": 10, "n_heads": 2, "n_kv_heads": 2}, "n_heads=2: heads see row, column, box and everything"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)

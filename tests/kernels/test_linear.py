"""Linear layers for inference: eight-bit weights against their definition, and every kind inside of the model."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import dlm
from dlm import SamplingConfig
from dlm.checkpoints.pretrained import number_type
from dlm.cli import main
from dlm.data.windows import CorpusConfig, load_corpus
from dlm.evaluation.perplexity import open_scorer, store_folder
from dlm.kernels import int8
from dlm.kernels import packed as copies
from dlm.kernels.int8 import Int8
from dlm.kernels.linear import QUANTIZED, Blocked, Plain, has_kernels, quantize_, rows_made
from dlm.kernels.packed import Packed
from dlm.kernels.packing import Direct, packed
from dlm.models.kv_cache import KVCache
from dlm.objectives.likelihood import LikelihoodConfig
from tests.helpers import commandline, families
from tests.helpers.toys import tiny_model

SHAPES = [
    {},
    {"n_kv_heads": 4, "include_bias": True},
    {"attention_layer_norm": True, "include_qkv_bias": True},
    {"weight_tying": True, "scale_logits": True, "input_emb_norm": True},
    {"block_length": 4, "n_layers": 1},
]
tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")


def layer(outputs, inputs, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def tokens_of(rows, length=9, seed=0):
    return torch.randint(0, 39, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- one layer


@vnni
def test_eight_bits_by_hand():
    """Scales of 1 / 127 and 2 / 127 for the rows, 4 / 127 for the token: 127 * 127, 64 * 127 and 32 * 127 of them."""
    given = nn.Linear(2, 2, bias=True)
    with torch.no_grad():
        given.weight.copy_(torch.tensor([[1.0, 0.5], [-2.0, 0.0]]))
        given.bias.copy_(torch.tensor([0.25, 0.0]))
    ours = Int8.from_linear(given)
    assert ours.weight.tolist() == [[127, 64], [-127, 0]]  # 63.5 rounds to the even 64
    x = torch.tensor([[[4.0, 1.0]]])  # 127 and 31.75, which rounds to 32
    want = [(127 * 127 + 64 * 32) / 127 * 4 / 127 + 0.25, -127 * 127 * 2 / 127 * 4 / 127]
    assert torch.allclose(ours(x), torch.tensor([[want]]), rtol=1e-6)
    assert torch.allclose(ours.plus(x, torch.ones(1, 1, 2)), torch.tensor([[want]]) + 1, rtol=1e-6)


@vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_as_near_as_rounding_allows(dtype):
    """|error| <= sum_i |x_i| s_w / 2 + |w_i| s_x / 2 + s_w s_x / 4: each number moved by half a step at most."""
    for seed in range(20):
        given = layer(24, 40, bias=True, seed=seed)
        x = torch.randn(3, 5, 40) * 10 ** torch.randn(3, 5, 1)
        ours, want = Int8.from_linear(given), given(x)
        step_w = given.weight.abs().amax(dim=1) / 127
        step_x = x.abs().amax(dim=-1, keepdim=True) / 127
        most = x.abs().sum(-1, keepdim=True) * step_w / 2 + given.weight.abs().sum(1) * step_x / 2
        most = most + 40 * step_w * step_x / 4
        got = ours(x.to(dtype))
        assert got.dtype == dtype
        slack = 1e-5 if dtype == torch.float32 else 0.02  # bf16 rounds the input and the result itself
        assert ((got.float() - want).abs() <= most + slack * want.abs().amax(-1, keepdim=True)).all()
        assert (got.float() - want).norm() < 0.02 * want.norm()


@vnni
def test_a_token_does_not_depend_on_its_neighbours_and_zeros_stay():
    ours = Int8.from_linear(layer(16, 24))
    x = torch.randn(7, 24)
    x[2] *= 1e6
    x[4] = 0
    assert all(torch.equal(ours(x)[i], ours(x[i : i + 1])[0]) for i in range(7))
    assert ours(x)[4].abs().max() == 0
    empty = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(empty.weight)
    assert Int8.from_linear(empty)(torch.randn(2, 4)).abs().max() == 0


@pytest.mark.parametrize("kind", [Plain, Blocked])
def test_joined_layers_are_the_layers(kind):
    if kind is Blocked and not has_kernels(torch.float32):
        pytest.skip("oneDNN is not in this torch")
    layers = [layer(8, 12, bias=True, seed=seed) for seed in range(3)]
    x, residual = torch.randn(2, 3, 12), torch.randn(2, 3, 24)
    joined = kind.of([each.weight for each in layers], [each.bias for each in layers])
    want = torch.cat([each(x) for each in layers], dim=-1)
    assert torch.allclose(joined(x), want, atol=1e-6)
    assert torch.allclose(joined.plus(x, residual), want + residual, atol=1e-6)


# ---------------------------------------------------------------- inside of the model


@pytest.fixture(params=["plain", pytest.param("int8", marks=vnni), "fp8"])
def made(request, monkeypatch):
    """shape -> a model whose packed copy has this kind of layers; `plain` is what a GPU gets."""

    def make(seed, **changes):
        model = tiny_model(seed, dtype=torch.float32, **changes)
        if request.param == "plain":
            monkeypatch.setattr(copies, "kind_for", lambda *_: Plain)
            return model
        monkeypatch.setitem(QUANTIZED, "fp8", replace(QUANTIZED["fp8"], refusal=lambda device: None))
        return quantize_(model, request.param)

    return make


@pytest.mark.skipif(not has_kernels(torch.float32), reason="oneDNN is not in this torch")
@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_the_packed_copy_is_the_model(made, changes):
    model, tokens = made(1, **changes), tokens_of(3)
    copy, caches = packed(model), [KVCache(3, 9), KVCache(3, 9)]
    assert type(copy) is Packed and packed(model) is copy
    every, slots = torch.arange(9).expand(3, 9), torch.tensor([[2, 4, 5], [4, 7, 0], [1, 2, 3]])

    def same(*args, **more):
        got, want = (
            predictor(*args, cache=cache, **more)
            for predictor, cache in zip(
                (copy, model.predict), (caches if more.pop("stored", False) else (None, None)), strict=True
            )
        )
        assert (got - want).abs().max() < 2e-5 * want.abs().max()

    same(tokens)
    same(tokens, logits_to_keep=slots)
    same(tokens, every, stored=True)
    same(tokens.gather(1, slots), slots, stored=True, logits_to_keep=torch.tensor([[1], [2], [0]]))


@pytest.mark.skipif(not has_kernels(torch.float32), reason="oneDNN is not in this torch")
@pytest.mark.parametrize("method", ["none", "prefix", "dual", "vicinity", "c2f"])
def test_generation_gives_the_tokens_of_the_plain_path(made, method):
    model = made(3)
    for commit in ("quota", "threshold"):
        config = SamplingConfig(gen_length=12, block_length=4, steps=8, method=method, commit=commit)
        model.config._attn_implementation = "sdpa"
        got = dlm.generate(model, [[1, 2, 3], [4]], config)
        assert type(packed(model)) is Packed
        model.config._attn_implementation = "eager"
        assert got.sequences.tolist() == dlm.generate(model, [[1, 2, 3], [4]], config).sequences.tolist()


@vnni
@torch.no_grad()
def test_changed_eight_bits_are_noticed():
    model, tokens = quantize_(tiny_model(2, dtype=torch.float32), "int8"), tokens_of(1)
    before = packed(model)(tokens)
    model.model.transformer.blocks[1].ff_out.weight.neg_()
    after = packed(model)(tokens)
    assert (after - before).abs().max() > 1e-3
    assert (after - model.predict(tokens)).abs().max() < 2e-5 * after.abs().max()


@vnni
@torch.no_grad()
def test_the_model_that_ships_in_eight_bits():
    """Its layers are small and its predictions nearly those of the whole weights."""
    (whole, tokenizer), (small, _) = dlm.load(dtype="float32"), dlm.load(dtype="int8")
    assert type(small.model.transformer.blocks[0].ff_proj) is Int8 and type(small.model.transformer.wte) is nn.Embedding
    tokens = torch.tensor([tokenizer.encode("Once upon a time, a girl had a red ball.")])
    tokens[0, 3] = whole.config.mask_token_id
    want, got = (model.predict(tokens).log_softmax(dim=-1) for model in (whole, small))
    divergence = (want.exp() * (want - got)).sum(dim=-1)
    assert divergence.max() < 0.01  # nats
    assert divergence.max() > 0


# ---------------------------------------------------------------- what does not work says so


def test_eight_bits_say_which_experts_they_left(tmp_path, monkeypatch):
    """Fault: the experts of a mixture stayed whole, most of the model's memory, and nothing said it."""
    fields = {**families.BASE, "model_type": "llada2_moe", "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
              "moe_intermediate_size": 16, "num_shared_experts": 1, "n_group": 2, "topk_group": 1,
              "first_k_dense_replace": 1, "num_hidden_layers": 3}  # fmt: skip
    families.checkpoint(tmp_path / "model", fields)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    # Of a layer: a router of 4 x 24, experts of 4 x 3 x 16 x 24, a shared one of 3 x 16 x 24, 4 bytes a number.
    with pytest.warns(UserWarning, match="experts of 2 layers") as said:
        model, _ = dlm.load(tmp_path / "model", dtype="int8")
    held = 2 * 4 * (4 * 24 + 4 * 3 * 16 * 24 + 3 * 16 * 24)
    whole = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert str(said[0].message) == (
        f"int8 leaves the experts of 2 layers (1 to 2) in float32: {held / 1e9:.3g} GB of the model's "
        f"{whole / 1e9:.3g} GB stay as they are"
    )
    assert type(model.model.transformer.blocks[0].ff_out) is type(model.model.transformer.blocks[1].attn_out) is Int8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unpacked.*rope scaling is dynamic"),
        ({"torch_dtype": "bfloat16"}, "unpacked.*no fast product for bfloat16: float32 is quicker"),
    ],
)
def test_the_plain_path_is_said(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    families.checkpoint(tmp_path / "model", {**families.BASE, "model_type": "Dream", **changes})
    model, _ = dlm.load(tmp_path / "model", dtype=changes.get("torch_dtype", "float32"))
    with pytest.warns(UserWarning, match=words):
        assert type(packed(model)) is Direct


def test_a_warning_is_one_line_on_the_command_line(monkeypatch):
    said, before = [], warnings.formatwarning
    monkeypatch.setattr(main, "run", lambda argv: said.append(warnings.formatwarning("two\nlines", UserWarning, "", 1)))
    main.main(["info"])
    assert said == ["dlm: warning: two lines\n"] and warnings.formatwarning is before


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="give auto, float32, bfloat16, float16, int8, fp8"):
        dlm.load(dtype="int9")
    with pytest.raises(ValueError, match="int8"):
        quantize_(tiny_model(), "int7")
    with pytest.raises(ValueError, match=r"fp8 weights need an NVIDIA GPU.*not cpu: use bfloat16"):
        dlm.load(dtype="fp8", device="cpu")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="VNNI, which this one lacks: use bfloat16"):
        dlm.load(dtype="int8")
    assert "are for processors, and the model is on cuda" in int8.refusal(torch.device("cuda"))


@vnni
def test_on_the_command_line(run):
    code, out, err = run("generate", "Once", "--dtype", "int8", "--gen-length", "8", "--steps", "4")
    assert code == 0 and out.startswith("Once")
    code, out, err = run("bench", "speed", "--config", "small", "--dtype", "int8", "--cells", "dual:8:4",
                         "--gen-length", "16", "--repeats", "1")  # fmt: skip
    assert code == 0 and "int8" in out, err
    code, out, err = run("generate", "Once", "--dtype", "int9")
    assert code == 2 and "dtype is 'int9'" in err


@vnni
def test_results_say_which_numbers_made_them(checkpoint, run, tmp_path):
    """A run that was killed does not go on with numbers of another type."""
    model = tiny_model(dtype=torch.bfloat16)
    assert number_type(model) == "bfloat16" and number_type(quantize_(model, "int8")) == "int8"
    (tmp_path / "text.txt").write_text(commandline.STORY * 3)
    for dtype in ("float32", "int8"):
        words = ["--data", tmp_path / "text.txt", "--model", checkpoint, "--dtype", dtype]
        code, _, error = run("eval", "perplexity", *words, "--out", tmp_path / f"{dtype}.json")
        assert code == 0, error
    rows = {dtype: json.loads((tmp_path / f"{dtype}.json").read_text())["results"][0] for dtype in ("float32", "int8")}
    assert [row["dtype"] for row in rows.values()] == ["float32", "int8"]
    scorers = [open_scorer(checkpoint, dtype=dtype) for dtype in rows]
    corpus = load_corpus(tmp_path / "text.txt", scorers[0].tokenizer, CorpusConfig(64))
    folders = {store_folder("out", scorer, corpus, LikelihoodConfig()) for scorer in scorers}
    assert len(folders) == 2


@vnni
def test_a_grid_does_not_go_on_with_other_numbers(checkpoint, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    words = ["bench", "grid", "--model", checkpoint, "--judge", "none", "--prompts", tmp_path / "prompts.txt"]
    words += ["--gen-length", "8", "--block-lengths", "8", "--steps", "2", "--methods", "none", "--repeats", "1"]
    words += ["--out", tmp_path / "grid.json"]
    assert run(*words, "--dtype", "float32")[0] == 0
    code, _, error = run(*words, "--dtype", "int8")
    assert code == 2 and "dtype" in error and "--fresh" in error


def test_products_are_made_for_few_numbers_of_rows():
    """Was: for every number, of which each cost a server 0.5 MB and milliseconds; 4,096 slots had 4,096 of them."""
    made = [rows_made(rows) for rows in range(1, 4097)]
    assert made[:32] == list(range(1, 33)) and len(set(made)) <= 32 + 16 * 7
    for rows, count in enumerate(made, 1):
        assert rows <= count <= rows * 17 / 16 and rows_made(count) == count


@pytest.mark.skipif(not has_kernels(torch.float32), reason="this processor's products are torch's own")
@pytest.mark.parametrize("shape", [(1,), (32,), (33,), (3, 23), (5, 27), (1, 257)])
def test_a_product_that_is_filled_up_has_the_same_bits(shape):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(*shape, 40)
    linear, residual, op = Blocked.of([weight], [bias]), torch.randn(*shape, 24), torch.ops.mkldnn._linear_pointwise
    for given in (x, x.mT.contiguous().mT):  # and one that does not lie row by row
        alone = op(x, linear.weight, linear.bias, "none", [], "")
        assert torch.equal(linear(given), alone)
        summed = op.binary(x, residual, linear.weight, linear.bias, "add")
        assert torch.equal(linear.plus(given, residual), summed)

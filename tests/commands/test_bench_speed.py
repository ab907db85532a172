"""The benchmarks: what they count, by hand; a peer that is written here; and one run of each command."""

import json

import pytest
import torch

import dlm
from benchmarks import peers, speed
from dlm.benchmarking import roofline
from dlm.benchmarking.roofline import Limits, Pass
from dlm.cli.main import main
from dlm.cli.workload import parse_cell
from dlm.kernels.packing import packed
from dlm.models.flops import block_parameters, pass_bytes, pass_flops
from dlm.models.shapes import SHAPES, random_model
from dlm.sampling.propose import BLOCK, largest
from tests.helpers.toys import tiny_config, tiny_model

# ---------------------------------------------------------------- counting


def test_operations_of_a_pass_by_hand():
    """Two layers of width 4, heads 2, MLP 6, vocabulary 10: 3 slots computed, 5 keys, 1 place asked about."""
    config = tiny_config(d_model=4, n_heads=2, n_kv_heads=1, mlp_hidden_size=6, vocab_size=10, embedding_size=10)
    q_out, kv, mlp = 2 * 16, 2 * 4 * 2, 3 * 4 * 6
    first = 3 * (q_out + kv + mlp) + 3 * 5 * 2 * 4  # q k^T and the sum of values: keys x width each
    last = 3 * kv + 1 * (q_out + mlp) + 1 * 5 * 2 * 4
    assert pass_flops(config, 3, 5, 1) == 2 * (first + last + 1 * 4 * 10)
    assert pass_bytes(config, 2, 5, 4) == 4 * (block_parameters(config) + 4 * 10 + 2 * 5 * 2 * 2 * 2)


def test_what_a_generation_is_asked():
    """dual, 4 x 4 of 8: blocks of 4 with 2 passes each; first everything (2 + 8 slots), then the block."""
    model = tiny_model(0, dtype=torch.float32)
    recorder = speed.Recorder(packed(model), [])
    canvas = dlm.Canvas.from_prompts([[1, 2]], 8, model.config.mask_token_id)
    out = dlm.generate(recorder, canvas, dlm.SamplingConfig(gen_length=8, block_length=4, steps=4, method="dual"))
    first, later = Pass(1, 10, 10, 4), Pass(1, 4, 10, 2)
    assert recorder.passes == [first, later] * 2
    assert sum(each.computed for each in recorder.passes) == int(out.positions_computed)


def test_the_floor_is_the_larger_of_both_limits_pass_by_pass():
    config = tiny_config()
    passes = [Pass(1, 10, 10, 4), Pass(2, 1, 10, 1)]
    flops = [pass_flops(config, 10, 10, 4), 2 * pass_flops(config, 1, 10, 1)]
    read = [pass_bytes(config, 1, 10, 4), pass_bytes(config, 2, 10, 4)]
    rate = flops[0] / read[0] * 0.9  # the first pass waits for arithmetic, the second for memory
    assert flops[1] / rate < read[1]
    assert Limits("float32", 4, rate, 1.0).floor(config, passes) == pytest.approx(flops[0] / rate + read[1])


def test_stopwatch_gives_inner_time_to_the_inner_name():
    now = iter([0.0, 1.0, 4.0, 10.0])  # outer begins, inner begins, inner ends, outer ends
    watch = speed.Stopwatch(torch.device("cpu"), lambda: next(now))
    with watch.timing("outer"), watch.timing("inner"):
        pass
    assert watch.seconds == {"inner": 3.0, "outer": 7.0}


# ---------------------------------------------------------------- shapes and the largest logit


@pytest.mark.parametrize("name", ["25m", "120m"])
def test_shapes_have_the_size_in_their_name(name):
    with torch.device("meta"):
        width, heads, kv_heads, layers, hidden, vocabulary = SHAPES[name]
    matrices = layers * (2 * width**2 + 2 * width * (width // heads) * kv_heads + 3 * width * hidden)
    millions = (matrices + 2 * vocabulary * width) / 1e6
    assert 0.9 < millions / int(name[:-1]) < 1.2


def test_random_models_are_seeded_and_spread():
    one, other = random_model("small"), random_model("small")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    logits = one.predict(torch.arange(12)[None])
    assert logits.isfinite().all() and 0.5 < logits.std() < 2


@pytest.mark.parametrize(("text", "said"), [
    ("dual:32", "METHOD:BLOCK:STEPS"), ("dual:0:4", "METHOD:BLOCK:STEPS"), ("dul:8:8", "'dual'"),
])  # fmt: skip
def test_a_cell_that_is_none(text, said):
    assert parse_cell("c2f:4:64") == ("c2f", 4, 64)
    with pytest.raises(ValueError, match=said):
        parse_cell(text)


@pytest.mark.parametrize("size", [5, BLOCK * BLOCK, BLOCK * BLOCK + 17])
def test_largest_is_the_first_of_the_largest(size):
    """Against a plain search, with ties inside a block, across blocks and in what is left over, and -inf."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-3, 4, (40, size), generator=generator).float()  # many ties
    x[0], x[1, -1], x[2] = -torch.inf, 9, 7
    x[3, [1, size // 2, size - 1]] = 9
    want = [row.tolist().index(max(row.tolist())) for row in x]
    assert largest(x).tolist() == want
    assert largest(x.view(4, 10, size)).flatten().tolist() == want


# ---------------------------------------------------------------- a peer

GENERATE = '''
import torch

def generate(model, prompt, attention_mask=None, steps=0, gen_length=0, block_length=0, mask_id=0):
    """One block; the most probable token everywhere in the last pass: right where one pass does it all."""
    if block_length > gen_length:
        raise IndexError("a block too long")
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], dim=1)
    logits = model(x, attention_mask=attention_mask).logits
    logits[..., mask_id] = -torch.inf
    found = logits.argmax(-1)
    return torch.where(x == mask_id, found, x)
'''


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "generate.py").write_text(GENERATE)
    return tmp_path


def test_peers_command(clone, capsys):
    """One pass for everything: the peer's tokens are ours; with more passes some differ."""
    where = str(clone / "rows.json")
    common = ["bench", "peers", "--peer", f"llada={clone}", "--config", "small", "--gen-length", "8"]
    assert main([*common, "--cells", "none:8:1", "none:8:8", "dual:8:2", "--repeats", "2", "--json", where]) == 0
    one, many, dual = json.loads((clone / "rows.json").read_text())
    assert one["peers"]["llada"]["equal"] == 1 and many["peers"]["llada"]["equal"] < 1
    assert many["peers"]["llada"]["ratio"] == many["ratio"] < 1  # eight passes against one
    assert dual["peers"] == {} and dual["ratio"] is None  # LLaDA has no cache
    assert "100% of tokens equal" in capsys.readouterr().out


def test_a_peer_that_fails_is_shown_and_ours_is_not_hidden(clone):
    samplers = peers.load_peers([f"llada={clone}"], random_model("small"))
    times = {"llada": samplers["llada"]["none"], "ours": lambda *_: torch.zeros(1, 6, dtype=torch.int64)}
    found = peers.compare(times, torch.ones(1, 2, dtype=torch.int64), 4, 8, 1, 2, iter(range(99)).__next__)
    row = peers.report(("none", 8, 1), found)
    assert row["errors"] == {"llada": "IndexError: a block too long"} and row["ratio"] is None and row["ours"] == 1

    def broken(*_):
        raise IndexError("ours")

    with pytest.raises(IndexError, match="ours"):
        peers.compare({"ours": broken}, torch.ones(1, 2), 4, 8, 1, 1, iter(range(99)).__next__)


@pytest.mark.parametrize(("words", "said"), [
    ([], "no peer was given"),
    (["--peer", "lada=x"], "'llada'"),
    (["--peer", "llada"], "has no generate.py"),
    (["--peer", "dllm=."], "has no dllm/core"),
])  # fmt: skip
def test_peers_refusals(words, said, capsys):
    assert main(["bench", "peers", "--config", "small", *words]) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------- speed


def test_speed_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 1e9)
    where = tmp_path / "rows.json"
    words = ["--config", "small", "--cells", "none:8:2", "dual:4:4", "--gen-length", "8", "--prompt-length", "4"]
    assert speed.main([*words, "--batch", "2", "--profile", "--repeats", "1", "--json", str(where)]) == 0
    none, dual = json.loads(where.read_text())["rows"]
    assert none["passes"] == 2 and none["positions_computed"] == 2 * 2 * 12
    assert dual["passes"] == 4 and dual["positions_computed"] == 2 * 2 * (12 + 4)
    for row in (none, dual):
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"])
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor"])
        assert sum(row["profile"].values()) == pytest.approx(1)
    assert set(dual["profile"]) == {"body", "attention", "head", "confidence", "commit", "cache", "host"}
    assert "cache" not in none["profile"]
    out = capsys.readouterr().out
    assert "1M parameters" in out and f"2 cells: {none['seconds'] + dual['seconds']:.3f} s" in out


@pytest.mark.parametrize(("warm_up", "repeats"), [(0, 1), (1, 2)])
def test_what_is_timed(warm_up, repeats, monkeypatch):
    """Runs to warm up are neither timed nor counted; of the timed ones the passes of the last are kept."""
    model, ticks, ran = random_model("small"), iter(range(100)), []
    generate = dlm.generate
    monkeypatch.setattr(dlm, "generate", lambda *words: ran.append(1) or generate(*words))
    config = dlm.SamplingConfig(gen_length=8, block_length=4, steps=4, method="none")
    row = speed.measure(model, [[1, 2, 3]], config, warm_up, repeats, Limits("float32", 4, 1e9, 1e9), ticks.__next__)
    assert len(ran) == warm_up + repeats and next(ticks) == 2 * repeats and row["seconds"] == 1
    assert row["passes"] == 4 and row["positions_computed"] == 4 * 11


def test_profile_of_the_plain_model():
    model = random_model("small")
    model.config._attn_implementation = "eager"  # not packed
    config = dlm.SamplingConfig(gen_length=8, block_length=4, steps=4, method="dual")
    shares = speed.profile(model, [[1, 2, 3]], config)
    assert set(shares) == {"body", "attention", "head", "confidence", "commit", "cache", "host"}


def test_rates_are_of_the_order_of_a_processor():
    device = torch.device("cpu")
    assert 1e8 < roofline.matmul_rate(torch.float32, device) < 1e14
    assert 1e8 < roofline.bandwidth(device) < 1e13


@pytest.mark.parametrize(("words", "said"), [
    (["--config", "25"], "'25m'"),
    (["--cells", "dual:8"], "METHOD:BLOCK:STEPS"),
    (["--batch", "0"], "batch is 0"),
    (["--warm-up", "-1"], "warm-up is -1"),
    (["--cuda-graphs", "--device", "cpu"], "--device is cpu"),
])  # fmt: skip
def test_speed_refusals(words, said, capsys):
    assert main(["bench", "speed", *words]) == 2
    assert said in capsys.readouterr().err

"""`dlm train preference`: pairs in TRL's formats, a run that learns them and resumes exactly, refusals of one line."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from dlm.data.pairs import messages_of_pair
from dlm.training.state import checkpoints
from tests.helpers.commandline import make_checkpoint, tokenizer  # noqa: F401
from tests.helpers.ranks import ROOT, two
from tests.helpers.recipes import fresh, records, weights
from train import preference

assert fresh  # a fixture for every test here
SAME = {"role": "assistant", "content": "b"}


@pytest.fixture
def start(tmp_path, tokenizer):  # noqa: F811
    """start(output, *options) -> exit code of a tiny run on eight pairs, whose chosen answers end in "sea"."""
    make_checkpoint(tmp_path / "model", tokenizer)
    pairs = [{"prompt": f"Fox {n}", "chosen": "by the sea", "rejected": "on the mat and"} for n in range(8)]
    write(tmp_path / "pairs.jsonl", pairs)

    def start(output, *more, data="pairs.jsonl"):
        AcceleratorState._reset_state(reset_partial_state=True)
        return preference.main([*argv(tmp_path, output, data), *more])

    return start


def argv(folder, output, data="pairs.jsonl"):
    options = {
        "model": folder / "model", "data": folder / data, "output": folder / output, "format": "plain",
        "max-steps": 6, "batch-size": 4, "draws": 4, "precision": "no", "checkpoint-every": 3, "warmup-steps": 1,
        "learning-rate": "5e-3", "log-every": 1, "tracker": "none", "schedule": "constant",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_are_learned_and_a_resumed_run_is_the_same(tmp_path, start):
    assert start("whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    shutil.rmtree(checkpoints(tmp_path / "parts")[-1][1])  # as if killed after step 3
    assert start("parts", "--resume") == 0
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model"))
    assert start("cut", "--accumulation=2") == 0
    assert (weights(tmp_path / "whole" / "model") - weights(tmp_path / "cut" / "model")).abs().max() < 1e-4
    log = records(tmp_path / "whole")
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and log[-1]["loss"] < log[0]["loss"]  # the reference first
    assert log[-1]["accuracy"] == 1 and log[-1]["margin"] > 0
    assert log[-1]["variance_shared"] < log[-1]["variance_apart"]


@pytest.mark.parametrize("both", [True, False])
def test_the_model_keeps_its_visibilities(tmp_path, start, tokenizer, both):  # noqa: F811
    """A regression test: pairs were compared under full attention, and a model with blocks came out without them."""
    shape = {"block_length": 4, **({"full_attention": True} if both else {})}
    make_checkpoint(tmp_path / "model", tokenizer, **shape)
    assert start("run", f"--export={tmp_path / 'export'}", "--export-dtype=float32") == 0
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "export"))
    assert after == before
    log = records(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and log[-1]["margin"] > 0
    assert log[-1]["variance_shared"] < log[-1]["variance_apart"]


def test_the_reference_of_a_resume_is_the_same(tmp_path, start, tokenizer, capsys):  # noqa: F811
    assert start("run", "--max-steps=3") == 0
    make_checkpoint(tmp_path / "model", tokenizer, rope_theta=500.0)
    model = tmp_path / "model" / "model.safetensors"
    shutil.copy(tmp_path / "run" / "model" / "model.safetensors", model)  # other weights
    make = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**make, "rope_theta": 10000.0}))
    assert start("run", "--resume") == 2
    assert "was made with objective " in capsys.readouterr().err


def test_adapters_are_their_own_reference(tmp_path, start):
    assert start("lora", "--lora=2", "--ema=0", "--sft-weight=0.1") == 0
    log = records(tmp_path / "lora")
    assert log[0]["chosen_gain"] == pytest.approx(0, abs=1e-4) and log[-1]["margin"] > 0


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], [], "line 1: chosen and rejected are the same text"),
        ([{"prompt": "a", "chosen": "b"}], [], "needs chosen and rejected, and the columns are"),
        ([{"prompt": 3, "chosen": "b", "rejected": "c"}], [], "column 'prompt' is a int"),
        ([{"chosen": "b", "rejected": "c"}], [], "chosen is no answer to a prompt"),
        ([{"prompt": "a " * 400, "chosen": "b", "rejected": "c"}], [], "no pair in 1 rows (1 longer than 128 tokens"),
        ([{"prompt": "a", "chosen": "b", "rejected": [SAME]}], [], "have the same tokens"),
        ([{"prompt": "a", "chosen": "\ud800", "rejected": "c"}], [], "line 1: half of a character"),
        (None, ["--beta=0"], "beta is 0.0"),
        (None, ["--beta=nan"], "beta is nan"),
        (None, ["--beta=inf"], "beta is inf"),
        (None, ["--random-length=0.5"], "random_length is 0.5, and pairs are compared whole"),
        (None, ["--objective=autoregressive"], "need a diffusion objective"),
        (None, ["--repeat-share=0.5"], "repeat_share is 0.5, and this recipe has a loss of its own"),
    ],
)
def test_bad_input_is_one_line(tmp_path, start, capsys, rows, more, message):
    if rows is not None:
        write(tmp_path / "pairs.jsonl", rows)
    assert start("run", *more) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told


def test_bad_rows_are_left_out_and_counted(tmp_path, start, capsys):
    good = {"prompt": "Fox", "chosen": "by the sea", "rejected": "on"}
    write(tmp_path / "pairs.jsonl", [good, {**good, "rejected": "by the sea"}, good])
    assert start("run", "--on-bad-row=skip", "--batch-size=2", "--max-steps=1") == 0
    assert "3 rows" in (out := capsys.readouterr().out) and "1 bad rows" in out


def test_a_reference_of_another_vocabulary_is_refused(tmp_path, start, tokenizer, capsys):  # noqa: F811
    make_checkpoint(tmp_path / "other", tokenizer, vocab_size=len(tokenizer) + 5, embedding_size=len(tokenizer) + 5)
    assert start("run", f"--reference={tmp_path / 'other'}") == 2
    assert "give one with its vocabulary" in capsys.readouterr().err


def test_a_reference_with_other_words_under_the_same_numbers_is_refused(tmp_path, start, tokenizer, capsys):  # noqa: F811
    """The embeddings are as many, but two tokens of the tokenizer have changed places."""
    make_checkpoint(tmp_path / "other", tokenizer)
    file = tmp_path / "other" / "tokenizer.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(words), encoding="utf-8")
    assert start("run", f"--reference={tmp_path / 'other'}") == 2
    told = capsys.readouterr().err
    assert "has other tokens (" in told and "give one with the same tokenizer" in told and told.count("\n") == 1


def test_formats_of_trl():
    user, one, two = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    text = messages_of_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, "x")
    lists = messages_of_pair({"prompt": [user], "chosen": [one], "rejected": [two]}, "x")
    whole = messages_of_pair({"chosen": [user, one], "rejected": [user, two]}, "x")
    assert text == lists == whole
    assert [m["loss"] for m in text[0]] == [False, True] and text[1][-1]["content"] == "b"


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path, start, capsys):
    """A regression test: --on-bad-row skip stopped at a line that does not parse. The card counts pairs, not tokens."""
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "a", \n[1]\n')
    assert start("run", "--max-steps=1") == 2
    assert "line 9: not JSON" in (told := capsys.readouterr().err) and "--on-bad-row skip" in told
    assert start("run", "--on-bad-row=skip", "--max-steps=4") == 0
    assert "2 bad rows" in capsys.readouterr().out
    notes = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert (notes["pairs_seen"], notes["epochs"]) == (16, 2.0) and "tokens_seen" not in notes


def test_weights_of_pairs_are_refused(tmp_path, start, capsys):
    """A regression test: data with weights were taken, and the weights were not."""
    assert start("run", data="pairs.jsonl:0.5") == 2
    assert "has weight 0.5, and pairs are taken once each" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_have_the_same_run(tmp_path, start, measured):
    """DDP by gloo, against one process: weights, losses, and what is logged beside them."""
    assert start("one") == 0
    two([ROOT / "train" / "preference.py", *argv(tmp_path, "two")])
    measured("weights, 1 process and 2, preferences",
             (weights(tmp_path / "one" / "model") - weights(tmp_path / "two" / "model")).abs().max(), 1e-5)  # fmt: skip
    for mine, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for name in ("loss", "margin", "accuracy", "variance_shared", "variance_apart"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), (name, mine, theirs)

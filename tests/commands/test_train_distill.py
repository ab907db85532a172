"""`dlm train distill`, and requests mixed into `dlm train pretrain`: from files to a model that loads."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

import dlm
from dlm.training.state import checkpoints
from tests.helpers.commandline import make_checkpoint, run, tokenizer  # noqa: F401
from tests.helpers.ranks import ROOT, two
from tests.helpers.recipes import weights
from train import distill, pretrain

SHORT = ["--max-steps", "2", "--batch-size", "2", "--sequence-length", "40", "--precision", "no", "--tracker", "none"]


@pytest.fixture
def texts(tmp_path):
    story = "Once upon a time there was a little fox who lived by the sea. She walked along the beach."
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for _ in range(8)))
    rows = [{"prompt": "Tell me a story.", "response": "The cat sat."}] * 8
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("teacher", ["autoregressive", ""])
def test_distill(texts, tokenizer, teacher, capsys):  # noqa: F811
    student = make_checkpoint(texts / "student", tokenizer)
    options = ["--data", f"{texts / 'texts.jsonl'}", "--model", f"{student}", "--texts", "3"]
    if teacher:
        options += ["--teacher", f"{make_checkpoint(texts / 'teacher', tokenizer, objective=teacher)}"]
    out = texts / "out"
    blocks = ["--objective", "block_diffusion", "--block-length", "4", "--full-share", "0.5", "--batch-size", "4"]
    assert distill.main([*SHORT, *options, *blocks, "--output", f"{texts / 'run'}", "--export", f"{out}"]) == 0
    model, _ = dlm.load(out)
    assert model.config.full_attention and model.config.block_length == 4


def test_distill_needs_a_model_and_a_diffusion_objective(capsys):
    assert distill.main(["--data", "a.jsonl"]) == 2 and "--model" in capsys.readouterr().err
    assert distill.main(["--data", "a", "--model", "m", "--objective", "autoregressive"]) == 2
    assert distill.main(["--data", "a", "--model", "m", "--sequence-length", "16"]) == 2
    assert "a text begins with up to 16 tokens that are given: give at least 17" in capsys.readouterr().err


def test_requests_are_mixed_into_pretraining(texts, tokenizer, capsys):  # noqa: F811
    words = make_checkpoint(texts / "words", tokenizer)
    data = ["--data", f"{texts / 'texts.jsonl'}:0.5", "--chats", f"{texts / 'chats.jsonl'}:0.5"]
    shape = ["--d-model", "32", "--n-layers", "1", "--n-heads", "2", "--tokenizer", f"{words}"]
    shape += ["--sequence-length", "128"]
    assert pretrain.main([*SHORT, *data, *shape, "--output", f"{texts / 'run'}"]) == 0
    assert pretrain.main([*SHORT, *data[:3], f"{texts / 'chats.jsonl'}", *shape, "--output", f"{texts / 'b'}"]) == 2
    assert "weights" in capsys.readouterr().err


@pytest.mark.parametrize("teach", [["sdtt", "--steps=4", "--rounds=2"], ["consistency", "--teacher-ema=0.9"]])
def test_a_teacher_of_the_same_shape_and_an_exact_resume(texts, tokenizer, teach, capsys):  # noqa: F811
    """The checkpoint keeps a teacher that moved: killed after the first round, or in the middle of an average."""
    student = make_checkpoint(texts / "student", tokenizer)
    options = [*SHORT[2:], "--max-steps=4", "--checkpoint-every=2", "--log-every=1", f"--data={texts / 'texts.jsonl'}"]
    options += [f"--model={student}", f"--teach={teach[0]}", *teach[1:]]

    def start(name, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        return distill.main([*options, f"--output={texts / name}", *more])

    assert start("whole") == 0
    shutil.copytree(texts / "whole", texts / "parts")
    shutil.rmtree(texts / "parts" / "model")
    [(_, second), (_, last)] = checkpoints(texts / "parts")
    assert (second / "objective.safetensors").is_file()
    shutil.rmtree(last)
    assert start("parts", "--resume") == 0
    assert torch.equal(weights(texts / "whole" / "model"), weights(texts / "parts" / "model"))
    other = make_checkpoint(texts / "other", tokenizer, n_layers=1)
    assert start("bad", f"--teacher={other}") == 2
    assert "is of another shape or family" in capsys.readouterr().err


def test_texts_are_kept_with_their_order_and_learned_again(texts, tokenizer, capsys):  # noqa: F811
    """`texts.jsonl` says at which pass each token was committed; a file cut off in a line is gone on with, and `--own`
    learns from it beside requests. A file of other texts is refused."""
    from train.texts import read_texts

    student = make_checkpoint(texts / "student", tokenizer)
    options = [*SHORT, "--sequence-length", "64", "--model", f"{student}", "--data", f"{texts / 'texts.jsonl'}"]
    writing = ["--texts", "5", "--output", f"{texts / 'run'}"]
    assert distill.main([*options, *writing]) in (0, 2)  # a random model may double a word in each
    file = texts / "run" / "texts.jsonl"
    first = read_texts(file)
    assert len(first) == 5
    for text in first:
        given = text.passes.count(-1)
        assert text.passes[:given] == [-1] * given and len(text.passes) == len(text.ids)
        assert min(text.passes[given:], default=1) > 0
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"ids": [1, ')
    AcceleratorState._reset_state(reset_partial_state=True)
    distill.main([*options, *writing, "--resume"])
    assert len(read_texts(file)) == 5
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert distill.main([*options, *writing, "--temperature", "0.5", "--resume"]) == 2
    assert "temperature 0.7, not 0.5" in capsys.readouterr().err
    own = texts / "own.jsonl"
    word = tokenizer("The cat sat on the mat and a dog ran by", add_special_tokens=False)["input_ids"]
    rows = [{"format": "dlm-texts"}, *[{"ids": word, "passes": [-1, *range(len(word) - 1)]}] * 3]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    AcceleratorState._reset_state(reset_partial_state=True)
    learning = [
        "--own",
        f"{own}",
        "--ordered",
        "1",
        "--chats",
        f"{texts / 'chats.jsonl'}",
        "--output",
        f"{texts / 'b'}",
    ]
    assert distill.main([*options, *learning]) == 0
    assert "3 of 3 texts" in capsys.readouterr().out


def test_texts_that_double_words_are_left_out():
    from train.texts import Text, reads_well

    text = Text(list(range(20)), [0] * 20)
    assert reads_well(text, "The cat sat. Sat it? No: the cat's cat did") is False  # "sat. Sat" counts too
    assert reads_well(text, "A cat and a cat's cat")
    assert not reads_well(text, "the the cat")
    assert not reads_well(Text([1, 2, 3, 4] * 5, [0] * 20), "a cat")


def test_weights_are_given_for_all_sources_or_none(texts, tokenizer, capsys):  # noqa: F811
    """A regression test: a weight beside a source without one was compared with that one's number of rows."""
    student = make_checkpoint(texts / "student", tokenizer)
    options = [*SHORT, "--model", f"{student}", "--data", f"{texts / 'texts.jsonl'}:0.5"]
    chats = ["--chats", f"{texts / 'chats.jsonl'}", "--output", f"{texts / 'run'}"]
    assert distill.main([*options, *chats]) == 2
    assert "some sources of data and chats have weights and some have none" in capsys.readouterr().err
    assert not (texts / "run" / "texts.jsonl").exists()


def test_a_file_of_texts_is_checked_and_never_written(tmp_path):
    """Regression tests: --own rewrote a file whose last line was cut off, and ended in a traceback at a row without
    ids."""
    from train.texts import read_texts

    file = tmp_path / "own.jsonl"
    whole = '{"format": "dlm-texts"}\n{"ids": [1, 2], "passes": [-1, 1]}\n{"ids": [1'
    file.write_text(whole)
    assert [text.ids for text in read_texts(file)] == [[1, 2]] and file.read_text() == whole
    for row in ("[1]", '{"ids": [1]}', '{"ids": [1], "passes": [1, 2]}', '{"ids": [], "passes": []}', '{"ids": ["a"]}'):
        file.write_text('{"format": "dlm-texts"}\n' + row + "\n")
        with pytest.raises(ValueError, match=r"own\.jsonl: line 2 is no text with ids and passes"):
            read_texts(file)


@pytest.mark.slow
@pytest.mark.parametrize("teach", [["sdtt", "--steps=4", "--rounds=2"], ["consistency", "--teacher-ema=0.9"]])
def test_two_processes_have_the_same_run(texts, tokenizer, teach, measured):  # noqa: F811
    """DDP by gloo, against one process, over the end of a round and with a teacher that follows."""
    student = make_checkpoint(texts / "student", tokenizer)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = [*SHORT[2:], "--max-steps=4", f"--data={texts / 'texts.jsonl'}", f"--model={student}",
               f"--teach={teach[0]}", *teach[1:]]  # fmt: skip
    assert distill.main([*options, f"--output={texts / 'one'}"]) == 0
    two([ROOT / "train" / "distill.py", *options, f"--output={texts / 'two'}"])
    away = (weights(texts / "one" / "model") - weights(texts / "two" / "model")).abs().max()
    measured(f"weights, 1 process and 2, distillation by {teach[0]}", away, 5e-6)
    assert not torch.equal(weights(texts / "one" / "model"), weights(student))

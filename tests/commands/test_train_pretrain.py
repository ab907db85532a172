"""The pretraining recipe: settings by name, a run from text to a model that loads, interrupt and resume."""

import json
import os
import shlex
import signal

import pytest
import torch
from accelerate.state import AcceleratorState

import dlm
from dlm.training import trainer
from dlm.training.state import checkpoints
from train.pretrain import main, parse


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch, tmp_path):
    """Accelerate keeps one precision for a process; tokenized data goes to the test's own folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def arguments(tmp_path):
    """A recipe of four steps on twelve stories, as a function of the output folder."""
    stories = [f"The {animal} saw {n} red stars and went home." for animal in ("cat", "dog") for n in range(6)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    config = {
        "data": tmp_path / "stories.txt", "valid": tmp_path / "stories.txt", "vocab_size": 270, "sequence_length": 24,
        "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 32, "max_steps": 4, "batch_size": 2,
        "warmup_steps": 1, "valid_every": 0, "sample_every": 0, "checkpoint_every": 100, "precision": "no",
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
    return lambda output: ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / output)]


def weights(folder):
    model, _ = dlm.load(folder, device="cpu")
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--attn-implementation", "flax_attention"], "did you mean 'flex_attention'"),
        (["--learning-rat", "1e-3"], "unknown option --learning-rat: did you mean --learning-rate?"),
        (["--max-step=3"], "unknown option --max-step: did you mean --max-steps?"),
        (["--max-steps", "many"], "max_steps is 'many': it must be an int"),
        (["--objective", "difusion"], "did you mean 'diffusion'"),
        (["--export-dtype", "float99", "--data", "x.txt"], "one of float32, bfloat16, float16"),
        (["--export-dtype", "int8", "--export", "x", "--data", "x.txt"], "one of float32, bfloat16, float16"),
        (["--precision", "fp64"], "precision is 'fp64'"),
        (["--data", "x.txt", "--epochs", "2", "--max-steps", "9"], "--max-steps and --epochs both say how long"),
        (["--epochs", "nan"], "epochs is nan"),
        (["--skip-damaged"], "give --resume with it"),
        ([], "no data: give --data"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--data", ","], "no data: give --data"),
        (["--data", "x.txt", "--init-std", "-1"], "init_std is -1.0: give a number above 0"),
        (["--data", "x.txt", "--rope-theta", "nan"], "rope_theta is nan: give a number above 0"),
        (["--data", "x.txt", "--output", __file__], "test_train_pretrain.py is a file: give the name of a folder"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest_name(tmp_path, capsys, argv, message):
    assert main(["--output", str(tmp_path / "run"), *argv]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4\n", r"tiny.yaml: unknown key 'batchsize': did you mean 'batch_size'\?"),
        ("batch_size: four\n", "batch_size is 'four': it must be an int"),
        ("compile: 1\n", "compile is 1: it must be a bool"),
        ("- batch_size\n", "a list, not a list of"),
        ("a: b: c\n", "not YAML"),
    ],
)
def test_a_wrong_key_of_the_yaml_names_file_and_nearest_name(tmp_path, text, message):
    (tmp_path / "tiny.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(tmp_path / "tiny.yaml")])
    with pytest.raises(ValueError, match=r"missing.yaml: No such file"):
        parse(["--config", str(tmp_path / "missing.yaml")])


def test_the_command_line_overrides_the_yaml(tmp_path):
    (tmp_path / "tiny.yaml").write_text("max_steps: 7\nlearning_rate: 1e-3\nsample_prompts: [a, b]\nn_kv_heads: null\n")
    recipe = parse(["--config", str(tmp_path / "tiny.yaml"), "--max-steps", "9", "--no-compile", "--resume"])
    assert (recipe.max_steps, recipe.learning_rate, recipe.sample_prompts) == (9, 1e-3, ("a", "b"))
    assert recipe.resume and not recipe.compile and recipe.n_kv_heads is None
    assert parse([]).batch_size == 32  # a default


def test_text_becomes_a_model_that_loads_and_writes(tmp_path, arguments, capsys):
    export = tmp_path / "export"
    assert main([*arguments("run"), "--export", str(export), "--valid-every", "2", "--valid-rows", "2"]) == 0
    assert f"wrote {export}" in capsys.readouterr().out
    model, tokenizer = dlm.load(export, device="cpu")
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert json.loads((export / "config.json").read_text())["torch_dtype"] == "bfloat16"
    out = dlm.generate(model, ["The cat"], dlm.SamplingConfig(gen_length=8, steps=4), tokenizer=tokenizer)
    assert out.sequences.shape == (1, 8) and not (out.sequences == tokenizer.mask_token_id).any()
    notes = json.loads((export / "training.json").read_text())
    assert notes["steps"] == 4 and notes["recipe"]["batch_size"] == 2 and notes["validation"]["nats_per_token"] > 0
    assert shlex.split(notes["command"])[:3] == ["dlm", "train", "pretrain"]
    # what is exported is the moving average, rounded
    assert torch.equal(weights(export), weights(tmp_path / "run" / "model").bfloat16())


def test_interrupt_exits_130_and_the_printed_command_goes_on_bit_for_bit(tmp_path, arguments, capsys, monkeypatch):
    assert main(arguments("whole")) == 0
    take, steps = trainer.Run.train_step, []

    def interrupted_once(self, made):
        steps.append(self.step)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, made)

    monkeypatch.setattr(trainer.Run, "train_step", interrupted_once)
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert main(arguments("parts")) == 130
    told = capsys.readouterr().out
    assert steps == [0, 1] and "SIGINT" in told
    assert [step for step, _ in checkpoints(tmp_path / "parts")] == [2]
    command = shlex.split(told.strip().splitlines()[-1])
    assert command[:3] == ["dlm", "train", "pretrain"] and command[-1] == "--resume"  # called from Python
    assert not (tmp_path / "parts" / "model").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(command[3:]) == 0 and steps == [0, 1, 2, 3]
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model"))


def test_a_model_goes_on_with_its_own_tokenizer(tmp_path, arguments, capsys):
    assert main(arguments("first")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    first = tmp_path / "first" / "model"
    assert main([*arguments("second"), "--model", str(first), "--objective", "autoregressive"]) == 0
    assert not torch.equal(weights(first), weights(tmp_path / "second" / "model"))
    assert not (tmp_path / "second" / "tokenizer").exists()  # none was trained


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_causal_run_samples_token_by_token(tmp_path, arguments, capsys):
    """A regression test: with the default --sample-every every autoregressive run ended in an error at its first
    sample, step 1000 or the last one, and lost the steps since its checkpoint."""
    more = ["--objective=autoregressive", "--sample-every=3", "--sample-length=6", "--sample-prompts=The cat"]
    assert main([*arguments("run"), *more]) == 0
    samples = [record for record in records(tmp_path / "run") if record["kind"] == "sample"]
    assert [record["step"] for record in samples] == [3, 4] and samples[0]["prompt"] == "The cat"
    assert "step 3  sample: The cat" in capsys.readouterr().out


def test_a_run_that_ended_keeps_its_validation_when_it_is_exported_again(tmp_path, arguments):
    """A regression test: stopped between its last step and its export, a run's model card had no bound."""
    valid = ["--valid-every", "2", "--valid-rows", "2"]
    assert main([*arguments("run"), *valid]) == 0
    before = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments("run"), *valid, "--resume"]) == 0
    after = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert after["validation"] == before["validation"]
    assert (after["epochs"], after["tokens_seen"]) == (before["epochs"], before["tokens_seen"])


def test_a_second_run_in_the_folder_of_one_that_left_no_checkpoint(tmp_path, arguments, capsys, monkeypatch):
    """A regression test: the second run's log went behind the first one's, and its --vocab-size had no effect, since
    the first one's tokenizer was there. A run with checkpoints is refused before its tokenizer is touched."""
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Run, "save", lambda self: exit(9))  # killed before its first checkpoint
        with pytest.raises(SystemExit):
            main([*arguments("run"), "--log-every", "1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments("run"), "--vocab-size", "264", "--log-every", "1"]) == 0
    assert "is now" in (out := capsys.readouterr().out) and "metrics-1.jsonl" in out
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 264
    words = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments("run"), "--vocab-size", "280"]) == 2
    assert "holds checkpoints of a run: --resume it" in capsys.readouterr().err
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == words


def test_rows_are_no_longer_than_the_model(tmp_path, arguments, capsys):
    """A regression test: a model of 24 slots was trained on rows of 40, and said 24 afterwards."""
    assert main([*arguments("run"), "--max-sequence-length", "16"]) == 2
    assert "max_sequence_length is 16, below the rows of sequence_length 24" in capsys.readouterr().err
    assert main(arguments("run")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert main([*arguments("on"), "--model", str(tmp_path / "run" / "model"), "--sequence-length", "40"]) == 2
    assert "sequence_length is 40, but the model was made for at most 24 tokens" in capsys.readouterr().err


def test_a_warm_up_without_end_is_said(tmp_path, arguments, capsys):
    assert main([*arguments("run"), "--warmup-steps", "4", "--max-steps", "2"]) == 0
    assert "warning: warmup_steps 4 is all of max_steps 2: the learning rate never reaches" in capsys.readouterr().out

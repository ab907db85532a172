"""The command line, mostly in process with a tiny random model; the live view and Ctrl-C under a real terminal."""

import dataclasses
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

import dlm
from dlm.chat_template import chat_ids
from dlm.checkpoints.files import SHIPPED
from dlm.cli import main, scripts
from dlm.sampling.options import SAMPLING
from dlm.tokenizer import template
from tests.helpers import commandline
from tests.helpers.commandline import ENVIRONMENT, make_checkpoint

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

# ---------------------------------------------------------------- help and options


def test_help_fits_a_screen_and_needs_no_torch():
    code = "import sys; from dlm.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, "torch was imported"
    lines = done.stdout.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    assert all(f"  {name} " in done.stdout for name in main.COMMANDS)


def test_version(run):
    assert run("--version") == (0, f"dlm {dlm.__version__}\n", "")


def test_every_sampling_field_is_an_option_of_its_type():
    fields = {field.name: str(field.type) for field in dataclasses.fields(dlm.SamplingConfig)}
    assert set(SAMPLING) == set(fields)
    for name, (kind, text) in SAMPLING.items():
        assert text and (kind.__name__ in fields[name] or kind not in (int, float, str, bool))  # or reads a file


@pytest.mark.parametrize("command", ["generate", "infill", "chat"])
def test_help_of_commands_lists_options_with_defaults(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    least = "--threshold X for --commit threshold, dynamic, capped and stable: least confidence"
    assert f"{least} (default: {dlm.SamplingConfig().threshold})" in text


def test_help_shows_the_defaults_of_what_the_command_does(capsys):
    """Fault: the help of chat and infill showed those of generate."""

    def shown(option, *argv):
        with pytest.raises(SystemExit):
            main.main([*argv, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        return text.split(f" {option} ", 1)[1].split(" --", 1)[0]

    assert "(default: 128)" in shown("--gen-length N", "generate")
    assert "(default: 256)" in shown("--gen-length N", "generate", "--chat")
    assert "(default: 256)" in shown("--gen-length N", "chat")
    assert "default" not in shown("--gen-length N", "infill")
    assert "(default: none)" in shown("--method NAME", "infill")


# ---------------------------------------------------------------- generate


def test_a_switch_that_is_on_is_shown_as_what_turns_it_off(capsys):
    """`--no-stop-at-eos  stop a text at its end-of-text token` said the opposite of what it does."""
    for command in (["chat"], ["train", "sft"]):
        with pytest.raises(SystemExit):
            main.run([*command, "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--no-stop-at-eos turns this off: stop a text at its end-of-text token" in said
    assert "--no-packing turns this off: several examples in a row" in said and "--delay-eos write" in said


def test_text_when_not_a_terminal(run):
    code, out, error = run("generate", "The cat", "--gen-length", 4)
    assert code == 0 and error == ""
    assert out.startswith("The cat") and out.endswith("\n") and "\x1b" not in out


def test_json_has_one_object_a_prompt_and_equals_the_library(run, checkpoint):
    code, out, _ = run(
        "generate", "The cat", "Once", "--json", "--gen-length", 6, "--steps", 3, "--seed", 5, "--temperature", 1
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["prompt"] for record in records] == ["The cat", "Once"]
    model, tokenizer = dlm.load(checkpoint)
    config = dlm.SamplingConfig(gen_length=6, steps=3, seed=5, temperature=1.0)
    wanted = dlm.generate(model, ["The cat", "Once"], config, tokenizer=tokenizer)
    for row, record in enumerate(records):
        assert record["token_ids"] == wanted.sequences[row].tolist()
        assert (record["nfe"], record["tokens_per_forward"], record["seed"]) == (3, 2.0, 5 + row)
        assert record["latency_s"] > 0 and record["finished"] is True


def test_batch_size_does_not_change_the_texts(run):
    prompts = ["The cat", "Once upon a", "She", "A"]
    options = ("--json", "--gen-length", 5, "--temperature", 1, "--num-samples", 2)

    def texts(size):
        _, out, _ = run("generate", *prompts, *options, "--batch-size", size)
        return [(record["prompt"], record["seed"], record["token_ids"]) for record in map(json.loads, out.splitlines())]

    assert len(texts(8)) == 8
    assert texts(1) == texts(3) == texts(8)


def test_prompts_from_files_and_standard_input(run, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_bytes(b"\xef\xbb\xbfThe cat\r\n\r\nShe\r\n")  # with a byte-order mark, as some editors write it
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "two\\nlines"}\n\n{"prompt": "", "id": 3}\n')
    options = ("--json", "--gen-length", 2)

    def asked(out):
        return [json.loads(line)["prompt"] for line in out.splitlines()]

    assert asked(run("generate", "first", "--prompts", lines, *options)[1]) == ["first", "The cat", "She"]
    assert asked(run("generate", "--prompts", objects, *options)[1]) == ["two\nlines", ""]


def test_prompts_from_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The cat\nShe\n")))
    code, out, error = run("generate", "--json", "--gen-length", 2)
    assert (code, error) == (0, "")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["The cat", "She"]


def test_a_reader_that_leaves_is_no_error(checkpoint):
    command = f"{sys.executable} -m dlm generate x --model {checkpoint} --gen-length 3 --num-samples 99 --batch-size 1"
    done = subprocess.run(
        f"{command} --json | head -n 1", shell=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_options_override_the_checkpoint_which_overrides_the_defaults(run, checkpoint, tmp_path, tokenizer):
    folder = make_checkpoint(tmp_path / "own", tokenizer)
    own = {"dlm": {"gen_length": 8, "steps": 2, "chat": False}}
    (folder / "generation_config.json").write_text(json.dumps(own))

    def nfe(*options):
        return json.loads(run("generate", "The", "--json", *options, model=folder)[1])["nfe"]

    assert nfe() == 2
    assert nfe("--steps", 4) == 4
    assert nfe("--gen-length", 6) == 6  # its steps were meant for its own length
    (folder / "generation_config.json").write_text('{"dlm": {"stepz": 2}}')
    code, _, error = run("generate", "The", model=folder)
    assert code == 2 and "'stepz'" in error


def test_every_method_and_commit_runs(run):
    for options in (
        ["--method", "dual"],
        ["--method", "c2f", "--steps", 4],
        ["--method", "prefix", "--commit", "factor"],
        ["--method", "vicinity", "--commit", "threshold", "--window", 2],
        ["--cfg-scale", 1],
        ["--commit", "entropy_bound"],
        ["--top-k", 3, "--top-p", 0.9, "--temperature", 1],
    ):
        code, out, error = run("generate", "The cat", "--gen-length", 8, "--block-length", 4, "--json", *options)
        assert (code, error) == (0, ""), options
        assert len(json.loads(out)["token_ids"]) == 8


# ---------------------------------------------------------------- infill


def test_template_leaves_the_space_before_a_blank_to_the_model(tokenizer):
    mask = tokenizer.mask_token_id
    whole = template(tokenizer, "The cat ___ on the mat.", 1, mask)
    at = whole.index(mask)
    sat = tokenizer(" sat", add_special_tokens=False)["input_ids"]
    filled = whole[:at] + sat + whole[at + 1 :]
    assert filled == tokenizer("The cat sat on the mat.")["input_ids"]
    assert filled[0] == tokenizer.bos_token_id and filled.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "text, blanks, rest",
    [
        ("___", [4], ""),
        ("a ___{12} b____", [12, 4], "a b"),
        ("(___) ___{2}\n___", [4, 2, 4], "()\n"),
        ("two  ___", [4], "two  "),  # two spaces are meant
    ],
)
def test_template_blanks(tokenizer, text, blanks, rest):
    mask = tokenizer.mask_token_id
    ids = template(tokenizer, text, 4, mask)
    runs = [len(run) for run in re.findall("m+", "".join("m" if token == mask else "." for token in ids))]
    assert runs == blanks
    assert tokenizer.decode([token for token in ids if token != mask], skip_special_tokens=True) == rest


def test_infill_keeps_the_given_text_and_says_what_it_filled(run):
    code, out, _ = run("infill", "The cat ___{3} on the mat, and then ___.", "--blank-length", 2, "--json")
    record = json.loads(out)
    assert code == 0 and len(record["token_ids"]) == 5 and len(record["fills"]) == 2
    assert record["text"] == f"The cat{record['fills'][0]} on the mat, and then{record['fills'][1]}."
    code, out, _ = run("infill", "The ___ sat.", "She ___ by the ___{5}.")
    assert code == 0 and out.startswith("The") and len(out.split("\n\n")) >= 2


# ---------------------------------------------------------------- chat, info, train


def test_chat_keeps_the_turns_and_refuses_base_models(run, monkeypatch, checkpoint, tokenizer, tmp_path):
    seen = []
    monkeypatch.setattr("dlm.chat_template.chat_ids", lambda tok, messages, mask: seen.append([*messages]) or [1, 2])
    lines = iter(["hello", "again", "/nonsense", "/reset", "new", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, error = run("chat", "--gen-length", 2, "--json")
    assert code == 0 and "/reset" in error and len(out.splitlines()) == 3
    assert [[message["role"] for message in messages] for messages in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    base = make_checkpoint(tmp_path / "base", tokenizer)
    (base / "generation_config.json").write_text('{"dlm": {"chat": false}}')
    code, _, error = run("chat", model=base)
    assert code == 2 and "was not trained to answer" in error and error.count("\n") == 1
    (base / "generation_config.json").unlink()
    (base / "chat_template.jinja").unlink()
    code, _, error = run("chat", model=base)
    assert code == 2 and "no chat template" in error


def test_chat_goes_on_when_the_model_cannot_read_the_whole_conversation(run, monkeypatch):
    """Fault: the third question to the shipped model ended `dlm chat`, and typed ones failed for ever."""
    seen = []
    monkeypatch.setattr(
        "dlm.chat_template.chat_ids",
        lambda tok, messages, mask: (
            seen.append([message["content"] for message in messages]) or [1] * 10 * len(messages)
        ),
    )
    lines = iter(["one", "two", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, error = run("chat", "--gen-length", 90, "--json")  # of 128: 38 are left, three messages
    assert code == 0 and len(out.splitlines()) == 3
    assert seen[-1][0] == "two" and len(seen[-1]) == 3
    assert error.count("no longer sees the oldest turns") == 1


def test_chat_reads_as_many_requests_as_the_checkpoint_says(run, monkeypatch, checkpoint, tmp_path):
    """Fault: the shipped model's second answer went on with its first story."""
    seen, folder = [], tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text('{"dlm": {"chat": {"turns": 1}}}')

    def ids(tok, messages, mask):
        seen.append([message["content"] for message in messages if message["role"] == "user"])
        return [1, 2]

    monkeypatch.setattr("dlm.chat_template.chat_ids", ids)
    for options, wanted in (([], [["one"], ["two"], ["three"]]), (["--turns", 2], [["one", "two"], ["two", "three"]])):
        lines = iter(["one", "two", "three", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        code, _, error = run("chat", "--gen-length", 2, *options, model=folder)
        assert code == 0, error
        assert seen[-len(wanted) :] == wanted
    code, _, error = run("chat", "--turns", 0, model=folder)
    assert code == 2 and "--turns is 0: give 1 or more" in error


def test_the_shipped_model_reads_one_request():
    assert dlm.load_pretrained(SHIPPED).chat_turns == 1


def test_chat_template_prompts(run, tokenizer):
    code, out, _ = run("generate", "hello", "--chat", "--gen-length", 2)
    assert code == 0 and "hello" not in out
    ids = chat_ids(tokenizer, [{"role": "user", "content": "hello"}], tokenizer.mask_token_id)
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids).endswith("assistant<|end_header_id|>\n\n")


def test_info(run, checkpoint, tokenizer, tmp_path):
    code, out, error = run("info", checkpoint)
    assert (code, error) == (0, "") and "full" in out and "none, prefix, dual, vicinity, c2f" in out
    facts = json.loads(run("info", checkpoint, "--json")[1])
    model, _ = dlm.load(checkpoint)
    assert facts["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (facts["mask_id"], facts["mask_token"]) == (tokenizer.mask_token_id, "<|mdm_mask|>")
    assert (facts["dtype"], facts["max_length"], facts["block_causal"]) == ("float32", 128, False)
    suited = ["none", "block_causal", "pipeline", "pipeline_causal"]
    blocks = json.loads(run("info", make_checkpoint(tmp_path / "blocks", tokenizer, block_length=4), "--json")[1])
    assert (blocks["block_causal"], blocks["block_length"], blocks["methods"]) == (True, 4, suited)


def test_train_lists_and_runs_recipes(run, tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text('"""A toy."""\n\ndef main(argv):\n    print(argv)\n    return 3\n')
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(scripts, "scripts", lambda command: {"toy": tmp_path / "toy.py"})
    assert run("train", "toy", "--steps", "5") == (3, "['--steps', '5']\n", "")
    code, out, _ = run("train")
    assert code == 0 and re.search(r"toy +A toy\.", out)
    code, _, error = run("train", "tow")
    assert code == 2 and "no 'tow' in dlm train: the nearest is 'toy'" in error


def test_recipes_are_found_in_a_clone():
    assert "pretrain" in scripts.scripts("train")


# ---------------------------------------------------------------- under a terminal


class Pty:
    """`dlm` under a pseudo-terminal of 60 x 20."""

    def __init__(self, *arguments):
        import fcntl
        import pty
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dlm", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.output = b""

    def read(self, until=None, seconds=90):
        """Read until the output holds `until`, or to the end."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and (until is None or until not in self.output):
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    part = os.read(self.master, 65536)
                except OSError:  # the other side was closed
                    break
                if not part:
                    break
                self.output += part
        return self.output.decode()

    def close(self):
        text = self.read()
        code = self.process.wait(timeout=30)
        os.close(self.master)
        return code, text


def test_live_view_under_a_terminal(checkpoint):
    code, text = Pty("generate", "The cat", "--model", checkpoint, "--gen-length", 24, "--block-length", 8).close()
    assert code == 0
    assert "░" in text and "pass 24/24" in text and "block 3/3" in text
    live, after = text.rsplit("\x1b[?25h", 1)  # the cursor comes back before the text is printed
    assert live.count("\x1b[?25l") == 1 and "\x1b[1mThe cat\x1b[0m" in after and "░" not in after
    assert "24 tokens · 24 passes" in after


@pytest.mark.parametrize(
    "options, term, live",
    [([], "xterm", True), (["--no-live"], "xterm", False), (["--json"], "xterm", False), ([], "dumb", False)],
)
def test_when_there_is_a_live_view(checkpoint, monkeypatch, options, term, live):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main.main(["generate", "The cat", "--model", str(checkpoint), "--gen-length", "4", *options]) == 0
    assert ("\x1b[?25l" in sys.stdout.getvalue()) == ("░" in sys.stdout.getvalue()) == live


def test_interrupt_restores_the_terminal_and_shows_what_there_is(checkpoint):
    screen = Pty("generate", "The cat", "--model", checkpoint, "--gen-length", 100, "--delay", 0.1)
    screen.read(until=b"pass 3/100")
    os.write(screen.master, b"\x03")
    code, text = screen.close()
    assert code == 130 and "Traceback" not in text
    _, after = text.rsplit("\x1b[?7h\x1b[?25h", 1)
    assert "The cat" in after and "░░░░" in after and "dlm: interrupted after" in after

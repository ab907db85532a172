"""Bad input: one clear line on standard error that names the value, the reason and the fix; exit code 2."""

import contextlib
import io
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

import dlm
from dlm.cli import chat, main, scripts, session
from dlm.cli.lines import PROMPT, Piece
from tests.helpers import commandline
from tests.helpers.commandline import ENVIRONMENT, make_checkpoint

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "x", "--method", "nome"], ["'nome'", "'none'"]),
        (["generate", "x", "--metod", "none"], ["--metod", "--method"]),
        (["generate", "x", "--gen-len", "3"], ["--gen-len", "--gen-length"]),  # no abbreviations
        (["genrate", "x"], ["'genrate'", "'generate'"]),
        (["generate", "x", "--steps", "x"], ["--steps", "'x'"]),
        (["generate", "x", "--steps", "2", "--gen-length", "99"], ["steps", "2", "4 blocks"]),
        (["generate", "x", "--gen-length", "0"], ["--gen-length is 0"]),
        (["generate", "x", "--gen-length", "-3"], ["--gen-length is -3"]),
        (["generate", "x", "--steps", "0"], ["--steps is 0"]),
        (["generate", "x", "--block-length", "0"], ["--block-length is 0"]),
        (["generate", "x", "--temperature", "nan"], ["--temperature is nan"]),
        (["generate", "x", "--batch-size", "0"], ["--batch-size is 0"]),
        (["generate", "x", "--num-samples", "-1"], ["--num-samples is -1"]),
        (["generate", "x", "--delay", "-1"], ["--delay"]),
        (["generate", "x", "--gen-length", "127"], ["129", "128", "shorten"]),
        (["generate", "x", "--method", "block_causal"], ["full-attention", "dual"]),
        (["generate", "x", "--device", "abacus"], ["device abacus"]),
        (["generate", "x", "--dtype", "float3"], ["'float3'", "float32"]),
        (["generate", "x", "--attn-implementation", "sdpaa"], ["'sdpaa'", "'sdpa'"]),
        (["generate", "a <|mdm_mask|> b"], ["mask token <|mdm_mask|>"]),
        (["generate", "--prompts", "/nowhere/p.txt"], ["/nowhere/p.txt", "No such file"]),
        (["generate", "x", "--max-new-tokens", "9"], ["--max-new-tokens", "it is --gen-length here"]),
        (["generate", "x", "--max-length", "9"], ["it is --gen-length here"]),
        (["generate", "x", "--temp=0.5"], ["it is --temperature here"]),
        (["generate", "x", "--num-return-sequences", "2"], ["it is --num-samples here"]),
        (
            ["generate", "x", "--threshold", "0.5"],
            ["--threshold has no effect", "--commit is quota"],
        ),
        (["generate", "x", "--top-p", "0.5"], ["--top-p has no effect", "--temperature"]),
        (["generate", "x", "--gen-length", "1000000000000"], ["--gen-length is 1000000000000", "128 tokens"]),
        (["generate", "x", "--num-samples", "1000000000000"], ["--num-samples is 1000000000000", "1,000,000"]),
        (["generate", "x " * 5_000_000], ["10,000,000 characters", "128 tokens"]),
        (["generate", "\ud800"], ["\\ud800", "not UTF-8"]),
        (["infill", "a ___{abc}"], ["___{abc}", "___{12}"]),
        (["infill", "a ___{1000000000}"], ["1000000000", "128 tokens"]),
        (["infill", "a ___{" + "9" * 5000 + "}"], ["10^12"]),
        (["infill", "a ___", "--blank-length", "1000000000"], ["--blank-length is 1000000000"]),
        (["info", "a", "--model", "b"], ["both a and --model b"]),
        (["infill", "nothing"], ["'nothing'", "___"]),
        (["infill", "a ___{0}"], ["___{0}"]),
        (["infill", "a ___", "--blank-length", "0"], ["--blank-length is 0"]),
        (["infill", "a ___ <|mdm_mask|>"], ["mask token"]),
        (["info", "/nowhere"], ["/nowhere"]),
        (["info", "nobody/nothing"], ["nobody/nothing", "hub"]),
    ],
)
def test_bad_options(run, arguments, words):
    code, out, error = run(*arguments)
    assert code == 2 and out == ""
    assert error.startswith("dlm: error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "x", "--regex", "("], "--regex is '(': missing ), unterminated subpattern"),
        (["generate", "x", "--chat", "--choices", ","], "--choices is ('', '')"),
        (["generate", "x", "--json-schema", __file__], "test_bad_input.py is not JSON"),
        (["infill", "a ___{8:/[/}"], "a blank's pattern is '[': unterminated character set"),
        (["infill", "no blank"], "no blank in 'no blank'"),
        (["chat", "--regex", "a)(b"], "--regex is 'a)(b': unbalanced parenthesis"),
    ],
)
def test_patterns_are_checked_before_anything_is_loaded(run, monkeypatch, arguments, words):
    from dlm.checkpoints import pretrained

    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    code, out, error = run(*arguments)
    assert code == 2 and out == "" and error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe", ["UTF-8"]),
        (b"", ["no prompt"]),
        (b" \n\n", ["no prompt"]),
        (b'{"prompt": "a"}\n{"text": "b"}\n', ["line 2", '"prompt"']),
        (b'{"prompt": 5}\n', ["line 1"]),
    ],
)
def test_bad_prompt_files(run, tmp_path, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    code, out, error = run("generate", "--prompts", file)
    assert code == 2 and out == "" and error.count("\n") == 1
    assert all(word in error for word in [*words, str(file)]), error


def damage(folder, tokenizer, kind):
    file, settings = folder / "model.safetensors", folder / "config.json"
    if kind == "no config":
        settings.unlink()
    elif kind == "no weights":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "another family":
        settings.write_text(settings.read_text().replace('"llada"', '"gpt2"'))
    elif kind == "no mask token":
        fields = json.loads(settings.read_text()) | {"mask_token_id": len(tokenizer) + 7}
        settings.write_text(json.dumps(fields))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif kind == "no folder":
        return folder / "sub"
    return folder


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no config", ["no config.json"]),
        ("no weights", ["no weights"]),
        ("truncated", ["cut short"]),
        ("another family", ["'gpt2'"]),
        ("no mask token", ["mask_token_id is 343", "336 embeddings"]),
        ("no tokenizer", ["no tokenizer"]),
        ("no folder", ["is not a folder"]),
    ],
)
def test_bad_checkpoints(run, tmp_path, tokenizer, kind, words):
    folder = damage(make_checkpoint(tmp_path / "bad", tokenizer), tokenizer, kind)
    code, out, error = run("generate", "x", model=folder)
    assert code == 2 and out == "" and error.count("\n") == 1 and "Traceback" not in error
    assert all(word in error for word in words), error
    if kind in ("no config", "no weights", "truncated", "another family", "no folder"):
        code, _, error = run("info", folder)
        assert code == 2 and error.count("\n") == 1 and all(word in error for word in words), error


def test_logits_that_are_not_numbers_are_a_failure_that_names_the_pass(run, tmp_path, tokenizer):
    folder = make_checkpoint(tmp_path / "nan", tokenizer)
    model, _ = dlm.load(folder)
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(1e38)  # a number still; the logits overflow
        model.model.transformer.ff_out.weight.mul_(1e3)
    model.save_pretrained(folder)
    code, out, error = run("generate", "x", "--gen-length", 2, model=folder)
    assert code == 2 and out == "" and error.count("\n") == 1 and "pass 1" in error


def test_json_keeps_every_character_on_a_pipe_that_lacks_it(run, monkeypatch, checkpoint):
    """Was: on a cp1252 pipe characters became question marks (case 13)."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    monkeypatch.setattr("sys.stdout", stream)
    prompt = "日本 fox é"
    assert main.main(["generate", prompt, "--gen-length", "4", "--json", "--model", str(checkpoint)]) == 0
    stream.flush()
    text = raw.getvalue().decode("cp1252")
    assert json.loads(text)["prompt"] == prompt and "?" not in text


def test_no_nan_in_json(capsys):
    session.print_json({"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.0]}


@pytest.mark.parametrize("term", [None, "dumb", "xterm"])
def test_text_never_steers_a_terminal(monkeypatch, term):
    """Was: a terminal without TERM got the text's control characters (case 17)."""
    monkeypatch.delenv("TERM", raising=False)
    if term:
        monkeypatch.setenv("TERM", term)

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    session.print_text([Piece("a\x1b]0;title\x07b\x1b[2J")])
    assert sys.stdout.getvalue() == "a\ufffd]0;title\ufffdb\ufffd[2J\n"


def test_a_long_text_has_no_line_breaks_of_ours(monkeypatch):
    """Was: lines cut at the terminal's width, which a copy of the text then had."""

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())
    session.print_text([Piece("word " * 100, (PROMPT,))])
    assert sys.stdout.getvalue().count("\n") == 1


def test_an_error_cannot_steer_the_terminal(run):
    code, _, error = run("info", "\x1b[2J/nowhere")
    assert code == 2 and "\x1b" not in error and error.count("\n") == 1


def test_closed_streams_are_one_line(checkpoint):
    """Was: a traceback, or silence with exit code 0."""
    command = f"{sys.executable} -m dlm info {checkpoint} >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "standard output is closed" in done.stderr and done.stderr.count("\n") == 1


def test_a_script_with_closed_output_is_one_line(monkeypatch, capsys):
    """Fault: `python -m eval.perplexity ... >&-` measured, and said nothing, with exit code 0."""
    monkeypatch.setattr("sys.stdout", None)
    assert scripts.guarded("dlm eval perplexity", lambda words: 0, []) == 2
    assert "standard output is closed" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_device_is_one_line(monkeypatch, capsys):
    full = io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))
    monkeypatch.setattr("sys.stdout", full)
    assert main.main(["--help"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device, for standard output or a file: make room" in error and error.count("\n") == 1
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize("line", [b"caf\xe9\n", b"\xff\n"])
def test_a_line_of_chat_that_is_not_utf8_is_one_line(line):
    stdin = io.TextIOWrapper(io.BytesIO(line), encoding="utf-8")
    with mock.patch("sys.stdin", stdin), pytest.raises(ValueError, match="standard input has a line that is not UTF-8"):
        chat.read_line(typed=False)

"""What README.md tells a reader to type works."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from dlm import cli
from dlm.models import SHIPPED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- test: run -->\n)?```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for run, kind, text in BLOCKS if run and kind == "sh" for line in text.splitlines() if line.strip()]
PROGRAMS = [text for run, kind, text in BLOCKS if run and kind == "python"]

needs_model = pytest.mark.skipif(not SHIPPED.is_dir(), reason="there is no shipped model in this tree")


@needs_model
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, capsys):
    program, *arguments = shlex.split(command, comments=True)
    assert program == "dlm"
    assert cli.main(arguments) == 0
    out, error = capsys.readouterr()
    assert out.strip() and not error


@needs_model
@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs(program, capsys):
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 5 and len(PROGRAMS) == 1


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", README))
    assert {"demo", "test"} <= named <= targets


def test_options_exist():
    from train.pretrain import Recipe as Pretrain
    from train.sft import Recipe as Sft

    settings = {field.name for recipe in (Pretrain, Sft) for field in dataclasses.fields(recipe)}
    known = {cli.flag(field) for field in {*cli.SAMPLING, *settings}} | {"--prompts", "--json", "--help", "--config"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_files_exist():
    named = re.findall(r"`((?:dlm|train|tests|eval|benchmarks)/[\w/.]*)`", README)
    assert named and all((ROOT / name).exists() for name in named)

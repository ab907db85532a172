"""What README.md tells a reader to type works."""

import contextlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from dlm.checkpoints.files import SHIPPED
from dlm.cli import main, scripts
from dlm.cli.main import overview

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(<!-- test: run -->\n)?```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for run, kind, text in BLOCKS if run and kind == "sh" for line in text.splitlines() if line.strip()]
PROGRAMS = [text for run, kind, text in BLOCKS if run and kind == "python"]

needs_model = pytest.mark.skipif(not SHIPPED.is_dir(), reason="there is no shipped model in this tree")


@needs_model
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, capsys):
    program, *arguments = shlex.split(command, comments=True)
    assert program in ("dlm", ".venv/bin/dlm")
    assert main.main(arguments) == 0
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


def test_make_demo_shows_the_commands_of_the_page():
    shown = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    after = re.findall(r"^\.venv/bin/dlm .+$", README, re.MULTILINE)
    assert len(after) == 3 and all(f"'  {command}'" in shown for command in after)


def options_of(command, capsys):
    """What `dlm COMMAND --help` lists, and what it reads without listing."""
    with contextlib.suppress(SystemExit):
        main.main([*command, "--help"])
    listed = set(re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out))
    return LM_EVAL if command == ["eval", "harness"] else listed


LM_EVAL = {"--tasks", "--model_args"}  # options of lm_eval itself, which is an extra
TORCHRUN = {"--nproc-per-node", "--num_processes", "--multi_gpu"}  # of torchrun and of accelerate launch
PAGES = README + (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", PAGES, re.DOTALL)
SHOWN = sorted({line.split("#")[0].strip() for text in SHELL for line in text.splitlines()})
SHOWN = [line for line in SHOWN if re.match(r"dlm \w+ .*--\w", line)]


@pytest.mark.parametrize("line", SHOWN)
def test_options_of_a_command_exist(line, capsys):
    words = line.split()[1:]
    command = words[: 2 if words[0] in scripts.FOLDERS else 1]
    assert set(re.findall(r"--[a-z][a-z_-]+", line)) <= options_of(command, capsys)


def test_options_exist(capsys):
    commands = [[command, name] for command in scripts.FOLDERS for name in scripts.scripts(command)]
    commands += [[word] for word in ("generate", "infill", "chat", "info", "replay")] + [["train", "--estimate"]]
    known = set().union(*(options_of(command, capsys) for command in commands)) | {"--estimate"} | TORCHRUN
    assert set(re.findall(r"--[a-z][a-z_-]+", PAGES)) <= known


def test_files_exist():
    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    for page in pages:
        named = re.findall(r"`((?:dlm|train|tests|eval|benchmarks|docs)/[\w/.-]*)`", page)
        named += re.findall(r"\]\(((?!http)[\w/.-]+)\)", page)
        assert not [name for name in named if not (ROOT / name).exists()]


def test_extras_are_those_of_the_package():
    """Fault: two extras, one of them for JSON and patterns, were not named."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    line = README[README.index("Extras, as in") : README.index('dlm generate "One sunny day"')]
    assert set(re.findall(r"`(\w+)`", line)) == set(extras)


def test_the_table_of_speed_stands_in_the_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:none|dual) \d+ x \d+ \|[^\n]*) \|$", README, re.MULTILINE)
    assert len(rows) == 3 and all(f"| {row} |" in results for row in rows)


def test_the_help_shows_the_examples_of_the_readme():
    lines = [line.strip() for line in overview().splitlines() if line.strip().startswith("dlm infill")]
    assert lines and all(line in README for line in lines)


def test_it_is_short():
    assert README.count("\n") < 150

"""Files that commands write: what cannot be written, or would replace something else, is said before the work."""

import io
import json
import re
import sys

import pytest

from dlm.cli import batch, scripts
from dlm.cli.replay import waited_for_enter, without_echo
from dlm.utils import settings
from tests.helpers import commandline

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures


def refused(result, *said):
    code, out, error = result
    assert (code, out, error.count("\n")) == (2, "", 1) and all(word in error for word in said), error


def test_a_recording_replaces_no_other_file(run, tmp_path):
    """Fault: --record emptied the file it was given, the prompts of the same command too."""
    prompts, notes = tmp_path / "prompts.jsonl", tmp_path / "notes.txt"
    prompts.write_text('{"prompt": "The cat"}\n')
    notes.write_text("mine")
    refused(run("generate", "--prompts", prompts, "--record", prompts), "--record", "which this command reads")
    refused(run("generate", "The cat", "--record", notes), "notes.txt", "which dlm did not write")
    assert (prompts.read_text(), notes.read_text()) == ('{"prompt": "The cat"}\n', "mine")


def test_a_run_that_is_refused_keeps_the_recording_before(run, tmp_path):
    """Fault: the file was emptied before the settings were looked at."""
    path = tmp_path / "run.jsonl"
    assert run("generate", "The cat", "--gen-length", 2, "--record", path)[0] == 0
    before = path.read_text()
    assert len(before.splitlines()) == 3
    refused(run("generate", "The cat", "--grow", "confidence", "--record", path), "leave --record out")
    assert path.read_text() == before
    assert run("generate", "The cat", "--gen-length", 1, "--record", path)[0] == 0
    assert len(path.read_text().splitlines()) == 2  # a recording may be replaced


def test_replay_writes_over_no_recording(run, tmp_path):
    path = tmp_path / "run.jsonl"
    assert run("generate", "The cat", "--gen-length", 2, "--record", path)[0] == 0
    before = path.read_text()
    refused(run("replay", path, "--html", path), "--html", "which this command reads")
    other = tmp_path / "other.jsonl"
    other.write_text(before)
    refused(run("replay", path, "--svg", other), "--svg", "which dlm did not write")
    assert path.read_text() == other.read_text() == before
    page = tmp_path / "run.html"
    assert run("replay", path, "--html", page)[0] == run("replay", path, "--html", page)[0] == 0
    for words in (
        ["--columns", 40],
        ["--step", "--html", page],
        ["--step"],
        ["--speed", 3, "--html", page],
        ["--speed", "1e-300"],
    ):
        refused(run("replay", path, *words), words[0])


WRITES = {
    "bench": ["constraint --json", "estimate --json", "growth --json", "growth --plot", "peers --json", "serve --json",
              "speed --json", "training --json", "plot x.json --out", "compare x.json y.json --out"],
    "eval": ["choices x.jsonl --out", "compare --data x.txt --stories x.txt --out", "generative --out",
             "instructions --data x.jsonl --out", "perplexity --data x.txt --out", "revision --data x.txt --out",
             "rewards x.jsonl --out",
             "sudoku --out"],
    "train": ["curves x --out", "puzzles --output", "instructions --data x.txt --output"],
}  # fmt: skip


@pytest.mark.parametrize("line", [f"{command} {line}" for command, lines in WRITES.items() for line in lines])
def test_a_place_that_is_none_is_said_before_the_work(line, run, tmp_path):
    """Fault: `dlm eval sudoku --out missing/table.json` said so when the table was done."""
    refused(run(*line.split(), tmp_path / "missing" / "file"), "there is no folder")


def test_a_results_file_of_something_else_stays(run, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[1]")
    (tmp_path / "notes.txt").write_text("mine")
    refused(run("bench", "plot", data, "--out", data), "which this command reads")
    refused(run("bench", "estimate", "--json", tmp_path / "notes.txt"), "which dlm did not write")
    refused(run("eval", "perplexity", "--data", f"a.txt,{data}", "--out", data), "which this command reads")
    assert (data.read_text(), (tmp_path / "notes.txt").read_text()) == ("[1]", "mine")


def test_every_file_option_is_known(monkeypatch):
    """Each option that `writes` names exists, and its kind too."""
    from dlm.utils.files import BEGINS

    parser = settings.OptionParser("dlm x", "text")
    parser.add_argument("--out")
    parser.writes(out="json")
    assert parser.parse([]).out is None and set(parser.written.values()) <= set(BEGINS)


def test_stepping_ends_with_standard_input(monkeypatch):
    """Fault: `dlm replay --step` ended in a stack of EOFError at Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert waited_for_enter() and not waited_for_enter()
    monkeypatch.setattr(sys, "stdin", None)
    assert not waited_for_enter()


def test_defaults_in_force_are_those_of_the_family(run, tmp_path, tokenizer, capsys):
    """Fault: `dlm info` and --help showed the defaults of dlm for families whose authors' are others."""
    from dlm.cli import main
    from tests.helpers.families import BASE
    from tests.helpers.families import checkpoint as family_checkpoint

    fields = BASE | {"model_type": "Dream", "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    family_checkpoint(tmp_path / "dream", fields, tokenizer=tokenizer)
    assert json.loads(run("info", tmp_path / "dream", "--json")[1])["defaults"]["temperature"] == 0.2
    assert "confidence entropy" in run("info", tmp_path / "dream")[1]
    with pytest.raises(SystemExit):
        main.main(["generate", "--model", str(tmp_path / "dream"), "--help"])
    told = capsys.readouterr().out.split("--temperature")[1].split("--")[0]
    assert "(default: 0.2)" in " ".join(told.split())  # however wide the terminal is


def test_stepping_shows_no_typed_keys(monkeypatch):
    """Fault: each Enter moved the cursor, and a line of every frame stayed on the screen."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    with open(master, "rb"), open(slave) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        modes = [termios.tcgetattr(slave)[3] & termios.ECHO]
        with without_echo():
            modes.append(termios.tcgetattr(slave)[3] & termios.ECHO)
        modes.append(termios.tcgetattr(slave)[3] & termios.ECHO)
    assert modes == [termios.ECHO, 0, termios.ECHO]
    monkeypatch.setattr(sys, "stdin", None)
    with without_echo():
        pass


def test_the_live_view_of_a_chat_shows_the_answer_alone(run, monkeypatch):
    """Fault: `dlm generate --chat`, and so `make demo`, showed "a girl who paints.assistant" while it wrote."""
    seen, kept = [], batch.denoise
    monkeypatch.setattr(batch, "denoise", lambda *words, **more: seen.append(more) or kept(*words, **more))
    assert run("generate", "--chat", "The cat", "--gen-length", 2)[0] == run("generate", "x", "--gen-length", 2)[0] == 0
    assert [more["show_given"] for more in seen] == [False, True]


def test_names_of_scripts_stand_in_a_column(run):
    """Fault: the longest name had no space behind it, and its text stood elsewhere than the others'."""
    rows = [line for line in run("train")[1].splitlines() if re.match(r"  \w", line)]
    assert len({len(line) - len(line[2:].split(" ", 1)[1].lstrip()) for line in rows}) == 1


@pytest.mark.parametrize("command", scripts.FOLDERS)
def test_every_script_that_writes_a_file_says_which(command):
    for name, file in scripts.scripts(command).items():
        text = file.read_text(encoding="utf-8")
        if re.search(r"Path\(args\.(out|json|plot|output)\)", text) and name not in ("stories", "release"):  # folders
            assert ".writes(" in text or "check_output(" in text, file

"""`dlm replay --svg`: the film has one frame a pass, at the recorded pace, and is well-formed SVG."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from dlm.cli import film
from dlm.cli.main import main
from tests.helpers import commandline

tokenizer, checkpoint = commandline.tokenizer, commandline.checkpoint  # fixtures
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def recorded(checkpoint, tmp_path):
    path = tmp_path / "run.jsonl"
    words = ["The <cat> & fox", "--model", str(checkpoint), "--gen-length", "6", "--record", str(path)]
    assert main(["generate", *words]) == 0
    return path


def test_a_film_of_a_run(recorded, tmp_path, capsys):
    out = tmp_path / "live.svg"
    assert main(["replay", str(recorded), "--svg", str(out), "--columns", "40", "--speed", "3"]) == 0
    assert str(out) in capsys.readouterr().err
    root = ElementTree.parse(out).getroot()
    shown = "".join(root.itertext())
    assert "The <cat> & fox" in shown and "pass 1/6" in shown and "pass 6/6" in shown and "3 tok/s" in shown
    held = round(film.HOLD_SECONDS * 6 / 2)
    assert f"steps({6 + held})" in shown and "prefers-reduced-motion" in shown
    lines = {group.get("id") for group in root.iter(f"{SVG}g") if group.get("id")}
    assert lines == {use.get("href")[1:] for use in root.iter(f"{SVG}use")}


def test_the_film_takes_as_long_as_the_run(recorded, tmp_path):
    """A recording says when each pass was over; one without plays at ten passes a second."""
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    for number, line in enumerate(lines[1:], 1):
        line["seconds"] = 0.5 * number
    recorded.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "live.svg"
    assert main(["replay", str(recorded), "--svg", str(out)]) == 0
    assert "animation: film 6.00s" in out.read_text()  # three seconds of six passes, and three to look at the end
    for line in lines[1:]:
        del line["seconds"]
    recorded.write_text("\n".join(map(json.dumps, lines)))
    assert main(["replay", str(recorded), "--svg", str(out)]) == 0
    assert "animation: film 3.60s" in out.read_text()


def test_codes_of_a_line():
    line = "\x1b[1mOne\x1b[0m two\x1b[38;5;160;7m red\x1b[0m"
    assert film.spans(line) == [("One", ("1",)), (" two", ()), (" red", ("38;5;160", "7"))]


@pytest.mark.parametrize("option", [["--columns", "2"], ["--speed", "0"], ["--speed", "nan"]])
def test_wrong_numbers_are_one_line(option, recorded, capsys):
    capsys.readouterr()
    assert main(["replay", str(recorded), "--svg", "never.svg", *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1

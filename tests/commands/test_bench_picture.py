"""`dlm bench picture`: the film has one frame a pass, and is well-formed SVG."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import picture
from dlm.cli.main import main
from tests.helpers import commandline

tokenizer, checkpoint = commandline.tokenizer, commandline.checkpoint  # fixtures
SVG = "{http://www.w3.org/2000/svg}"


def test_a_film_of_a_run(checkpoint, tmp_path, capsys):
    out = tmp_path / "live.svg"
    words = ["The <cat> & fox", "--model", str(checkpoint), "--gen-length", "6", "--out", str(out), "--columns", "40"]
    assert main(["bench", "picture", *words, "--seconds", "2"]) == 0
    assert "6 passes" in capsys.readouterr().out
    root = ElementTree.parse(out).getroot()
    shown = "".join(root.itertext())
    assert "The <cat> & fox" in shown and "pass 1/6" in shown and "pass 6/6" in shown
    held = round(picture.HOLD_SECONDS * 6 / 2)
    assert f"steps({6 + held})" in shown and "prefers-reduced-motion" in shown
    lines = {group.get("id") for group in root.iter(f"{SVG}g") if group.get("id")}
    assert lines == {use.get("href")[1:] for use in root.iter(f"{SVG}use")}


def test_codes_of_a_line():
    line = "\x1b[1mOne\x1b[0m two\x1b[38;5;160;7m red\x1b[0m"
    assert picture.spans(line) == [("One", ("1",)), (" two", ()), (" red", ("38;5;160", "7"))]


@pytest.mark.parametrize("option", [["--columns", "2"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_wrong_numbers_are_one_line(option, capsys):
    assert main(["bench", "picture", *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1

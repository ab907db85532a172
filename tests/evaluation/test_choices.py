"""Calibration by hand, the temperature that is put in, and files of questions."""

import json
import math
import random

import pytest

from dlm.evaluation.choices import Judged, calibration, fit_temperature, read_questions, spread
from tests.helpers import commandline

tokenizer, checkpoint = commandline.tokenizer, commandline.checkpoint  # fixtures


def test_calibration_by_hand():
    sure, even = (math.log(0.9), math.log(0.1)), (math.log(0.55), math.log(0.45))
    found = calibration([Judged(sure, 0), Judged(sure, 1), Judged(even, 0), Judged(even, 0)])
    assert found.accuracy == 0.75
    assert found.ece == pytest.approx((abs(0.9 - 0.5) + abs(0.55 - 1.0)) / 2)
    assert found.brier == pytest.approx((0.02 + 1.62 + 2 * 0.405) / 4)
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.55)) / 4)
    assert [row[2] for row in found.bins] == [2, 2]


def test_the_temperature_that_was_put_in_is_found():
    rng, judged = random.Random(0), []
    for _ in range(4000):
        logs = [rng.gauss(0, 1.5) for _ in range(3)]
        judged.append(Judged(tuple(3.0 * x for x in logs), rng.choices(range(3), [math.exp(x) for x in logs])[0]))
    assert fit_temperature(judged) == pytest.approx(3.0, rel=0.1)
    assert calibration(judged, 3.0).ece < 0.03 < calibration(judged).ece


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a question"),
        ('{"text": "a"}', "not a question"),
        ('{"text": "a", "answer": "b"}', "no blank"),
        ('{"text": "___{a|b}", "answer": "c"}', "none of the options"),
    ],
)
def test_bad_files_name_the_line(tmp_path, line, said):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"text": "___{a|b}", "answer": "a"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"questions\.jsonl:2: .*{said}"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        read_questions(path)


def test_spread_by_hand():
    """Two questions: the first is judged the same, the second flips and becomes wrong."""
    a = [Judged((math.log(0.9), math.log(0.1)), 0), Judged((math.log(0.52), math.log(0.48)), 0)]
    b = [Judged((math.log(0.9), math.log(0.1)), 0), Judged((math.log(0.49), math.log(0.51)), 0)]
    found = spread(a, b)
    assert (found.questions, found.accuracy, found.flipped) == (2, -0.5, 0.5)
    assert found.mean == pytest.approx(0.015) and found.largest == pytest.approx(0.03)
    assert found.near == 0.5  # the second pair of logs is closer than the change of their difference
    assert spread(a, a).near == 0.0 and "50.00% of 2 choices differ" in str(found)


def test_the_command_judges_in_another_type(checkpoint, tmp_path, capsys):
    from eval.choices import main

    rows = [("The cat sat on the ___{mat|moon}.", "mat"), ("Once upon a ___{time|spoon}.", "time")] * 2
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"text": text, "answer": answer}) + "\n" for text, answer in rows))
    out = tmp_path / "choices.json"
    words = [str(file), "--held-out", "0", "--model", str(checkpoint), "--dtype", "float32"]
    words += ["--device", "cpu", "--out", str(out)]
    assert main([*words, "--also-dtype", "bfloat16"]) == 0
    assert "in bfloat16: accuracy" in capsys.readouterr().out
    found = json.loads(out.read_text())["also_dtype"]
    assert found["dtype"] == "bfloat16" and 0 < found["largest"] < 0.2
    assert main([*words, "--also-dtype", "bf61"]) == 2
    assert "bf61" in capsys.readouterr().err

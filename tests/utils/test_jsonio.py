"""JSON that is broken in every way is one line; what is written holds no NaN."""

import ast
import json
import math
from pathlib import Path

import pytest

from dlm.utils.files import write_json
from dlm.utils.jsonio import finite, parse_json, read_json, to_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ', "not JSON .*column 7"),
        ('{"a": 1,\n "b": }\n', "not JSON .*line 2, column 7"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not JSON that can be read"),
        ("", "not JSON"),
    ],
)
def test_what_is_no_json_is_one_line(text, reason):
    with pytest.raises(ValueError, match=rf"^here: .*{reason}") as raised:
        parse_json(text, "here")
    assert "\n" not in str(raised.value)


def test_files_with_a_byte_order_mark_and_not_utf8(tmp_path):
    (tmp_path / "mark.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(tmp_path / "mark.json") == {"a": [1]}
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8 text \(byte 7\)"):
        read_json(tmp_path / "latin.json")


def test_numbers_that_json_lacks():
    value = {"a": [math.nan, 1.5, (math.inf,)], "b": -math.inf, "c": "NaN", "d": 3}
    assert finite(value) == {"a": [None, 1.5, [None]], "b": None, "c": "NaN", "d": 3}
    json.dumps(finite(value), allow_nan=False)


def test_files_that_are_written_hold_no_nan(tmp_path):
    """Fault: `dlm eval perplexity --out` wrote NaN for a sampling error that there is not."""
    write_json(tmp_path / "a.json", {"error": math.nan, "é": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"error": null, "é": 1}\n'
    assert to_json([math.inf]) == "[null]"


KEPT_INSIDE = {  # files whose json.dumps compares, hashes or names values; what they write goes through to_json
    "state.py", "resume.py", "journal.py", "sweep.py", "automaton.py", "compare.py", "generative.py", "jsonio.py",
}  # fmt: skip


def test_json_is_written_in_one_place():
    """The kind: every `json.dump` of the product is in `jsonio`, or never reaches a file or a stream."""
    root = Path(__file__).parents[2]
    for folder in ("dlm", "train", "eval", "benchmarks"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and file.name not in KEPT_INSIDE:
                    assert getattr(node.value, "id", "") != "json", f"{file}, line {node.lineno}: use to_json"

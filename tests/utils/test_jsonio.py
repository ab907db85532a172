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


def writes_json(call: ast.AST) -> bool:
    """`json.dump(...)`, or `json.dumps(...)` inside of a `write`, `write_text` or `print`, where NaN is allowed."""
    if not isinstance(call, ast.Call):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    inside = ast.walk(call) if name in ("write", "write_text", "print", "dump") else ()
    return any(
        isinstance(part, ast.Call)
        and ast.unparse(part.func) in ("json.dump", "json.dumps")
        and not any(word.arg == "allow_nan" for word in part.keywords)
        for part in inside
    )


def test_no_json_that_is_written_may_hold_nan():
    """The kind: what reaches a file or a stream goes through `to_json`."""
    assert writes_json(ast.parse("f.write(json.dumps(x) + end)").body[0].value)
    root = Path(__file__).parents[2]
    for folder in ("dlm", "train", "eval", "benchmarks"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                assert not writes_json(node), f"{file}, line {node.lineno}: use dlm.utils.jsonio.to_json"

"""The command that measures what a constraint costs."""

import json

from benchmarks.constraint import Vocabulary, main
from dlm.checkpoints.files import SHIPPED
from dlm.tokenizer import load_tokenizer, token_bytes


def test_the_command_says_what_a_pass_costs(tmp_path, capsys):
    out = tmp_path / "constraint.json"
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}))
    words = ["--vocabulary", "6000", "--gen-length", "24", "--block-length", "8", "--tokens", "2"]
    assert main([*words, "--schema", str(schema), "--json", str(out)]) == 0
    said, facts = capsys.readouterr().out, json.loads(out.read_text())
    assert "2 tokens a pass, request 1: " in said and "by the cost model" in said
    assert [row["passes"] for row in facts["rows"]] == [12, 12] and all(row["ms"] > 0 for row in facts["rows"])
    assert facts["again_seconds"] < facts["compile"]["seconds"]


def test_the_vocabulary_has_its_size_and_no_word_twice():
    words = Vocabulary(load_tokenizer(SHIPPED), 6000)
    written = [word for word in token_bytes(words) if word]
    assert len(words) == 6000 and len(set(written)) == len(written) == 5998

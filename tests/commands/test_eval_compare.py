"""`dlm eval generative` and `dlm eval compare` from end to end on tiny checkpoints, and the questions that they ask."""

import json
from argparse import Namespace

import pytest

from dlm.evaluation.generations import open_writer
from dlm.objectives.likelihood import Bound
from eval import compare, generative
from tests.helpers.commandline import STORY, checkpoint, make_checkpoint, tokenizer  # noqa: F401

LINES = (
    "The fox number {0} lived by the sea. She walked along the beach {0} times. "
    "The cat {0} sat on the mat. It slept {0} hours there."
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory, tokenizer):  # noqa: F811
    folder = make_checkpoint(tmp_path_factory.mktemp("twin") / "tiny-twin", tokenizer, objective="autoregressive")
    return folder


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    texts = [" ".join(LINES.format(number) for _ in range(2)) for number in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_generative_goes_on_from_what_is_done(checkpoint, twin, stories, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "g.json"
    words = ["--judge", str(twin), "--model", str(checkpoint), str(twin), "--num-samples", "3", "--gen-length", "8",
             "--reference", str(stories), "--out", str(out), "--temperatures"]  # fmt: skip
    assert generative.main([*words, "0.5,1.0"]) == 0
    made = json.loads(out.read_text())
    assert set(made["results"]) == {
        "tiny-fox at 0.5",
        "tiny-fox at 1",
        "tiny-twin at 0.5",
        "tiny-twin at 1",
        "reference",
    }
    assert set(made["matched"]) == {"entropy", "tiny-fox", "tiny-twin"} and made["settings"]["judge"]["kind"] == "llada"
    assert all(len(text["texts"]) == 3 for text in made["texts"].values())
    wrote = []
    monkeypatch.setattr(generative, "write_texts", lambda writer, config, args: wrote.append(config) or ["a", "b", "c"])
    assert generative.main([*words, "0.5,0.8"]) == 0
    assert [config.temperature for config in wrote] == [0.8, 0.8], "only what is new is written"
    capsys.readouterr()
    assert generative.main([*words, "0.5", "--seed", "1"]) == 2
    assert "was made with seed 0, not 1" in capsys.readouterr().err
    assert generative.main(["--judge", str(twin), "--temperatures", "warm"]) == 2
    assert "give numbers with commas" in capsys.readouterr().err


def test_every_part_of_the_comparison(checkpoint, twin, stories, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "c.json"
    words = ["--model", str(checkpoint), "--twin", str(twin), "--data", str(stories), "--stories", str(stories),
             "--length", "32", "--samples", "3", "--gen-length", "8", "--questions", "4", "--repeats", "1",
             "--temperatures", "0.5,1.0", "--out", str(out)]  # fmt: skip
    assert compare.main(words) == 0
    first = capsys.readouterr().out
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == set(compare.PARTS)
    rows = parts["likelihood"]["results"]
    assert [row["exact"] for row in rows] == [False, True]
    assert [row["nats_per_token"]["error"] > 0 for row in rows] == [True, False]
    assert parts["infilling"]["results"]["passages"] == 4 and parts["reversal"]["results"]["questions"] == 4
    assert "| tiny-twin, the line before, by Bayes |" in first and "tiny-fox, both sides" in first
    monkeypatch.setattr(compare, "PARTS", dict.fromkeys(compare.PARTS, None))  # nothing is run again
    assert compare.main(words) == 0 and capsys.readouterr().out == first
    assert compare.main([*words, "--seed", "1"]) == 2
    assert "other settings or weights" in capsys.readouterr().err
    swapped = ["--model", str(twin), *words[2:], "--twin", str(checkpoint), "--out", str(tmp_path / "new.json")]
    assert compare.main(swapped) == 2 and "tiny-twin is autoregressive" in capsys.readouterr().err


def test_what_is_asked_about_lines(checkpoint, twin, stories, tokenizer, monkeypatch):  # noqa: F811
    """The model scores a line where it stands; the twin as what follows; by Bayes the given line after each choice."""
    args = Namespace(stories=stories, seed=0, questions=5, batch_size=4)
    questions = compare.line_pairs(args, tokenizer)
    assert len(questions) == 5 and all(len(befores) == len(afters) == 4 for befores, afters in questions)
    texts = tokenizer.batch_decode([questions[0][0][0], questions[0][1][0]])
    assert texts[0].startswith(" The fox number") and texts[1].startswith(" She walked")
    seen = []

    def spy(args, writer, examples):
        seen.append(examples)
        nats = (1.0, 5.0, 5.0, 5.0) if len(seen) == 1 else (4.0, 6.0, 7.0, 7.0)  # the line adds 3, 1, 2, 2
        return [Bound(nats[i % 4], 0.0, 1, 2) for i in range(len(examples))]

    monkeypatch.setattr(compare, "model_bounds", spy)
    monkeypatch.setattr(compare, "twin_values", spy)
    before, after = questions[0]
    bos = [tokenizer.bos_token_id]
    for folder, way, whole, scored in (
        (checkpoint, "before", bos + before[0] + after[0], before[0]),
        (twin, "before", bos + after[0] + before[0], before[0]),
        (twin, "bayes", bos + before[0] + after[0], after[0]),
        (checkpoint, "after", bos + before[0] + after[0], after[0]),
    ):
        seen.clear()
        found = compare.asked(args, open_writer(folder), questions, way)
        told = seen[0][0]
        assert told.tokens.tolist() == whole and told.tokens[told.target].tolist() == scored
        alone = seen[1][0].tokens
        assert alone[seen[1][0].target].tolist() == scored and alone.tolist() == bos + scored
        assert found["accuracy"]["value"] == 1.0 and found["gain"]["value"] == 1.5

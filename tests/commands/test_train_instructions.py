"""Instructions made from stories, worked by hand, and the shares of them that an answer meets."""

import json

import pytest

from eval import instructions as evaluation
from tests.helpers import commandline
from train import instructions as maker

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

TALE = """The Lantern

One evening a girl named Mira found a lantern by the river. She took Mira's coat and called for Tom. "Look," said
Mira, and Tom laughed at the lantern with Mira.

They walked until dark, and Tom told a long tale about an otter and the moon that nobody believed at all, not even Tom.

At last the lantern went out. Mira and Tom slept soundly."""


def test_shorten_keeps_the_beginning_and_the_end():
    short = maker.shorten(TALE, maker.Limits(beginning=40, end=12))
    assert short == (
        "One evening a girl named Mira found a lantern by the river. She took Mira's coat and called for Tom. "
        '"Look," said Mira, and Tom laughed at the lantern with Mira.\n\nAt last the lantern went out. '
        "Mira and Tom slept soundly."
    )
    assert maker.shorten(TALE, maker.Limits(beginning=40, end=5)).endswith("\n\nMira and Tom slept soundly.")
    assert maker.shorten("Too short. No end.", maker.Limits()) is None
    assert maker.shorten(TALE, maker.Limits(beginning=10)) is None  # fewer than three sentences to begin with


def test_names_are_capitalised_inside_sentences_and_occur_twice():
    assert maker.names_of(TALE) == ["Tom", "Mira"]
    assert maker.names_of("the Fox saw a fox and the Fox ran") == []  # a word that is also written small


def test_rarer_words():
    stories = ["the otter"] * 3 + ["the lantern"] * 40 + ["the"] * 60
    assert maker.rarer_words(stories, maker.Limits(common=0.05)) == {"otter"}


def test_an_instruction_asks_for_what_its_answer_has(tmp_path, run):
    data = tmp_path / "tales.txt"
    long = TALE.replace("\n\nAt last", "\n\n" + "They walked on over the wide hills. " * 20 + "\n\nAt last")
    data.write_text("\n<|endoftext|>\n".join([long.replace("otter", word) for word in ("otter", "heron", "hare")] * 4))
    outputs = []
    for name in ("a", "b"):
        code, out, error = run("train", "instructions", "--data", data, "--output", tmp_path / name)
        assert code == 0 and "wrote 12 instructions from 12 stories" in out, error
        outputs.append((tmp_path / name).read_text())
    assert outputs[0] == outputs[1]  # a function of the stories and the seed
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert len({row["prompt"] for row in rows}) > 3 and any(row["ending"] for row in rows)
    for row in rows:
        assert all(asked in row["prompt"] and asked in row["response"] for asked in row["names"] + row["words"])
        assert row["response"].endswith(row["ending"]) and row["ending"] in row["prompt"]
        assert {share for share in evaluation.met(row["response"], row).values() if share is not None} == {1.0}


def test_shares_by_hand():
    row = {"names": ["Mira", "Tom"], "words": ["otter", "moon", "hare"], "ending": "They slept soundly."}
    shares = evaluation.met("Mira saw the moon. She saw an otter, and then they all slept.", row)
    assert shares == {"names": 1 / 2, "words": 2 / 3, "ending": 2 / 3}
    assert evaluation.met("", row) == {"names": 0, "words": 0, "ending": 0}
    assert evaluation.met("x", row | {"words": [], "ending": ""}) == {"names": 0, "words": None, "ending": None}
    assert evaluation.common(["a", "b", "c", "d"], ["b", "x", "d", "a"]) == 2


def test_score_compares_with_the_demands_of_another_row():
    rows = [
        {"names": ["Mira"], "words": [], "ending": ""},
        {"names": ["Tom"], "words": ["moon"], "ending": "The end."},
    ]
    found = evaluation.score(["Mira and the moon", "Tom. The end."], rows)
    assert found["names"]["mean"] == 1 and found["names"]["by_chance"] == 0 and found["names"]["count"] == 2
    assert found["words"]["mean"] == 0 and found["words"]["by_chance"] == 1 and found["words"]["count"] == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "x", "names": []}], "no words, ending"),
        ([], "empty"),
        ([{"prompt": ""}], "no names, words, ending"),
    ],
)
def test_bad_data(run, tmp_path, rows, says):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, error = run("eval", "instructions", "--model", "x", "--data", file)
    assert code == 2 and says in error and error.count("\n") == 1


def test_stories_without_names_are_refused(run, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat. it sat there. then it slept. and it dreamt.")
    code, _, error = run("train", "instructions", "--data", tmp_path / "a.txt", "--output", tmp_path / "o")
    assert code == 2 and "none of 1 stories" in error and not (tmp_path / "o").exists()


def test_it_answers_and_reports(run, checkpoint, tmp_path):
    rows = [{"prompt": f"Write about {n}.", "names": [n], "words": [], "ending": "The end."} for n in ("Mira", "Tom")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, error = run(
        "eval", "instructions", "--model", checkpoint, "--data", tmp_path / "rows.jsonl", "--gen-length", "8",
        "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0, error
    assert "> Write about Mira." in out and "of what 2 prompts ask for" in out
    assert len(json.loads((tmp_path / "out.json").read_text())["answers"]) == 2

"""Stories: what is cut out of them, which are kept, and requests that the short ones answer."""

import json
import lzma

import numpy as np
import pytest

from train import stories
from train.stories import Limits, clean, names, rarity, request, shorten, topic, usable

LIMITS = Limits(least=10, beginning=(5, 12), end=(3, 8))
STORY = """A fox named Ruby lived near a pond.

Ruby saw a duck in the pond.

The duck was sad.

They played all day.

Ruby went home happy."""


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The Lost Fox\n\nOnce there was a fox.", "Once there was a fox."),  # a title
        ("Part of him was sad.", "Part of him was sad."),
        ("CHAPTER 5: The End\nThe fox slept.", "The fox slept."),
        ("[Sound effects: rain]\nIt rained. (soft music) The fox slept.", "It rained.  The fox slept."),
        ("**Narrator:** The fox slept.", "The fox slept."),
        ("Ruby (whispering): Who is there?", "Who is there?"),
        ("# **The fox** slept.", "The fox slept."),
        ("“It’s late…”", '"It\'s late..."'),
        ('"The fox slept.', "The fox slept."),  # a quotation mark that is never closed
        ("One.\n\n\n\nTwo.", "One.\n\nTwo."),
    ],
)
def test_clean_by_hand(text, want):
    assert clean(text) == want.replace("  ", " ")


def test_what_is_kept_by_hand():
    assert usable("The fox slept well.", LIMITS)
    for text in ("Short.", "The fox slept and", "See http://a.b now.", "| a | b | c | d |.", "1234567890 12345."):
        assert not usable(text, LIMITS), text
    assert rarity("the fox saw Ruby", {"the", "fox"}) == pytest.approx(1 / 3)  # names do not count


def test_a_short_story_is_its_beginning_and_its_end():
    short = shorten(STORY, LIMITS, np.random.default_rng(0))
    assert short == "A fox named Ruby lived near a pond.\n\nThey played all day.\n\nRuby went home happy." or (
        short == "A fox named Ruby lived near a pond.\n\nRuby went home happy."
    )
    assert names(STORY) == {"Ruby"}
    assert shorten(STORY.replace("Ruby went", "Max went"), LIMITS, np.random.default_rng(0)) is None  # nobody knows Max
    assert shorten("One line alone.", LIMITS, np.random.default_rng(0)) is None


def test_requests_name_what_the_story_is_about():
    seen = {topic(STORY, {"duck", "pond"}, np.random.default_rng(seed)) for seed in range(40)}
    assert seen == {"a fox named Ruby", "Ruby", "a duck", "a pond"}
    row = request(STORY, {"duck", "pond"}, LIMITS, np.random.default_rng(1))
    assert row["response"].startswith("A fox") and row["prompt"].startswith(
        ("Tell", "Write", "Can", "Please", "I want")
    )


def test_the_script_writes_three_files_and_the_same_again(tmp_path, capsys):
    data = tmp_path / "stories.jsonl"
    rows = [STORY * 1, STORY.replace("Ruby", "Max"), "See http://a.b", "The quixotic zephyr vexed Ruby. " * 12]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    simple = tmp_path / "simple.txt"
    simple.write_text(STORY)
    words = ["--data", str(data), "--simple-words", str(simple), "--output"]
    assert stories.main([*words, str(tmp_path / "a")]) == 0 and stories.main([*words, str(tmp_path / "b")]) == 0
    for name in ("simple.txt.xz", "rest.txt.xz", "chat.jsonl.xz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"zephyr" in lzma.decompress((tmp_path / "a" / "rest.txt.xz").read_bytes())
    assert "4 texts: 0 simple, 1 other, 3 left out" in capsys.readouterr().out  # two stories are below 300 characters
    assert stories.main(["--data", str(simple), "--output", str(tmp_path / "c")]) == 2
    assert not (tmp_path / "c").exists()

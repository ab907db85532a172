"""Words that came before are looked up: the tokens are the tokenizer's own, whatever the text."""

import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm.data import words as module
from dlm.data import workers
from dlm.data.words import Words, cuts_as_gpt2
from dlm.tokenizer import encode_documents, train_tokenizer

TEXT = "It's a well-known fact (she said), \"is it?\" In 1999, 'twas  so;\n\n the end...\tÉtés naïve 12,345.6 ½ e\u0301"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, "the cat sat on the mat, the hat and the bat. " * 3], 330)


def whole(tokenizer, texts):
    return [np.array([7, *ids, 8]) for ids in encode_documents(tokenizer, texts)]


def trusted(tokenizer):
    words = Words(tokenizer, np.uint16, [7], [8])
    assert words.left is not None
    words.left = 0  # as after the texts that are compared
    return words


def test_what_a_text_is_cut_into():
    cut = module.PIECE.findall("It's a well-known (fact),  1999.\n\nEnd")
    assert cut == ["It's", " a", " well", "-", "known", " (", "fact", "),", "  1999.", "\n\nEnd"]


def test_tokens_are_the_tokenizers_own(tokenizer):
    """Random strings of what could go wrong: runs of white space of every kind, digits, apostrophes, other scripts."""
    rng, parts = (
        random.Random(0),
        [*"aZé5 ½.,;:!?\")(-_'\n\t\r\u00a0\u3000\u2028\u0085", "  ", "'s", "'ll", "the", "mat", "日本", "\u0301", "😀"],
    )
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 40))) for _ in range(3000)] + [TEXT, "", " ", "\n "]
    words = trusted(tokenizer)
    for start in range(0, len(texts), 500):
        some = texts[start : start + 500]
        made = words.encode(some)
        assert all(array.dtype == np.uint16 for array in made)
        for text, got, want in zip(some, made, whole(tokenizer, some), strict=True):
            assert got.tolist() == want.tolist(), repr(text)
    assert words.left == 0 and len(words.known) > 1000


def test_special_tokens_in_a_text_are_text(tokenizer):
    text = "a <|endoftext|> and <|mdm_mask|>."
    assert trusted(tokenizer).encode([text])[0].tolist() == whole(tokenizer, [text])[0].tolist()


def test_a_piece_is_asked_about_once_and_odd_white_space_goes_the_long_way(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "encode_documents", lambda t, texts: asked.append(list(texts)) or encode_documents(t, texts)
    )
    words = trusted(tokenizer)
    words.encode(["the cat", "the mat"])
    words.encode(["the cat sat"])
    assert sorted(asked[0]) == [" cat", " mat", "the"] and asked[1] == [" sat"]
    odd = "the\x1ccat !\x1cmat"
    assert words.encode([odd])[0].tolist() == whole(tokenizer, [odd])[0].tolist()
    assert asked[2] == [odd]


def test_pieces_that_are_wrong_are_noticed(tokenizer, monkeypatch):
    """The first texts are compared with the tokenizer's own answer: where they differ, no pieces are used."""
    monkeypatch.setattr(module, "PIECE", module.re.compile(r"."))
    words = Words(tokenizer, np.uint16, [7], [8])
    for _ in range(2):
        assert words.encode(["the cat"])[0].tolist() == whole(tokenizer, ["the cat"])[0].tolist()
    assert words.left is None


def test_a_full_memory_is_emptied(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    words = trusted(tokenizer)
    for text in ("the cat sat", "on the mat", "the cat sat"):
        assert words.encode([text])[0].tolist() == whole(tokenizer, [text])[0].tolist()


def made(**changes):
    core = Tokenizer(models.BPE({"a": 0}, [], **changes.pop("model", {})))
    core.pre_tokenizer = changes.pop("pre", pre_tokenizers.ByteLevel(add_prefix_space=False))
    if "normalizer" in changes:
        core.normalizer = changes["normalizer"]
    return PreTrainedTokenizerFast(tokenizer_object=core, **changes.get("fields", {}))


def test_which_tokenizers_are_cut(tokenizer):
    assert cuts_as_gpt2(tokenizer) and cuts_as_gpt2(made())
    assert not cuts_as_gpt2(made(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not cuts_as_gpt2(made(pre=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))
    assert not cuts_as_gpt2(made(pre=pre_tokenizers.Split(Regex(r"\w+"), "isolated")))
    assert not cuts_as_gpt2(made(normalizer=normalizers.NFC()))
    assert not cuts_as_gpt2(made(model={"dropout": 0.1}))
    plain = made()
    plain.add_tokens(["a b"])
    assert not cuts_as_gpt2(plain)


def test_other_processes_help_with_much_text(tokenizer, monkeypatch):
    """Two workers, then one that goes in the middle: the tokens stay the tokenizer's own, text by text."""
    monkeypatch.setattr(module, "MANY", 100)
    monkeypatch.setattr(module, "worker_count", lambda: 2)
    rng = random.Random(1)
    batches = [[" ".join(rng.choices(["the", "cat,", "sat", "日本", "é", ""], k=rng.randint(0, 60))) for _ in range(n)]
               for n in (9, 1, 40, 0, 7, 5)]  # fmt: skip
    words = trusted(tokenizer)
    for number, batch in enumerate(batches):
        if number == 4:
            words.workers.processes[0].kill()
            words.workers.processes[0].wait()
        made = words.encode(batch)
        assert [array.tolist() for array in made] == [array.tolist() for array in whole(tokenizer, batch)]
        assert all(array.dtype == np.uint16 for array in made)
        assert words.workers.alive == (number < 4)
    assert all(process.returncode is not None for process in words.workers.processes)


def test_a_worker_needs_neither_torch_nor_transformers():
    code = "import sys, dlm.data.workers, dlm.data.words; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_shares_are_runs_of_about_as_many_characters():
    texts = ["a" * n for n in (5, 1, 1, 1, 4, 4)]
    assert workers._shares(texts, 2) == [texts[:3], texts[3:]] and workers._shares([], 3) == [[], [], []]
    assert [text for share in workers._shares(texts, 4) for text in share] == texts


def test_the_cores_of_a_machine_are_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers.worker_count() == 3
    for processes, count in (("4", 1), ("8", 0), ("16", -1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert workers.worker_count() == count

"""Data: reading, errors that name file and line, cutting, packing, order, the token cache."""

import json
import lzma

import numpy as np
import pytest

from dlm.data.documents import load_documents
from dlm.data.examples import Example, Examples, Stream, fetch, pack, pack_rows
from dlm.data.sources import normalise, read_documents
from dlm.tokenizer import train_tokenizer

TEXT = "A cat sat.\n<|endoftext|>\nThe dog\u00a0ran \n\n\n\nfar.\r\n<|endoftext|>\n\n<|endoftext|>\nEnd."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog ran far"] * 20, 280)


def test_documents_of_text_and_xz(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as file:
        file.write(TEXT)
    expected = ["A cat sat.", "The dog ran\n\nfar.", "End."]
    assert list(read_documents(tmp_path / "a.txt")) == expected
    assert list(read_documents(tmp_path / "a.txt.xz")) == expected
    assert normalise(" a \r\n\r\n\r\nb ") == "a\n\nb"


def test_documents_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in ("one", "", "two")) + "\n")
    assert list(read_documents(path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("a.csv", b"x", "unknown kind of file"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b"\n<|endoftext|>\n \n", "holds no text"),
        ("latin.txt", b"caf\xe9 society", "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2: not JSON"),
        ("list.jsonl", b"[1]\n", "line 1: a JSON list"),
        ("cols.jsonl", b'{"title": "a", "body": "b"}\n', "no text in column 'text'; the columns are body, title"),
        ("cut.txt.xz", lzma.compress(b"some text" * 99)[:-9], "not a complete .xz file"),
        ("not.txt.xz", b"plain text", "not a complete .xz file"),
    ],
)
def test_errors_name_file_and_reason(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(path))
    assert name in str(error.value)


def test_cache_is_used_and_follows_the_file(tmp_path, tokenizer):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text(TEXT)
    first = load_documents(path, tokenizer, cache=cache)
    assert len(first) == 3 and first.tokens.dtype == np.uint16
    assert first.tokens[0] == tokenizer.bos_token_id and first.tokens[-1] == tokenizer.eos_token_id
    [folder] = cache.iterdir()
    before = (folder / "tokens.npy").stat().st_mtime_ns
    again = load_documents(path, tokenizer, cache=cache)
    assert (folder / "tokens.npy").stat().st_mtime_ns == before and (again.tokens == first.tokens).all()
    path.write_text(TEXT + " More.")
    assert len(load_documents(path, tokenizer, cache=cache).tokens) > len(first.tokens)


def test_a_long_document_becomes_consecutive_examples(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    documents = load_documents(path, tokenizer, cache=tmp_path / "cache")
    cut = Examples([documents, documents], 4)
    joined = np.concatenate([cut[i].tokens for i in range(len(cut))])
    assert (joined == np.concatenate([documents.tokens, documents.tokens])).all()
    assert cut.lengths.max() == 4 and set(cut.owners) == set(range(6))
    assert not cut[0].target[0] and cut[0].target[1:].all() and cut[1].target.all()  # bos is given, not predicted
    assert [cut[i].index for i in (0, 3)] == [0, 3]


def test_pack_rows_places_each_once_and_fills():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 65, 500)
    rows = pack_rows(lengths, random.permutation(500), 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    fill = [lengths[row].sum() for row in rows]
    assert max(fill) <= 64 and sum(fill) / (64 * len(rows)) > 0.9
    assert pack_rows([3, 5, 1, 4], range(4), 5) == [[0, 2], [1], [3]]


def test_pack_by_hand():
    one, two = Example(np.array([7, 8]), np.array([False, True]), 4), Example(np.array([9]), np.array([True]), 6)
    batch = pack([[(0, one), (1, two)], []], 4, pad_id=0)
    assert batch.tokens.tolist() == [[7, 8, 9, 0], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, -1], [-1] * 4]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0] * 4]
    assert batch.target.tolist() == [[False, True, True, False], [False] * 4]
    assert batch.index.tolist() == [4, 6] and batch.epoch.tolist() == [0, 1]
    with pytest.raises(ValueError, match="example 4 ends at token 2 of a row of 1"):
        pack([[(0, one)]], 1, 0)


def test_stream_goes_on_from_its_position_and_reshuffles(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(f"the cat {i} sat on the mat " * (1 + i % 3) for i in range(40)))
    examples = Examples([load_documents(path, tokenizer, cache=tmp_path / "cache")], 16)
    whole = Stream(examples, seed=5)
    first = whole.take(7)
    middle = whole.position
    rest = whole.take(100)
    assert Stream(examples, seed=5, position=middle).take(100) == rest
    flat = [pair for row in first + rest for pair in row]
    epochs = {e: [i for epoch, i in flat if epoch == e] for e in (0, 1)}
    assert sorted(epochs[0]) == list(range(len(examples))) and epochs[0][:20] != epochs[1][:20]
    assert Stream(examples, seed=6).take(7) != first
    assert fetch(examples, first, 0).tokens.shape == (7, 16)

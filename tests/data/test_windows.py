"""Windows of a corpus: every token scored once, what stands before it, and the bytes."""

import numpy as np
import pytest

from dlm.data.windows import CorpusConfig, cut, load_corpus
from tests.helpers.commandline import tokenizer  # noqa: F401


def test_windows_by_hand():
    ids, target = np.arange(10, 17), np.array([False] + [True] * 6)
    plain = [(tokens.tolist(), scored.tolist()) for tokens, scored in cut(ids, target, 3)]
    assert plain == [
        ([10, 11, 12], [False, True, True]),
        ([13, 14, 15], [True, True, True]),
        ([16], [True]),
    ]
    over = [(tokens.tolist(), scored.tolist()) for tokens, scored in cut(ids, target, 5, 2, [9])]
    assert over == [
        ([9, 10, 11, 12, 13], [False, False, True, True, True]),
        ([9, 12, 13, 14, 15], [False, False, False, True, True]),
        ([9, 14, 15, 16], [False, False, False, True]),
    ]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("bos", ["auto", "none", "window"])
def test_every_token_is_scored_once(tmp_path, tokenizer, wrap, overlap, bos):  # noqa: F811
    texts = ["The cat sat on the mat.", "Ünïcode: « ça »", "Once upon a time there was a fox."]
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    config = CorpusConfig(9, wrap, overlap, bos)
    corpus = load_corpus(str(path), tokenizer, config)
    scored = [token for example in corpus.examples for token in example.tokens[example.target].tolist()]
    wanted = [ids for text in texts for ids in [*tokenizer(text, add_special_tokens=False)["input_ids"],
                                                tokenizer.eos_token_id]]  # fmt: skip
    assert scored == wanted and corpus.tokens == len(wanted)
    assert corpus.bytes == sum(len(text.encode()) for text in texts) and corpus.documents == 3
    assert all(len(example.tokens) <= 9 for example in corpus.examples)
    assert [example.index for example in corpus.examples] == list(range(len(corpus.examples)))
    assert len(set(corpus.owners.tolist())) == (len(corpus.examples) if wrap else 3)
    starts = [example.tokens[0] == tokenizer.bos_token_id for example in corpus.examples]
    assert all(starts) if bos == "window" else not any(starts) if bos == "none" else starts[0]
    assert corpus.bos == {"auto": "document"}.get(bos, bos)
    none = load_corpus(
        str(path),
        tokenizer,
        CorpusConfig(9, wrap, overlap, bos, eos="none", max_bytes=sum(len(text.encode()) for text in texts[:2])),
    )
    assert none.tokens == corpus.tokens - 3 - len(tokenizer(texts[2], add_special_tokens=False)["input_ids"])


def test_the_first_bytes_alone(tmp_path, tokenizer):  # noqa: F811
    path = tmp_path / "a.txt"
    path.write_text("abc\n<|endoftext|>\ndéf\n<|endoftext|>\nghi", encoding="utf-8")
    corpus = load_corpus(str(path), tokenizer, CorpusConfig(8, bos="none", eos="none", max_bytes=5))
    assert (corpus.bytes, corpus.documents) == (4, 2), "the second document is cut before the character of two bytes"
    assert tokenizer.batch_decode([example.tokens for example in corpus.examples]) == ["abc", "d"]


def test_columns_one_under_the_other(tmp_path, tokenizer):  # noqa: F811
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "1 + 1?", "a": "2"}\n{"q": "b?", "a": "c"}\n', encoding="utf-8")
    corpus = load_corpus(str(path), tokenizer, CorpusConfig(16, bos="none", eos="none", column="q,a"))
    assert tokenizer.batch_decode([example.tokens for example in corpus.examples]) == ["1 + 1?\n2", "b?\nc"]


def test_bad_settings(tmp_path, tokenizer):  # noqa: F811
    for fields, message in (
        ({"length": 1}, "at least 2"),
        ({"length": 8, "overlap": 7}, "below length - 1, 7"),
        ({"length": 8, "bos": "documnet"}, "did you mean 'document'"),
        ({"length": 8, "max_bytes": 0}, "give 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            CorpusConfig(**fields)
    path = tmp_path / "a.txt"
    path.write_text("a", encoding="utf-8")

    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(ValueError, match="--eos none"):
        load_corpus(str(path), Bare(), CorpusConfig(8, bos="none"))
    with pytest.raises(ValueError, match="--bos none"):
        load_corpus(str(path), Bare(), CorpusConfig(8, bos="window"))

"""Tokenizer: round trips, special tokens at the end, prompts and answers."""

import json

import pytest

from dlm.tokenizer import (
    MASK,
    SPECIAL_TOKENS,
    decode,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    mask_id,
    train_tokenizer,
)


class Config:
    mask_token_id = None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Once upon a time there was a little cat. " * 5] * 10, 300).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", ["Once upon a time", "naïve 🙂 €12,50\n\n\ttabs  spaces ", "", "ünïcödé 日本"])
def test_round_trip(tokenizer, text):
    ids = encode_prompt(tokenizer, text)
    assert ids[0] == tokenizer.bos_token_id and decode(tokenizer, ids) == text


def test_special_tokens_end_the_vocabulary(tokenizer):
    size = len(tokenizer)
    assert size <= 300 and tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(size - 6, size))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and mask_id(tokenizer, Config()) == size - 4


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer("2024", add_special_tokens=False)["input_ids"]) == 4


def test_prompt_with_the_mask_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="contains the mask token"):
        encode_prompt(tokenizer, f"a {MASK} b")


def test_training_text_cannot_smuggle_special_tokens_in(tokenizer):
    [ids] = encode_documents(tokenizer, [f"a {MASK} b"])
    assert tokenizer.mask_token_id not in ids and decode(tokenizer, ids) == f"a {MASK} b"
    assert tokenizer.mask_token_id in tokenizer(MASK)["input_ids"]  # the setting was put back


def test_decode_stops_at_the_first_end(tokenizer):
    ids = [*encode_prompt(tokenizer, "a cat"), tokenizer.eos_token_id, *encode_prompt(tokenizer, "more")]
    assert decode(tokenizer, ids) == "a cat"


def test_chat_template_is_lladas(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, text)[1:]  # the one in the text is not doubled


def test_errors(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="at least 262"):
        train_tokenizer(["x"], 200)
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)
    wrong = Config()
    wrong.mask_token_id = 5000
    with pytest.raises(ValueError, match="lacks the mask token"):
        mask_id(tokenizer, wrong)
    with pytest.raises(ValueError, match="no mask token"):
        mask_id(None, Config())
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE"


def test_a_word_without_end_does_not_stall_the_training():
    """BPE takes quadratic time over one word: 5 MB without a space never ended."""
    tokenizer = train_tokenizer(["a fox " * 20, "ab" * 2_500_000], 300)
    assert tokenizer.decode(tokenizer("a fox")["input_ids"], skip_special_tokens=True) == "a fox"

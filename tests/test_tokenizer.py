"""Tokenizer: round trips, special tokens at the end, prompts and answers."""

import json
from random import Random

import pytest

from dlm.checkpoints.files import SHIPPED
from dlm.tokenizer import (
    MASK,
    SPECIAL_TOKENS,
    decode,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    mask_id,
    open_codec,
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


def test_the_core_reads_and_writes_as_transformers_tokenizer():
    """On texts with special tokens, spaces before stops, several languages; ids that are no text, and special ids."""
    whole, codec = load_tokenizer(SHIPPED), open_codec(SHIPPED)
    random = Random(0)
    pieces = ["Once", " upon", " a time", " .", " n't", "\n\n", "日本", "🙂", "é", "  ", "123", *SPECIAL_TOKENS]
    for _ in range(200):
        text = "".join(random.choices(pieces, k=random.randrange(12)))
        for add in (True, False):
            ids = codec(text, add_special_tokens=add)["input_ids"]
            assert ids == whole(text, add_special_tokens=add)["input_ids"]
        ids += random.choices(range(len(whole)), k=4)
        for skip in (True, False):
            assert codec.decode(ids, skip_special_tokens=skip) == whole.decode(ids, skip_special_tokens=skip)
        assert codec.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
    names = [f"{name}{end}" for name in ("bos", "eos", "mask", "pad", "unk") for end in ("_token", "_token_id")]
    assert all(getattr(codec, name) == getattr(whole, name) for name in names)
    assert len(codec) == len(whole) and codec.get_vocab() == whole.get_vocab() and "whole" not in vars(codec)
    assert codec.all_special_ids == whole.all_special_ids  # by transformers' class, which is opened then
    assert codec(["a", "b"])["input_ids"] == whole(["a", "b"])["input_ids"]
    assert encode_prompt(codec, "Once upon") == encode_prompt(whole, "Once upon")


@pytest.mark.parametrize("changes", [
    {"clean_up_tokenization_spaces": True}, {"add_bos_token": False}, {"mask_token": "<|other|>"},
    {"tokenizer_class": "LlamaTokenizer"}, {"extra_special_tokens": ["<|new|>"]}, {"bos_token": {"content": "a"}},
])  # fmt: skip
def test_what_the_core_does_not_do_alone_is_left_to_transformers(tmp_path, tokenizer, changes):
    tokenizer.save_pretrained(tmp_path)
    assert open_codec(tmp_path) is not None
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert open_codec(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text("{}")
    assert open_codec(tmp_path) is None

"""Rows of the data sets people have: what is used, what is named as not used, templates of every kind, bad rows."""

import json
import os

import pytest

from dlm.data.columns import COLUMNS, Columns, messages_of
from dlm.data.conversations import ChatFormat, load_chats
from dlm.data.documents import load_documents
from dlm.tokenizer import load_tokenizer, train_tokenizer
from tests.test_chat_template import ANSWER, ASK, BODY, HEADER, LLADA

GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
END = "<|eot_id|><|endoftext|>"


@pytest.fixture
def tokenizer():
    return train_tokenizer(["Once upon a time there was a little fox who said hi."] * 4, 340)


@pytest.fixture
def chats(tmp_path, tokenizer):
    """chats(rows, template=None, **format) -> (prompt text, answer text, documents)."""

    def make(*rows, template=None, name="rows.jsonl", **changes):
        if template is not None:
            tokenizer.chat_template = template
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        form = ChatFormat(**{"chat": True, "length": 400} | changes)
        made = load_chats(tmp_path / name, tokenizer, form, cache=tmp_path / "cache")
        whole = tokenizer.decode(made.tokens.tolist())
        return whole, tokenizer.decode(made.tokens[made.target].tolist()), made

    return make


@pytest.mark.parametrize("template", [None, LLADA, BODY + HEADER, BODY], ids=["asked", "llada", "always", "never"])
def test_answers_carry_loss_and_headers_never(chats, template):
    """LLaDA-8B-Instruct's template as released: the header behind every answer carried loss, four messages failed."""
    _, answer, _ = chats({"messages": [ASK, ANSWER]}, template=template)
    assert answer == "yo" + END
    longer = [ASK, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]
    whole, answer, _ = chats({"messages": longer}, template=template, name="four.jsonl")
    assert answer == "yo<|eot_id|>so" + END
    assert whole.count("assistant<|end_header_id|>") == 2


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer(chats):
    """Reasoning models strip the reasoning of earlier turns: such rows stopped the run."""
    strips = (
        "{% for m in messages %}<{{m['role']}}>"
        "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [ASK, {"role": "assistant", "content": "a</think>b"}, ASK, {"role": "assistant", "content": "c</think>d"}]
    _, answer, made = chats({"messages": turns}, template=strips)
    assert answer == "c</think>d" + END and made.counts["last_answer_only"] == 1


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"system": "Be kind.", "conversations": GPT}, "Be kind."),
        ({"instruction": "Which?", "context": "A red fox.", "response": "Red"}, "Which?\n\nA red fox."),
        ({"question": "Which?", "context": "A fox.", "answers": {"text": ["Red", "red"]}}, "Which?\n\nA fox."),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n\n1, 2"),
        ({"instruction": "and?", "input": "", "output": "bye", "history": [["hello", "yo"]]}, "hello"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}, ANSWER]}, "in parts"),
    ],
    ids=["system", "dolly", "squad", "alpaca", "history", "parts"],
)
def test_columns_that_belong_to_the_question_are_in_the_prompt(chats, row, text):
    """They were dropped without a word."""
    whole, answer, made = chats(row)
    assert text in whole and text not in answer
    assert not [name for name in made.counts if name.startswith(COLUMNS)]


def test_what_is_not_used_is_named_and_counted(chats):
    row = {"prompt": "a", "response": "b", "category": "x", "tags": ["y"], "empty": "", "id": 7}
    _, _, made = chats(row, row)
    assert {name: n for name, n in made.counts.items() if name.startswith(COLUMNS)} == {
        f"{COLUMNS}category": 2, f"{COLUMNS}tags": 2,
    }  # fmt: skip


def test_weight_zero_and_empty_answers_carry_no_loss(chats):
    quiet = {"role": "assistant", "content": "no", "weight": 0}
    _, answer, _ = chats({"messages": [ASK, quiet, ASK, ANSWER]})
    assert answer == "yo" + END
    rows = [{"prompt": "a", "response": "b", "weight": 0}, {"prompt": "a", "response": " "}]
    _, answer, made = chats(*rows, {"prompt": "a", "response": "c"}, name="w.jsonl")
    assert answer == "c" + END and made.counts["without_answer"] == 2


BAD = [
    ('{"prompt": "a", ', "not JSON"),
    ("[" * 20_000, "nested too deeply"),
    ('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ('{"prompt": "a\\ud800", "response": "b"}', r"half of a character"),
    ("[1, 2]", "a JSON list, not an object"),
    ({"prompt": "a", "response": None}, "no text for the response"),
    ({"messages": [ANSWER]}, "begins with an answer"),
    ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "no content .it calls tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "part of the kind 'image_url'"),
    ({"prompt": "a", "response": "b", "weight": "much"}, "weight is 'much'"),
    ({"prompt": "a <|mdm_mask|>", "response": "b"}, "special token"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:20] for _, reason in BAD])
def test_a_bad_row_is_one_line_and_can_be_left_out(chats, row, reason):
    with pytest.raises(ValueError, match=f"line 1: .*{reason}.*--on-bad-row skip") as raised:
        chats(row, {"prompt": "a", "response": "b"})
    assert "\n" not in str(raised.value)
    _, answer, made = chats(row, {"prompt": "a", "response": "b"}, name="skip.jsonl", on_bad_row="skip")
    assert answer == "b" + END and made.counts["bad_rows"] == 1


def test_a_template_that_raises_names_the_row(chats):
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + BODY
    with pytest.raises(ValueError, match=r"line 1: .*roles: system, user.*no system role"):
        chats({"system": "s", "conversations": GPT}, template=picky)


def test_arrays_and_byte_order_marks(tmp_path, chats, tokenizer):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "", "output": "d"}]
    for name, content in {
        "alpaca.json": json.dumps(rows, indent=1),
        "marked.json": "\ufeff" + json.dumps(rows),
        "joined.jsonl": "\n".join("\ufeff" + json.dumps(row) for row in rows),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        made = load_chats(tmp_path / name, tokenizer, ChatFormat(chat=True, length=99), cache=tmp_path / "cache")
        assert len(made) == 2
    (tmp_path / "marked.txt").write_text("\ufeffA fox.", encoding="utf-8")
    text = load_documents(tmp_path / "marked.txt", tokenizer, cache=tmp_path / "cache")
    assert tokenizer.decode(text.tokens.tolist()) == "<|startoftext|>A fox.<|endoftext|>"


def test_a_line_beyond_all_measure_is_refused(tmp_path, chats, monkeypatch):
    monkeypatch.setattr("dlm.data.sources.LONGEST_LINE", 1000)
    with pytest.raises(ValueError, match=r"line 2: longer than 1,000 characters"):
        chats({"prompt": "a", "response": "b"}, {"prompt": "a" * 2000, "response": "b"})


def test_other_special_tokens_are_tokenized_anew(tmp_path, tokenizer):
    """The kept tokens ended in the old end-of-text after `eos_token` had changed in tokenizer_config.json."""
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "a.jsonl").write_text('{"text": "The fox."}\n')

    def last():
        now = load_tokenizer(tmp_path / "t")
        made = load_documents(tmp_path / "a.jsonl", now, cache=tmp_path / "cache")
        return int(made.tokens[-1]), now.eos_token_id

    assert last()[0] == last()[1]
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|eot_id|>"}))
    token, eos = last()
    assert token == eos == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_a_rewrite_of_the_same_size_and_time_is_read_anew(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fox"}\n')
    before = os.stat(file)
    first = load_documents(file, tokenizer, cache=tmp_path / "cache").tokens.tolist()
    file.write_text('{"text": "sea"}\n')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_documents(file, tokenizer, cache=tmp_path / "cache").tokens.tolist() != first


def test_system_texts_are_not_doubled():
    messages, unused = messages_of(
        {"system": "one", "messages": [{"role": "system", "content": "two"}, ASK, ANSWER]}, Columns(), "here"
    )
    assert [m["content"] for m in messages] == ["two", "hi", "yo"] and unused == ["system"]

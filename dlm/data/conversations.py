"""Rows of a conversation, or of a prompt and its response -> Documents that carry loss on the answers alone.

An answer is tokenized apart from what stands before it, so that at generation the same prompt has the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from dlm.data.choices import OVERLONG
from dlm.data.documents import Documents, cached, join, token_type
from dlm.data.sources import columns_of, identity, read_rows
from dlm.data.streaming import StreamedSource
from dlm.tokenizer import encode_prompt
from dlm.utils.names import check_name

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "input", "query")
RESPONSES = ("response", "answer", "completion", "output")
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "model": "assistant"}  # ShareGPT's words
COUNTS = ("rows", "truncated", "skipped", "without_answer")


@dataclass(frozen=True)
class ChatFormat:
    """How rows become tokens.

    chat: through the tokenizer's chat template; otherwise prompt and separator, as `dlm generate` encodes a prompt,
    then response and end-of-text. messages, prompt, response: columns, "" for those that are found. length: most
    tokens of an example; overlong: `truncate` a longer one or `skip` it.
    """

    chat: bool
    length: int
    messages: str = ""
    prompt: str = ""
    response: str = ""
    separator: str = "\n"
    overlong: str = "truncate"

    def __post_init__(self):
        check_name("overlong", self.overlong, OVERLONG)
        if self.messages and (self.prompt or self.response):
            raise ValueError(
                f"columns {self.messages!r} and {self.prompt or self.response!r} are both named: give a column of "
                f"messages, or a prompt and a response"
            )


def load_chats(path, tokenizer, form: ChatFormat, *, split: str = "train", cache=None) -> Documents:
    """Tokenize the conversations of a source once, and memory-map the result from then on.

    `counts` of the result has how many rows were read, truncated, skipped as too long, and left out because no answer
    was left. Errors: those of `read_rows`; missing columns, a mask token in the text, a source without an answer.
    """
    named = ("chat", identity(path, split), form, tokenizer.chat_template if form.chat else None)
    return cached(path, named, tokenizer, lambda: _tokenize(path, tokenizer, form, split), cache)


def _tokenize(path, tokenizer, form: ChatFormat, split: str) -> Documents:
    pieces, targets, size = [], [], 0
    counts = dict.fromkeys(COUNTS, 0)
    for where, row in read_rows(path, split):
        messages = conversation(row, form, where)
        made = _example(tokenizer, messages, form, where, counts)
        if made is None:
            continue
        ids, target = made
        size += sum(len(message["content"].encode()) for message in messages if message["role"] == "assistant")
        pieces.append(ids.astype(token_type(tokenizer)))
        targets.append(target)
    if not pieces:
        raise ValueError(
            f"{path}: no example with an answer in {counts['rows']} rows ({counts['skipped']} too long for "
            f"{form.length} tokens, {counts['without_answer']} without an answer): give other data or a greater length"
        )
    return join(pieces, targets, tokenizer.bos_token_id, size, counts)


def chat_source(paths: Sequence[str], tokenizer, form: ChatFormat, split: str, weight: float = 1.0) -> StreamedSource:
    """The conversations of files one after another, read while they are trained on; errors: `load_chats`'s."""
    counts = dict.fromkeys(COUNTS, 0)

    def read(skip: int):
        rows = chain.from_iterable(read_rows(path, split, streaming=True) for path in paths)
        for number, (where, row) in islice(enumerate(rows), skip, None):
            made = _example(tokenizer, conversation(row, form, where), form, where, counts)
            if made is not None:
                yield number, *made

    return StreamedSource(", ".join(map(str, paths)), read, weight, counts)


def _example(tokenizer, messages, form: ChatFormat, where: str, counts: dict[str, int]):
    """Tokens and target of a conversation, None where it is left out; `counts` say what happened to it."""
    counts["rows"] += 1
    ids, target = encode_conversation(tokenizer, messages, form, where)
    if len(ids) > form.length:
        counts["skipped" if form.overlong == "skip" else "truncated"] += 1
        if form.overlong == "skip":
            return None
        ids, target = ids[: form.length], target[: form.length]
    if not target.any():
        counts["without_answer"] += 1
        return None
    return ids, target


def conversation(row: dict, form: ChatFormat, where: str) -> list[dict[str, str]]:
    """The messages of a row, each with a role and a content. Errors: no columns that fit, or no text in them."""
    name = form.messages or next((name for name in MESSAGES if name in row), "")
    if name and not (form.prompt or form.response):
        if not isinstance(row.get(name), list):
            raise ValueError(f"{where}: no messages in column {name!r}; the columns are {columns_of(row)}")
        return [_message(message, name, where) for message in row[name]]
    prompt = form.prompt or next((name for name in PROMPTS if name in row), "")
    response = form.response or next((name for name in RESPONSES if name in row), "")
    for wanted, found in (("prompt", prompt), ("response", response)):
        if not isinstance(row.get(found), str):
            raise ValueError(
                f"{where}: no text for the {wanted} in {f'column {found!r}' if found else 'any column that is known'}; "
                f"the columns are {columns_of(row)}. Name them with --prompt-column and --response-column, or "
                f"--messages-column"
            )
    asked = row[prompt]
    if prompt == "instruction" and not form.prompt and isinstance(row.get("input"), str) and row["input"]:
        asked = f"{asked}\n\n{row['input']}"  # Alpaca's two parts of a question
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[response]}]


def _message(message, column: str, where: str) -> dict[str, str]:
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where}: a message of column {column!r} is not an object with role and content")
    return {"role": ROLES.get(role, role), "content": content}


def encode_conversation(tokenizer, messages, form: ChatFormat, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (L,) int64 and target (L,) bool of a conversation: every answer carries loss, and the end of the text.

    Errors: a special token spelled in a message, a chat template that changes what came before.
    """
    specials = sorted(set(tokenizer.all_special_tokens))
    for message in messages:
        for special in specials:
            if special in message["content"]:
                raise ValueError(f"{where}: the text holds the special token {special}: remove it from the data")
    parts = _chat_parts(tokenizer, messages, where) if form.chat else _plain_parts(tokenizer, messages, form, where)
    ids, target = [], []
    for text, answer in parts:
        new = text if isinstance(text, list) else tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        target += [answer] * len(new)
    return np.array(ids, dtype=np.int64), np.array(target, dtype=bool)


def _chat_parts(tokenizer, messages, where: str):
    """(text or ids, whether it is an answer), in order."""
    done, parts = "", []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"{where}: the tokenizer's chat template writes earlier turns anew at message {number + 1}, so answers "
                f"cannot be told from prompts: use a template that only adds, or --format plain"
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if parts and tokenizer.eos_token_id is not None:
        parts.append(([tokenizer.eos_token_id], True))
    return parts


def _plain_parts(tokenizer, messages, form: ChatFormat, where: str):
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(
            f"{where}: {len(messages)} messages, but the plain format takes one prompt and one response: use "
            f"--format chat"
        )
    prompt, response = (message["content"] for message in messages)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [(encode_prompt(tokenizer, prompt + form.separator), False), (response, True), (end, True)]

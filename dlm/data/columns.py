"""The columns of a row -> the messages of a conversation, in the words of the data sets people have.

Known: messages or conversations (OpenAI's, ShareGPT's words), a prompt and a response under their usual names, a
system text, earlier turns (`history`), a text the question is about (`input`, `context`), reasoning traces as s1K has
them (`thinking_trajectories` and `attempt`), and `weight` 0, which means no loss. What is not used is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlm.data.sources import checked, columns_of

__all__ = ["COLUMNS", "Columns", "Message", "messages_of"]

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "input", "query")
RESPONSES = ("response", "answer", "completion", "output", "answers")
SYSTEMS = ("system", "system_prompt")
ABOUT = ("input", "context")  # the text that a question is about: Alpaca's, Dolly's and SQuAD's
TRACES, ATTEMPT = "thinking_trajectories", "attempt"  # s1K's (arXiv:2501.19393): ways to think, and the answer
TRACED = "<reasoning>{}</reasoning>\n<answer>{}</answer>"  # an answer as d1 writes it (arXiv:2504.12216)
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "model": "assistant", "function": "tool"}
COLUMNS = "not used: column "  # + its name, in the counts

Message = dict[str, Any]  # {"role", "content": text, "loss": whether an answer carries loss}


@dataclass(frozen=True)
class Columns:
    """The columns that a user named, "" for those that are known by name."""

    messages: str = ""
    prompt: str = ""
    response: str = ""


def messages_of(row: dict, named: Columns, where: str) -> tuple[list[Message], list[str]]:
    """The messages of a row, and the columns with text that were not used.

    Raises ValueError where no columns fit or a message has no text.
    """
    used: set[str] = set()
    name = named.messages or next((name for name in MESSAGES if name in row), "")
    if name and not (named.prompt or named.response):
        if not isinstance(row.get(name), list):
            raise ValueError(f"{where}: no messages in column {name!r}; the columns are {columns_of(row)}")
        messages = [_message(message, name, where) for message in row[name]]
        used.add(name)
    else:
        messages = _pair(row, named, where, used)
    if (system := _first_text(row, SYSTEMS)) and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": checked(row[system], where), "loss": False})
        used.add(system)
    if "weight" in row and _number(row["weight"], where) == 0:
        messages = [{**message, "loss": False} for message in messages]
    used.add("weight")
    kept = [message for message in messages if message["role"] != "assistant" or message["content"].strip()]
    unused = [column for column, value in row.items() if column not in used and value and isinstance(value, str | list)]
    return kept, unused + ["an answer without text"] * (len(kept) < len(messages))


def _pair(row: dict, named: Columns, where: str, used: set[str]) -> list[Message]:
    prompt = named.prompt or next((name for name in PROMPTS if name in row), "")
    traced = not named.response and TRACES in row and ATTEMPT in row
    response = ATTEMPT if traced else named.response or next((name for name in RESPONSES if name in row), "")
    answer = row.get(response)
    if traced:
        answer = _traced(row, where)
        used.add(TRACES)
    if isinstance(answer, dict) and isinstance(answer.get("text"), list) and answer["text"]:
        answer = answer["text"][0]  # SQuAD's several answers: the first
    for wanted, column, value in (("prompt", prompt, row.get(prompt)), ("response", response, answer)):
        if not isinstance(value, str):
            place = f"column {column!r}" if column else "any column that is known"
            raise ValueError(
                f"{where}: no text for the {wanted} in {place}; "
                f"the columns are {columns_of(row)}. Name them with --prompt-column and --response-column, or "
                f"--messages-column"
            )
    asked = row[prompt]
    used.update((prompt, response))
    about = _first_text(row, ABOUT) if not named.prompt else ""
    if about and about != prompt:
        asked = f"{asked}\n\n{row[about]}"
        used.add(about)
    history = row.get("history")
    turns: list[Message] = []
    if isinstance(history, list) and history:
        turns = _history(history, where)
        used.add("history")
    return [
        *turns,
        {"role": "user", "content": checked(asked, where), "loss": False},
        {"role": "assistant", "content": checked(answer, where), "loss": True},
    ]


def _traced(row: dict, where: str) -> str:
    """The first way to think, and the answer it came to."""
    traces, answer = row[TRACES], row[ATTEMPT]
    if not isinstance(traces, list) or not traces or not isinstance(traces[0], str) or not isinstance(answer, str):
        raise ValueError(
            f"{where}: column {TRACES!r} must be a list of texts and {ATTEMPT!r} a text; the columns are "
            f"{columns_of(row)}. Name others with --prompt-column and --response-column"
        )
    return TRACED.format(traces[0], answer)


def _history(history: Sequence, where: str) -> list[Message]:
    """Earlier turns, pairs of a question and an answer. They are given text: loss is on the row's own answer."""
    turns: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{where}: column 'history' holds no pairs of texts")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": checked(text, where), "loss": False})
    return turns


def _message(message, column: str, where: str) -> Message:
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        content = _joined(content, where)
    if content is None and isinstance(role, str):
        more = " (it calls tools, which have no text)" if given.get("tool_calls") else ""
        raise ValueError(f"{where}: a message of the role {role!r} has no content{more}")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where}: a message of column {column!r} is not an object with role and content")
    role = ROLES.get(role, role)
    loss = role == "assistant" and _number(given.get("weight", 1), where) != 0
    return {"role": role, "content": checked(content, where), "loss": loss}


def _joined(parts: Sequence, where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}: a message holds a part of the kind {kind!r}: text parts alone can be used")
        texts.append(part["text"])
    return "".join(texts)


def _first_text(row: dict, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(row.get(name), str) and row[name].strip()), "")


def _number(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: weight is {value!r}: give 0 (no loss) or 1")
    return float(value)

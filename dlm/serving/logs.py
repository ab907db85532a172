"""One line of JSON for each request, without its texts unless they are asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlm.serving.requests import Result

if TYPE_CHECKING:
    from dlm.serving.asking import Ask
    from dlm.serving.engine import Engine

__all__ = ["Entry", "JsonLines", "write"]

log = logging.getLogger("dlm.serving.requests")


class Entry:
    """What is known of a request while it runs."""

    def __init__(self, number: str, path: str, began: float):
        self.fields: dict[str, Any] = {"id": number, "path": path}
        self.began = began

    def note(self, ask: Ask, texts: bool, engine: Engine) -> None:
        """Takes note of what was asked."""
        self.fields |= {"prompt_tokens": ask.given, "choices": len(ask.requests)}
        if texts:
            mask = engine.pretrained.mask_id
            self.fields["prompt"] = engine.decode([token for token in ask.requests[0].ids if token != mask])


def write(
    entry: Entry, status: int, results: Sequence[Result] = (), texts: bool = False, error: str | None = None
) -> None:
    """The line of a request that has ended."""
    fields = {**entry.fields, "status": status, "seconds": round(time.monotonic() - entry.began, 4)}
    if results:
        fields |= {
            "completion_tokens": sum(len(result.ids) for result in results),
            "nfe": sum(result.nfe for result in results),
            "waited": round(max(result.waited for result in results), 4),
            "finish_reason": [result.finish_reason for result in results],
        }
    if texts and results:
        fields["text"] = [result.text for result in results]
    if error is not None:
        fields["error"] = error
    log.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields = {"time": now, "level": record.levelname.lower(), "event": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True)

"""Where the shipped checkpoints are, and what a checkpoint's small files say, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlm.sampling.config import SAMPLING

__all__ = ["SHIPPED", "TWIN", "own_defaults"]

SHIPPED = Path(__file__).parent.parent / "assets" / "llama-stories-6m"  # the model that comes with the package
TWIN = SHIPPED.with_name("llama-stories-6m-autoregressive")  # its autoregressive twin: its judge, and a baseline


def own_defaults(path: str, revision: str | None = None) -> dict[str, Any]:
    """The entry "dlm" of a checkpoint's generation_config.json: sampling options, perhaps "chat": false.

    Errors: an entry that is no option.
    """
    file: str | Path | None = Path(path) / "generation_config.json"
    if not Path(path).is_dir():
        from transformers.utils import cached_file

        file = cached_file(
            path,
            "generation_config.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None or not Path(file).is_file():
        return {}
    found = json.loads(Path(file).read_text(encoding="utf-8")).get("dlm", {})
    for name in sorted(set(found) - set(SAMPLING) - {"chat"}):
        raise ValueError(f'{file}: "dlm" has the entry {name!r}, which is no sampling option: remove it')
    return found

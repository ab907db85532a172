"""Where the shipped checkpoints are, and what a checkpoint's small files say, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlm.sampling.config import SAMPLING
from dlm.utils.jsonio import read_json

__all__ = ["SHIPPED", "TWIN", "cached_defaults", "own_defaults", "read_defaults"]

SHIPPED = Path(__file__).parent.parent / "assets" / "llama-stories-6m"  # the model that comes with the package
TWIN = SHIPPED.with_name("llama-stories-6m-autoregressive")  # its autoregressive twin: its judge, and a baseline


def own_defaults(path: str, revision: str | None = None) -> dict[str, Any]:
    """The entry "dlm" of a checkpoint's generation_config.json: sampling options, perhaps "chat": false.

    Raises ValueError as `read_defaults`.
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
    return {} if file is None else read_defaults(file)


def cached_defaults(path: str) -> dict[str, Any]:
    """`own_defaults` of what is on this machine, without torch and network: a folder, or a hub id in the cache."""
    if Path(path).is_dir():
        return read_defaults(Path(path) / "generation_config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(path, "generation_config.json")
    except HFValidationError:  # no name that a hub could have
        return {}
    return read_defaults(file) if isinstance(file, str) else {}


def read_defaults(file: str | Path) -> dict[str, Any]:
    """The entry "dlm" of a generation_config.json; {} where there is no such file.

    Raises ValueError for a file that is not JSON and for an entry that is no option.
    """
    if not Path(file).is_file():
        return {}
    fields = read_json(file)
    own = (fields.get("dlm") or {}) if isinstance(fields, dict) else fields
    if not isinstance(own, dict):
        raise ValueError(f'{file}: "dlm" must hold names and values of sampling options, not {type(own).__name__}')
    for name in sorted(set(own) - set(SAMPLING) - {"chat"}):
        raise ValueError(f'{file}: "dlm" has the entry {name!r}, which is no sampling option: remove it')
    return own

"""Where the shipped checkpoints are, and what a checkpoint's small files say, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlm.sampling.config import SAMPLING
from dlm.utils.jsonio import read_object

__all__ = ["SHIPPED", "TWIN", "cached_defaults", "read_defaults"]

SHIPPED = Path(__file__).parent.parent / "assets" / "llama-stories-12m"  # the model that comes with the package
TWIN = SHIPPED.with_name("llama-stories-6m-autoregressive")  # autoregressive: its judge, and a baseline


def cached_defaults(path: str) -> dict[str, Any]:
    """`read_defaults` of what is on this machine, without torch and network: a folder, or a hub id in the cache."""
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

    Its "chat" is a bool, or the options that differ where the model answers.

    Raises ValueError for a file that is not JSON and for an entry that is no option.
    """
    if not Path(file).is_file():
        return {}
    own = read_object(file).get("dlm")
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ValueError(f'{file}: "dlm" must hold names and values of sampling options, not {type(own).__name__}')
    kinds = {name: kind for name, (kind, _) in SAMPLING.items()} | {"chat": bool}
    answers = own["chat"] if isinstance(own.get("chat"), dict) else {}
    for name, value in [*(own | {"chat": True} if answers else own).items(), *answers.items()]:
        if name not in kinds:
            raise ValueError(f'{file}: "dlm" has the entry {name!r}, which is no sampling option: remove it')
        if not _fits(value, kinds[name]):
            raise ValueError(f'{file}: "dlm" has {name} {str(value)[:40]!r}, which is of a wrong type: remove it')
    return own


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the type of an option; ids may be several."""
    if value is None or kind not in (int, float, str, bool):
        return True
    if isinstance(value, list) and kind is int:
        return all(type(one) is int for one in value)
    return type(value) in ((int, float) if kind is float else (kind,))

"""Where the shipped checkpoints are, and what a checkpoint's small files say, read without torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from dlm.sampling.config import SamplingConfig
from dlm.sampling.options import SAMPLING
from dlm.utils.jsonio import read_object
from dlm.utils.names import check_name

__all__ = ["SHIPPED", "TWIN", "cached_defaults", "defaults_for", "read_defaults", "sampling_with"]

SHIPPED = Path(__file__).parent.parent / "assets" / "llama-stories-12m"  # the model that comes with the package
TWIN = SHIPPED.with_name("llama-stories-6m-autoregressive")  # autoregressive: its judge, and a baseline


def defaults_for(use: str, own: dict[str, Any], full_attention: bool) -> dict[str, Any]:
    """A checkpoint's sampling defaults for one use.

    use: `text` as they are; `answers` with those that stand under "chat", such as a length that a whole answer fits
    (its `turns` is no sampling option, and is left out);
    `blanks` so that the text after a blank counts: a network that knows both visibilities (full_attention) uses the
    one that sees it, and a text of variable length does not grow.
    """
    check_name("use", use, ("text", "answers", "blanks"))
    if use == "answers":
        answers = own["chat"] if isinstance(own.get("chat"), dict) else {}
        return own | {name: value for name, value in answers.items() if name != "turns"}
    if use == "blanks":
        kept = {name: value for name, value in own.items() if name != "grow"}
        return kept | {"method": "none"} if full_attention and kept.get("method") == "block_causal" else kept
    return own


def sampling_with(own: dict[str, Any], fields: dict[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling defaults with `fields` over them; where these have a gen_length, the checkpoint's steps,
    which are meant for its own, are left out. Raises ValueError as SamplingConfig."""
    kept = {name: value for name, value in own.items() if name in SAMPLING}
    if "gen_length" in fields:
        kept.pop("steps", None)
    return SamplingConfig(**kept | fields)


def cached_defaults(path: str, use: str = "text") -> dict[str, Any]:
    """The defaults in force for a use (`defaults_for`), of a folder or a hub id in the cache: without network, and in
    LLaDA's own layout without torch. {} where no file is here."""
    if (folder := _folder_here(path)) is None:
        return {}
    config = folder / "config.json"
    fields = read_object(config) if config.is_file() else {}
    own = read_defaults(folder / "generation_config.json")
    if fields.get("model_type", "llada") != "llada" or fields.get("num_experts") is not None:
        from dlm.checkpoints.defaults import family_defaults  # needs torch
        from dlm.checkpoints.load import read_config

        with suppress(ValueError):  # help is there for any folder; the command says what is wrong with it
            own = family_defaults(read_config(folder)) | own
    return defaults_for(use, own, bool(fields.get("full_attention")))


def _folder_here(path: str) -> Path | None:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = [try_to_load_from_cache(path, name) for name in ("config.json", "generation_config.json")]
    except HFValidationError:  # no name that a hub could have
        return None
    return next((Path(file).parent for file in files if isinstance(file, str)), None)


def read_defaults(file: str | Path) -> dict[str, Any]:
    """The entry "dlm" of a generation_config.json; {} where there is no such file.

    Its "chat" is a bool, or the options that differ where the model answers, and `turns`: how many of the last requests
    it reads.

    Raises ValueError for a file that is not JSON and for an entry that is no option.
    """
    if not Path(file).is_file():
        return {}
    own = read_object(file).get("dlm")
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ValueError(f'{file}: "dlm" must hold names and values of sampling options, not {type(own).__name__}')
    kinds = {name: kind for name, (kind, _) in SAMPLING.items()} | {"chat": bool}
    answers = dict(own["chat"]) if isinstance(own.get("chat"), dict) else {}
    plain = {name: value for name, value in own.items() if not (name == "chat" and isinstance(value, dict))}
    if (turns := answers.pop("turns", 1)) is not None and (type(turns) is not int or turns < 1):
        raise ValueError(f'{file}: "chat" has turns {str(turns)[:40]!r}: give a whole number, 1 or more, or remove it')
    for name, value in [*plain.items(), *answers.items()]:
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

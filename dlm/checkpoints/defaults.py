"""Sampling defaults of a checkpoint: its family's, and the entry "dlm" of its generation_config.json, written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm.checkpoints.files import SHIPPED, read_defaults
from dlm.checkpoints.load import is_own
from dlm.models.fields import LLaDAFields
from dlm.sampling.config import as_ids
from dlm.utils.files import MARKER, whole_folder, write_json
from dlm.utils.jsonio import read_object

__all__ = ["check_writable", "family_defaults", "write_defaults"]

NAME = "generation_config.json"
# What is replaced as a whole: a method goes with its block length, a commit rule with its numbers.
TUNED = (
    "method", "block_length", "commit", "steps", "steps_per_block", "threshold", "factor", "entropy_bound", "revise",
    "edit_threshold", "edit_shadow", "verify_threshold", "max_post_passes", "gen_length",
)  # fmt: skip


def family_defaults(config) -> dict[str, Any]:
    """The sampling options of the authors of a checkpoint's family, by its configuration; {} where there are none."""
    if not is_own(config) or isinstance(config, LLaDAFields):
        return {}
    from dlm.models.families import family_of  # the table of families takes seconds to import

    options = dict(family_of(config).sampling)
    if not as_ids(config.eos_token_id):
        options.pop("stop_at_eos", None)
    return options


def check_writable(source: Path, target: Path, *, hub: bool) -> None:
    """Raises ValueError where the defaults of `target` may not be written: a checkpoint that ships with dlm or came
    from a hub, in place. hub: whether `source` lies in the cache of a hub."""
    if source.resolve() != target.resolve():
        return
    shipped = target.resolve().is_relative_to(SHIPPED.parent.resolve())
    if hub or shipped:
        kind = "comes from a hub" if hub else "ships with dlm"
        raise ValueError(f"the checkpoint {kind} and is not changed: give --write a new folder, which becomes a copy")


def write_defaults(source: Path, target: Path, fields: Mapping[str, Any], *, hub: bool = False) -> Path:
    """Writes sampling defaults into `target`: a copy of the checkpoint in `source`, or that folder itself.

    Defaults other than method, commit rule, revision and length stay as they are. Raises ValueError as
    `check_writable`, and as `whole_folder` for a folder that holds what dlm did not write.
    """
    check_writable(source, target, hub=hub)
    if source.resolve() == target.resolve():
        _update(target, fields)
        marker = target / MARKER
        if marker.is_file() and NAME not in (files := read_object(marker).get("files", [])):
            write_json(marker, read_object(marker) | {"files": sorted([*files, NAME])}, indent=1)
        return target
    with whole_folder(target) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name != MARKER:
                shutil.copyfile(file, temporary / file.name)
        _update(temporary, fields)
    return target


def _update(folder: Path, fields: Mapping[str, Any]) -> None:
    file = folder / NAME
    kept = {name: value for name, value in read_defaults(file).items() if name not in TUNED}
    whole = read_object(file) if file.is_file() else {}
    write_json(file, whole | {"dlm": kept | dict(fields)}, indent=2)

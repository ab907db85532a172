"""Unknown names are errors that suggest the nearest known name."""

import difflib
from collections.abc import Iterable

__all__ = ["check_name", "nearest"]


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


def check_name(what: str, name: str, names: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name and all of them, where `name` is not one of `names`."""
    names = list(names)
    if name not in names:
        raise ValueError(
            f"{what} is {name!r}, which is not known: did you mean {nearest(name, names)!r}? "
            f"(one of {', '.join(names)})"
        )

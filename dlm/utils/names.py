"""Unknown names are errors that suggest the nearest known name."""

import difflib
from collections.abc import Iterable, Mapping

__all__ = ["check_name", "name_and_number", "nearest"]


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


def name_and_number(what: str, text: str, numbers: Mapping[str, str | None]) -> tuple[str, dict[str, float]]:
    """`verify:0.01` -> (`verify`, {`verify_threshold`: 0.01}); without a colon no field is set.

    numbers: each name, with the field that a number behind it sets; None where it takes none.
    Raises ValueError for an unknown name, what is no number, and a number behind a name that takes none.
    """
    name, colon, value = text.partition(":")
    check_name(what, name, numbers)
    if not colon:
        return name, {}
    if (field := numbers[name]) is None:
        raise ValueError(f"{what} is {text!r}: {name} takes no number; write {name} alone")
    try:
        return name, {field: float(value)}
    except ValueError:
        raise ValueError(f"{what} is {text!r}: {value!r} is no number; write {name}:0.5, or {name} alone") from None

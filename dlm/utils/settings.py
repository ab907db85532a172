"""Settings of a dataclass, read from a YAML file and from options."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path

import yaml

from dlm.utils.names import nearest


def parse(kind: type, argv: list[str], prog: str, text: str):
    """The settings of a command line, an instance of the dataclass `kind`: its defaults, then the YAML of
    --config, then the options.

    Errors: a key that no setting has (the nearest name is given), a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types_ = typing.get_type_hints(kind)
    parser = argparse.ArgumentParser(
        prog=prog, description=text, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="settings by name; the command line overrides them")
    for name, field in fields.items():
        option = "--" + name.replace("_", "-")
        if types_[name] is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, default=None, metavar="", help=f"default: {field.default}")
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"the command line: {error}") from error
    if unknown:
        key = unknown[0].split("=")[0]
        options = ["config", *fields]
        guess = nearest(key.lstrip("-").replace("-", "_"), options).replace("_", "-")
        raise ValueError(f"unknown option {key}: did you mean --{guess}?")
    settings: dict = {}
    if given.config:
        settings.update(_read_yaml(Path(given.config), fields))
    settings.update({k: v for k, v in vars(given).items() if k in fields and v is not None})
    return kind(**{name: _convert(name, value, types_[name]) for name, value in settings.items()})


def _read_yaml(path: Path, fields) -> dict:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(read, dict):
        raise ValueError(f"--config {path}: a {type(read).__name__}, not a list of `name: value` lines")
    for key in read:
        if key not in fields:
            raise ValueError(f"--config {path}: unknown key {key!r}: did you mean {nearest(str(key), fields)!r}?")
    return read


def _convert(name: str, value, wanted):
    """A YAML or command-line value as the type of its setting. Errors: a value that does not fit, by name."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(None) in options:
        if value is None or value == "" or value == "none":
            return None
        wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else tuple(str(value).split("|"))
    if value is None:
        value = ""
    try:
        if wanted is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if wanted is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if wanted is str and isinstance(value, bool):
            return "yes" if value else "no"  # YAML reads the bare words yes and no as truth values
        return wanted(value)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} is {value!r}: it must be a{'n int' if wanted is int else ' ' + wanted.__name__}"
        ) from None

"""Options of a command: one line of help each, errors of one line; and dataclasses of settings read from them.

A dataclass may say more of its fields, as attributes without annotation:
GROUPS {title: {field: help}}; CHOICES {field: names}; NEEDS {field: (other field, values, reason)}, where `field` has
an effect only while the other one has one of these values (None: any that is true).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from dlm.utils.errors import shortened
from dlm.utils.names import nearest

__all__ = ["SYNONYMS", "OptionParser", "flag", "parse", "refuse_idle"]

# What other tools call an option, and what it is called here.
SYNONYMS = {
    "--max-new-tokens": "--gen-length",
    "--max-tokens": "--gen-length",
    "--max-length": "--gen-length",
    "--gen-len": "--gen-length",
    "--block-size": "--block-length",
    "--num-steps": "--steps",
    "--diffusion-steps": "--steps",
    "--temp": "--temperature",
    "--num-return-sequences": "--num-samples",
    "--remasking": "--confidence",
    "--cfg": "--cfg-scale",
    "--guidance-scale": "--cfg-scale",
    "--model-path": "--model",
    "--model-name-or-path": "--model",
    "--torch-dtype": "--dtype",
    "--precision": "--dtype",
    "--lr": "--learning-rate",
    "--output-dir": "--output",
    "--num-train-epochs": "--epochs",
    "--train-file": "--data",
    "--dataset": "--data",
    "--eval-steps": "--valid-every",
    "--save-steps": "--checkpoint-every",
    "--logging-steps": "--log-every",
    "--gradient-accumulation-steps": "--accumulation",
    "--gradient-checkpointing": "--activation-checkpointing",
    "--per-device-train-batch-size": "--batch-size",
    "--max-seq-length": "--sequence-length",
    "--max-grad-norm": "--clip",
    "--resume-from-checkpoint": "--resume",
    "--report-to": "--tracker",
    "--bf16": "--precision",
    "--fp16": "--precision",
}
NARROW, WIDE, COLUMN = 80, 120, 32


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help of one line an option, as wide as the terminal; a switch is shown by the name that changes its default."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((WIDE, 24)).columns
        super().__init__(prog, max_help_position=COLUMN, width=min(max(columns, NARROW), WIDE) - 1)

    def _get_help_string(self, action):
        off = isinstance(action, argparse.BooleanOptionalAction) and getattr(action, "shown", action.default)
        return f"turns this off: {action.help}" if off else action.help

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[-1 if getattr(action, "shown", action.default) else 0]
        return super()._format_action_invocation(action)


class OptionParser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest option for one that does not exist."""

    def __init__(self, prog: str, text: str, usage: str | None = None) -> None:
        super().__init__(prog=prog, usage=usage, description=text, allow_abbrev=False, formatter_class=_Help)
        self.written: dict[str, str] = {}

    def error(self, message: str):
        raise ValueError(f"{shortened(message)} (see {self.prog} --help)")

    def writes(self, **kinds: str) -> None:
        """Says which options name a file that the command writes, and of which kind it is (`files.BEGINS`)."""
        self.written |= kinds

    def options(self) -> list[str]:
        """All the options' names."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses `argv`. Raises ValueError for an option that does not exist, with the one that was probably meant."""
        args, unknown = self.parse_known_intermixed_args(list(argv))
        for word in unknown:
            name = word.split("=")[0]
            if (here := SYNONYMS.get(name.replace("_", "-"))) in self.options():
                raise ValueError(f"no option {name}: it is {here} here (see {self.prog} --help)")
            if not name.startswith("-"):
                raise ValueError(f"{word!r} belongs to no option (see {self.prog} --help)")
            near = nearest(name, self.options())
            raise ValueError(f"unknown option {name}: did you mean {near}? (see {self.prog} --help)")
        self._check_written(args)
        return args

    def _check_written(self, args: argparse.Namespace) -> None:
        for name, kind in self.written.items():
            if (value := getattr(args, name)) is not None:
                from dlm.utils.files import check_file  # safetensors is for those who need it

                others = [given for other, given in vars(args).items() if other != name]
                words = [word for given in others for word in (given if isinstance(given, list) else [given])]
                parts = [part for word in words if isinstance(word, str) for part in (word, *word.split(","))]
                check_file(value, flag(name), kind, parts)


def flag(field: str) -> str:
    """`gen_length` -> `--gen-length`."""
    return "--" + field.replace("_", "-")


def shown_default(value) -> str:
    """A default as help shows it; "" where there is nothing to show."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return "|".join(map(str, value))
    if value is None or value == "":
        return ""
    if isinstance(value, str) and not value.isprintable():
        return repr(value)
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(kind: type, argv: list[str], prog: str, text: str):
    """The settings of a command line, an instance of the dataclass `kind`: its defaults, then the YAML of
    --config, then the options. With --help it prints the help, whose defaults are those of --config, and exits.

    Raises ValueError for a key that no setting has (the nearest name is given), a value of another type, and an
    option that has no effect beside the others.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types_ = typing.get_type_hints(kind)
    wanted = {"-h", "--help"} & set(argv)
    given = _parser(kind, fields, types_, prog, text, {}).parse([word for word in argv if word not in wanted])
    settings: dict = {}
    if given.config:
        settings.update(_read_yaml(Path(given.config), fields))
    if wanted:
        _parser(kind, fields, types_, prog, text, settings).parse(["--help"])
    options = {name: value for name, value in vars(given).items() if name in fields and value is not None}
    settings = {name: _convert(name, value, types_[name]) for name, value in (settings | options).items()}
    made = kind(**settings)
    refuse_idle(options, made, getattr(kind, "NEEDS", {}))
    return made


def refuse_idle(given: typing.Iterable[str], settings, needs: dict[str, tuple]) -> None:
    """Raises ValueError for a field in `given` that has no effect, by the table `needs` of (field, values, advice)."""
    for name in given:
        if name not in needs:
            continue
        other, values, advice = needs[name]
        value = getattr(settings, other)
        if not (value if values is None else value in values):
            now = f"{flag(other)} is {value}" if value not in (None, "", False) else f"there is no {flag(other)}"
            raise ValueError(f"{flag(name)} has no effect where {now}: leave it out, or {advice}")


def _parser(kind, fields, types_, prog: str, text: str, values: dict) -> OptionParser:
    """The options of a dataclass, in its groups; help shows `values` in place of the dataclass's defaults."""
    parser = OptionParser(prog if prog.startswith("dlm ") else f"dlm train {prog}", text.strip(), "%(prog)s [options]")
    parser.add_argument("--config", metavar="YAML", help="settings by name; the command line overrides them")
    groups = dict(getattr(kind, "GROUPS", {}))
    named = {name for texts in groups.values() for name in texts}
    groups["more"] = dict.fromkeys(fields.keys() - named, "")
    choices = getattr(kind, "CHOICES", {})
    for title, texts in groups.items():
        texts = {name: words for name, words in texts.items() if name in fields}
        group = parser.add_argument_group(title) if texts else parser
        for name, words in texts.items():
            default = values.get(name, fields[name].default)
            default = None if default is dataclasses.MISSING else default
            kind_ = _plain(types_[name])
            parts = [words] if words else []
            if name in choices:
                parts.append(", ".join(choices[name]))
            words = ": ".join(parts)
            if shown := shown_default(default):
                words += f" ({shown})"
            words = words.replace("%", "%%").strip()
            if kind_ is bool:
                action = group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=words)
                action.shown = bool(default)
            else:
                metavar = {int: "N", float: "X", tuple: "A|B"}.get(typing.get_origin(kind_) or kind_, "NAME")
                metavar = "PATH" if name in ("output", "export", "data", "valid", "model", "tokenizer") else metavar
                group.add_argument(flag(name), metavar=metavar, help=words)
    return parser


def _plain(wanted):
    """The type without `None`."""
    if isinstance(wanted, types.UnionType):
        return next(option for option in typing.get_args(wanted) if option is not type(None))
    return wanted


def _read_yaml(path: Path, fields) -> dict:
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(read, dict):
        raise ValueError(f"--config {path}: a {type(read).__name__}, not a list of `name: value` lines")
    for key in read:
        if key not in fields:
            raise ValueError(f"--config {path}: unknown key {key!r}: did you mean {nearest(str(key), fields)!r}?")
    return read


def _convert(name: str, value, wanted):
    """A YAML or command-line value as the type of its setting. Raises ValueError, by name, where it does not fit."""
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
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{name} is {value!r}: it must be a{'n int' if wanted is int else ' ' + wanted.__name__}"
        ) from None

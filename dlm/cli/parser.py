"""The options that several commands share, and errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dlm.checkpoints.files import SHIPPED, cached_defaults
from dlm.models.choices import ATTENTION, DTYPES, float_name
from dlm.sampling.config import SamplingConfig
from dlm.sampling.options import SAMPLING
from dlm.utils.settings import OptionParser, flag, shown_default

__all__ = ["Parser", "check_least", "flag", "shown_defaults"]


METAVARS = {"regex": "PATTERN", "json_schema": "FILE", "choices": "TEXTS"}


class Parser(OptionParser):
    """The options of one command; `add_model`, `add_sampling` and `add_output` add those that commands share."""

    def __init__(self, command: str, usage: str, text: str) -> None:
        super().__init__(f"dlm {command}", text.strip(), f"dlm {command} {usage}")

    def add_model(self):
        """Options that choose the model and where it runs; returns their group."""
        group = self.add_argument_group("model")
        group.add_argument("--model", metavar="PATH", help="folder or hub id (default: the model that ships)")
        group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
        group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU if any)")
        types = f"{', '.join(DTYPES[1:])} (default: as saved)"
        group.add_argument("--dtype", default="auto", type=float_name, metavar="NAME", help=types)
        group.add_argument("--attn-implementation", metavar="NAME", help="kernel: " + ", ".join(ATTENTION))
        group.add_argument(
            "--cuda-graphs",
            action="store_true",
            help="on a GPU: record each kind of pass, and replay it with one launch",
        )
        group.add_argument(
            "--compile",
            action="store_true",
            help="on a CPU, in float32: compile whole passes once for this machine (needs a C compiler)",
        )
        return group

    def add_sampling(self, defaults, leave_out: Sequence[str] = (), texts: Mapping[str, str] | None = None) -> None:
        """One option for each field of SamplingConfig; not given it is None, so that the checkpoint's counts.

        defaults: a SamplingConfig whose values the help shows. texts: what the help says of some fields in this
        command, without a default.
        """
        group = self.add_argument_group("sampling")
        for field, (kind, text) in SAMPLING.items():
            if field in leave_out:
                continue
            text = (texts or {}).get(field, text)
            value = None if texts and field in texts else getattr(defaults, field, None)
            if value is not None and (kind is not bool or value):
                text += f" (default: {shown_default(value)})"
            more = (
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": METAVARS.get(field, {int: "N", float: "X"}.get(kind, "NAME"))}
            )
            group.add_argument(flag(field), default=None, help=text, **more).shown = bool(value)

    def add_output(self):
        """Options that choose what is printed; returns their group."""
        group = self.add_argument_group("output")
        group.add_argument("--json", action="store_true", help="one JSON object a line for each text")
        group.add_argument("--no-live", action="store_true", help="do not show the text while it denoises")
        group.add_argument(
            "--delay",
            type=float,
            default=0.0,
            metavar="SECONDS",
            help="wait after each pass of the live view",
        )
        return group


def check_least(args: argparse.Namespace, least: int, *fields: str) -> None:
    """Raises ValueError where one of these options is given and below `least`."""
    for field in fields:
        if (value := getattr(args, field)) is not None and value < least:
            raise ValueError(f"{flag(field)} is {value}: give {least} or more")


def shown_defaults(argv: Sequence[str], use: str = "text") -> Any:
    """The SamplingConfig in force for the checkpoint that `argv` names, where help is asked for; else None.

    use: `text`, `answers` (as `Pretrained.chat_defaults`) or `blanks` (as `Pretrained.blank_defaults`). A hub id whose
    files are not on this machine shows dlm's own defaults.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    words = list(argv)
    path = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--model"), str(SHIPPED))
    path = next((word.split("=", 1)[1] for word in words if word.startswith("--model=")), path)
    own = cached_defaults(path, use)
    return SamplingConfig(**{field: value for field, value in own.items() if field in SAMPLING})

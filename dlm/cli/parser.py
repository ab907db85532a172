"""argparse with errors of one line, and the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dlm.utils.names import nearest


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest option for one that does not exist."""

    def __init__(self, command: str, usage: str, text: str) -> None:
        super().__init__(
            prog=f"dlm {command}",
            usage=f"dlm {command} {usage}",
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")

    def options(self) -> list[str]:
        """All the options' names."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; an option that does not exist is an error with the nearest one that does."""
        args, unknown = self.parse_known_intermixed_args(list(argv))
        for word in unknown:
            name = word.split("=")[0]
            raise ValueError(
                f"no option {name}: the nearest is {nearest(name, self.options())} (see {self.prog} --help)"
            )
        return args

    def add_model(self):
        """Options that choose the model and where it runs; returns their group."""
        group = self.add_argument_group("model")
        group.add_argument("--model", metavar="PATH", help="folder or hub id (default: the model that ships)")
        group.add_argument("--revision", help="branch, tag or commit of a hub id")
        group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
        group.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, int8, fp8 (default: as saved)")
        group.add_argument(
            "--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2 or flex_attention"
        )
        group.add_argument("--cuda-graphs", action="store_true", help="replay passes on a GPU: a launch for each")
        return group

    def add_sampling(self, defaults, leave_out: Sequence[str] = ()) -> None:
        """One option for each field of SamplingConfig; not given it is None, so that the checkpoint's counts.

        defaults: a SamplingConfig whose values the help shows.
        """
        from dlm.sampling.config import SAMPLING

        group = self.add_argument_group("sampling")
        for field, (kind, text) in SAMPLING.items():
            if field in leave_out:
                continue
            value = getattr(defaults, field, None)
            if value is not None and kind is not bool:
                text += f" (default: {value})"
            more = (
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
            )
            group.add_argument(flag(field), default=None, help=text, **more)

    def add_output(self) -> None:
        """Options that choose what is printed."""
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


def flag(field: str) -> str:
    """`gen_length` -> `--gen-length`."""
    return "--" + field.replace("_", "-")


def check_least(args: argparse.Namespace, least: int, *fields: str) -> None:
    """Raises ValueError where one of these options is given and below `least`."""
    for field in fields:
        if (value := getattr(args, field)) is not None and value < least:
            raise ValueError(f"{flag(field)} is {value}: give {least} or more")


def shown_defaults(argv: Sequence[str]):
    """SamplingConfig's defaults where help is asked for, else None: nothing else needs them so early."""
    if not {"-h", "--help"} & set(argv):
        return None
    import dlm

    return dlm.SamplingConfig()

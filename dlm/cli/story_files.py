"""What `dlm train stories` and `dlm train instructions` share: their options, and the reading."""

from __future__ import annotations

from dlm.cli.parser import Parser
from dlm.data.sources import parse_sources, read_documents

__all__ = ["check", "options", "read"]


def options(name: str, output: str, text: str, what: str) -> Parser:
    """A parser with the options that these scripts have in common. name: of the command; output: FILE or FOLDER; text:
    the description; what: help of --output."""
    parser = Parser(name, f"--data FILE,FILE --output {output} [options]", text)
    parser.add_argument("--data", metavar="FILE,FILE", help="stories, as dlm train pretrain reads them")
    parser.add_argument("--output", metavar=output, help=what)
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of JSONL (default: text)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is asked for (default: 0)")
    return parser


def check(args, goal: str) -> None:
    """Raises ValueError where the stories or the output were not named. goal: what the output is for."""
    if not args.data or not args.output:
        raise ValueError(f"give --data with stories and --output for the {goal}")


def read(args) -> list[str]:
    """The stories of all files."""
    return [text for source in parse_sources(args.data) for text in read_documents(source.path, args.text_column)]

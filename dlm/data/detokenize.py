"""Corpora that were published cut into words -> running text, as published zero-shot perplexities have them.

PTB, WikiText and LM1B put spaces around punctuation and marks in place of numbers and hyphens; a model that learnt from
running text is asked for running text. The substitutions are those of SEDD (arXiv:2310.16834) and MDLM
(arXiv:2406.07524), in their order, for each changes what the next one meets; bytes are counted after them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dlm.utils.names import check_name

Rules = tuple[tuple[str, str], ...]  # regular expression, replacement


def _literal(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.escape(old), new.replace("\\", r"\\")) for old, new in pairs)


def _inside(opening: str, closing: str, spaces: str, least: str) -> tuple[str, str]:
    """No spaces between a pair of marks and what they hold. least: `*?` or `+`, how often something stands inside."""
    first, last = re.escape(opening), re.escape(closing)
    held = f"[^{last}]" if spaces == r"\s*" else f"[^{first}{last}]"
    return f"{first}{spaces}({held}{least}){spaces}{last}", f"{opening}\\1{closing}"


PTB: Rules = (
    *_literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    ("(?<= )N(?= )", "1"),  # also where two stand side by side
    *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
)
WIKITEXT: Rules = (
    *_literal(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_literal(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *(_inside(*marks, r"\s*", "*?") for marks in ("()", "[]", "{}", '""', "''")),
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n")),
    *_literal((" N ", " 1 "), (" 's", "'s")),
)
LM1B: Rules = (
    *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    *(rule for mark in "?!" for rule in ((f" [{mark}] ", f"{mark} "), (f" [{mark}]$", mark))),
    *_literal((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    *(_inside(*marks, " ", "+") for marks in ('""', "''", "()", "[]")),
    *_literal(("$ ", "$"), ("£ ", "£")),
)
LAMBADA: Rules = (("[“”]", '"'), (r"\A\s*", "\n"), (r"\s*\Z", ""))


def _apply(rules: Rules) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def detokenizer(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return detokenizer


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": _apply(()),
    "ptb": _apply(PTB),
    "wikitext": _apply(WIKITEXT),
    "lm1b": _apply(LM1B),
    "lambada": _apply(LAMBADA),
}


def detokenize(text: str, name: str) -> str:
    """The running text of a document of the corpus `name`. Errors: a name that is not known."""
    check_name("detokenizer", name, DETOKENIZERS)
    return DETOKENIZERS[name](text)

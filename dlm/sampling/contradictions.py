"""Settings that are each well-formed and contradict each other: one line with the reason and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm.sampling.config import SamplingConfig

__all__ = ["refuse_contradictions"]


def refuse_contradictions(config: SamplingConfig) -> None:
    """Raises ValueError for settings that cannot be together."""
    _check_rules(config)
    _check_blocks(config)
    _check_constraint(config)
    if config.draft:
        _check_draft(config)
    if config.spacing:
        _check_spacing(config)


def _check_rules(config: SamplingConfig) -> None:
    if config.revise == "remask" and config.remask == "confidence" and config.ordering != "probability":
        raise ValueError(
            f"remask 'confidence' reads confidence as a probability, but confidence is {config.ordering!r}: use "
            "probability, or another remask"
        )
    if config.shadowed and config.cfg_scale:
        name = "revise 'verify'" if config.revise == "verify" else "edit_shadow"
        raise ValueError(f"{name} is without guidance, and cfg_scale is {config.cfg_scale}: drop one of them")
    if config.steps is not None and config.steps_per_block is not None:
        raise ValueError(f"steps is {config.steps} and steps_per_block {config.steps_per_block}: give one of them")
    if config.sub_block_cache and config.sub_block_length is None:
        raise ValueError("sub_block_cache is for sub-blocks, and none were asked for: give sub_block_length")
    if config.sub_block_length is not None and config.revise != "none":
        raise ValueError("sub_block_length splits a block that revise goes over as a whole: leave one of them out")
    if config.commit == "origin" and config.confidence not in (None, "random"):
        raise ValueError(
            f"commit origin draws places whatever their confidence, but confidence is {config.confidence!r}: "
            "leave confidence out, or take another commit rule"
        )
    if config.commit == "entropy_bound" and config.confidence not in (None, "entropy"):
        raise ValueError(
            f"commit entropy_bound adds up entropies, but confidence is {config.confidence!r}: "
            "leave confidence out, or take another commit rule"
        )
    if config.commit == "factor" and config.confidence in ("entropy", "random"):
        raise ValueError(
            f"commit factor reads confidence as a probability, but confidence is {config.confidence!r}: "
            "use probability or margin, or another commit rule"
        )


def _check_constraint(config: SamplingConfig) -> None:
    given = [name for name in ("regex", "json_schema", "choices") if getattr(config, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: the text can match one of them; leave the others out")
    for name in ("regex", "json_schema"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{name} is {str(value)[:40]!r}: give a text")
    if config.choices is not None:
        wrong = not isinstance(config.choices, tuple) or not all(isinstance(text, str) for text in config.choices)
        if wrong or not config.choices or not all(config.choices):
            raise ValueError(f"choices is {config.choices!r}: give one or more texts, none of them empty")
    if given:
        from dlm.sampling.patterns import check_pattern, region_choice, schema_pattern  # numpy is for those who need it

        if config.regex is not None:
            check_pattern("regex", config.regex)
        elif config.choices is not None:
            check_pattern("choices' pattern", region_choice(config.choices))
        else:
            check_pattern("json_schema's pattern", schema_pattern(config.json_schema))
    if config.constraint_search == "viterbi" and config.temperature > 0:
        raise ValueError(
            f"constraint_search is 'viterbi', which takes the most probable text, but temperature is "
            f"{config.temperature}: leave one of them out"
        )


def _check_blocks(config: SamplingConfig) -> None:
    """Order and length."""
    if config.grow == "block" and config.method == "c2f":
        raise ValueError("grow 'block' adds blocks from left to right, and method 'c2f' has none: leave one out")
    if config.method == "c2f" and config.commit_first:
        raise ValueError("commit_first is for blocks from left to right, and method 'c2f' has none: leave one out")
    if config.moves:
        _check_moves(config)
    if config.method in SEVERAL:
        _check_several(config)


SEVERAL = ("pipeline", "pipeline_causal")  # methods that write several blocks at once


def _check_several(config: SamplingConfig) -> None:
    name = f"method {config.method!r}"
    if config.commit not in ("threshold", "stable"):
        raise ValueError(
            f"{name} commits in each open block what is certain enough, and commit {config.commit!r} counts: use "
            "commit threshold or stable"
        )
    if config.revise != "none":
        raise ValueError(f"revise {config.revise!r} goes over one block at a time, and {name} writes several: drop one")
    if config.grow != "none":
        raise ValueError(f"grow {config.grow!r} adds to the block that is written, and {name} writes several: drop one")
    if config.sub_block_length is not None or config.commit_first:
        raise ValueError(f"sub_block_length and commit_first are for one block at a time, and {name} writes several")


def _check_moves(config: SamplingConfig) -> None:
    name = f"grow {config.grow!r}"
    if config.method in ("c2f", "block_causal", *SEVERAL):
        raise ValueError(
            f"{name} moves what is written, and method {config.method!r} keeps its blocks where they are: use none, "
            "prefix, dual or vicinity"
        )
    for field in ("steps", "steps_per_block", "sub_block_length"):
        if getattr(config, field) is not None:
            raise ValueError(
                f"{field} is {getattr(config, field)}, a plan for a known number of tokens, and {name} changes it: "
                "leave one of them out"
            )
    for field in ("whole_blocks", "commit_first"):
        if getattr(config, field):
            raise ValueError(f"{field} is for blocks that stand still, and {name} moves them: leave one of them out")
    if config.commit in ("ancestral", "origin"):
        raise ValueError(f"commit {config.commit!r} plans its passes for a known length: leave it or {name} out")
    if any(getattr(config, field) is not None for field in ("regex", "json_schema", "choices")):
        raise ValueError(f"a pattern says itself where its text ends, within gen_length: leave it or {name} out")
    if config.grow == "confidence" and config.suppress_eos:
        raise ValueError(f"suppress_eos writes no end-of-text, and {name} looks for it: leave one of them out")
    if config.grow == "expand" and config.revise != "none":
        raise ValueError(f"revise {config.revise!r} and {name} both change what was committed: leave one of them out")


DRAFTED = ("none", "prefix", "dual", "vicinity", "block_causal")  # methods whose next states can be guessed


def _check_draft(config: SamplingConfig) -> None:
    """A state is verified by its tokens alone: what depends on more, or is not foreseen, has no draft."""
    for field, bad in (
        ("method", config.method not in DRAFTED),
        ("commit", config.commit in ("ancestral", "origin")),
        ("revise", config.revise != "none"),
        ("grow", config.grow != "none"),
        ("sub_block_length", config.sub_block_length is not None),
    ):
        if bad:
            raise ValueError(
                f"draft guesses which tokens the next passes commit, and {field} {getattr(config, field)!r} is not "
                "foreseen: leave one of them out"
            )


SPACED = (
    "quota",
    "threshold",
    "factor",
    "entropy_bound",
    "stable",
)  # commit rules that may take fewer, or other places


def _check_spacing(config: SamplingConfig) -> None:
    """Places are left out for later, which rules cannot bear that say themselves which ones, or how many at least."""
    if config.commit not in SPACED:
        raise ValueError(
            f"spacing is {config.spacing}, and commit {config.commit!r} says itself which places, or how many: use "
            f"{', '.join(SPACED[:-1])} or {SPACED[-1]}"
        )
    if config.method in SEVERAL:
        raise ValueError(
            f"spacing is {config.spacing}, and method {config.method!r} makes each open block go on in every pass: "
            "leave one of them out"
        )

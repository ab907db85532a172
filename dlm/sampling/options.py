"""The options of sampling as commands, bodies and YAML name them: type and help of each field of SamplingConfig, and
which of them has no effect beside which others. No torch here.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from dlm.sampling.config import COMMIT_NAMES, METHOD_NAMES, MOVES, REMASK_NAMES, SCHEDULED
from dlm.sampling.contradictions import SEVERAL

__all__ = ["NEEDS", "SAMPLING"]


def words(text: str) -> tuple[str, ...]:
    """The texts between the commas of an option."""
    return tuple(text.split(","))


def schema_file(path: str) -> str:
    """The text of a JSON schema's file. Errors: OSError, and argparse's own for a file that is not JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{path} is not JSON ({error}): give a file with a JSON schema") from None
    return text


# Field of SamplingConfig: (type, help). The one place where the options of sampling are written.
SAMPLING: dict[str, tuple[Callable, str]] = {
    "gen_length": (int, "tokens to generate"),
    "steps": (int, "forward passes in all, for --commit quota and those that share tokens out; not given: one a token"),
    "steps_per_block": (int, "forward passes for a whole block, in place of steps"),
    "block_length": (int, "tokens in a block, written left to right; not given: the model's own, or 32"),
    "sub_block_length": (int, "tokens of a block that are written before its next ones"),
    "sub_block_cache": (bool, "compute a sub-block alone while its first place is written"),
    "whole_blocks": (bool, "fill the last block up with masks, and cut the text"),
    "align": (str, "start or prompt: where the blocks of a block-causal model count from"),
    "commit_first": (bool, "the first pass of a block commits its first place alone (Fast-dLLM, shifted logits)"),
    "method": (str, f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}: order and cache"),
    "commit": (str, f"{', '.join(COMMIT_NAMES[:-1])} or {COMMIT_NAMES[-1]}: how many tokens a pass"),
    "threshold": (float, "for --commit threshold, dynamic, capped and stable: least confidence"),
    "factor": (float, "for --commit factor: higher commits more tokens a pass"),
    "entropy_bound": (float, "for --commit entropy_bound: most nats of a pass's entropies, without the largest"),
    "kl_bound": (float, "for --commit stable: most nats by which a prediction may change from pass to pass"),
    "kl_passes": (int, "for --commit stable: passes in a row in which it changed no more than that"),
    "spacing": (int, "fewest slots between two places that a pass commits; 0: any"),
    "spacing_threshold": (float, "for --spacing: confidence from which places may be near each other"),
    "draft": (int, "states ahead that a pass verifies too: fewer, larger passes; the text does not change"),
    "open_share": (float, "for --method pipeline: part of a block that is written before the next one opens"),
    "force_share": (float, "for --method pipeline: part after which the next block commits a token in every pass"),
    "revise": (str, "none, edit, remask or verify: which tokens a pass changes that were committed before"),
    "edit_threshold": (float, "for --revise edit: probability above which another token is written"),
    "edit_shadow": (bool, "for --revise edit: read the prediction of a place with its token hidden, as verify does"),
    "max_post_passes": (int, "for --revise edit: most passes over a block that has no mask left"),
    "remask": (str, f"for --revise remask: {', '.join(REMASK_NAMES[:-1])} or {REMASK_NAMES[-1]}"),
    "remask_eta": (float, "for --revise remask: how often a token is masked again (default: the paper's)"),
    "verify_threshold": (float, "for --revise verify: probability below which a token is masked again"),
    "noise_schedule": (str, "for --commit ancestral and --revise remask: linear, cosine, polynomial or geometric"),
    "split": (str, "remainder_first, rounded, floored or time: how a block's tokens are shared over its passes"),
    "time_eps": (float, "for --split time and --commit origin: the smallest time, at which the last pass ends"),
    "confidence": (str, "probability, margin, entropy or random: which come first; not given: by the commit rule"),
    "temperature": (float, "above 0: draws from the sharpened or flattened prediction; 0: the most probable token"),
    "order_temperature": (float, "above 0: places are drawn by softmax(confidence / T) in place of the best (Dream)"),
    "tempered_confidence": (bool, "confidence from the tempered probabilities, as Dream does"),
    "top_k": (int, "only the N most probable tokens"),
    "top_p": (float, "only the most probable tokens, whose probabilities add up to X"),
    "cfg_scale": (float, "strength of classifier-free guidance"),
    "grow": (
        str,
        "none, block (until end-of-text), confidence (masks where needed) or expand (DreamOn); up to --gen-length",
    ),
    "initial_length": (int, "for --grow confidence and expand: masks to begin with"),
    "grow_by": (int, "for --grow confidence: masks added before the first pass, and in the place of an unsure one"),
    "grow_below": (float, "for --grow confidence: probability below which a place becomes several"),
    "tail_length": (int, "for --grow confidence: slots at the end where end-of-text is looked for"),
    "tail_start": (float, "for --grow confidence: how probable it must be there before the first pass"),
    "tail_bound": (float, "for --grow confidence: how probable it must be there while writing"),
    "regex": (str, "a pattern that the whole text matches"),
    "json_schema": (schema_file, "a file with a JSON schema that the whole text fits"),
    "choices": (words, "texts between commas, of which the whole text is one"),
    "constraint_search": (str, "greedy or viterbi: token by token, or the most probable text that matches"),
    "window": (int, "for --method vicinity: positions on each side of the block"),
    "seed": (int, "of the first text; the next ones count up from it"),
    "stop_at_eos": (bool, "stop a text at its end-of-text token"),
    "eos_token_id": (int, "in place of the checkpoint's end-of-text token"),
    "suppress_eos": (bool, "never write end-of-text"),
    "delay_eos": (bool, "write end-of-text only where nothing else is left"),
}


# Field: (other field, its values with which this one has an effect (None: any but 0 and nothing), advice).
NEEDS: dict[str, tuple[str, tuple | None, str]] = {
    "steps": ("commit", (*SCHEDULED, "ancestral"), "add --commit quota"),
    "split": ("commit", ("quota", "sequential", "dynamic", "capped"), "add --commit quota"),
    "threshold": ("commit", ("threshold", "dynamic", "capped", "stable"), "add --commit threshold"),
    "kl_bound": ("commit", ("stable",), "add --commit stable"),
    "kl_passes": ("commit", ("stable",), "add --commit stable"),
    "spacing_threshold": ("spacing", None, "give a --spacing above 0"),
    "open_share": ("method", SEVERAL, "add --method pipeline"),
    "force_share": ("method", SEVERAL, "add --method pipeline"),
    "factor": ("commit", ("factor",), "add --commit factor"),
    "entropy_bound": ("commit", ("entropy_bound",), "add --commit entropy_bound"),
    "edit_threshold": ("revise", ("edit",), "add --revise edit"),
    "edit_shadow": ("revise", ("edit",), "add --revise edit"),
    "max_post_passes": ("revise", ("edit",), "add --revise edit"),
    "remask": ("revise", ("remask",), "add --revise remask"),
    "remask_eta": ("revise", ("remask",), "add --revise remask"),
    "verify_threshold": ("revise", ("verify",), "add --revise verify"),
    "initial_length": ("grow", MOVES, "add --grow confidence"),
    "grow_by": ("grow", ("confidence",), "add --grow confidence"),
    "grow_below": ("grow", ("confidence",), "add --grow confidence"),
    "tail_length": ("grow", ("confidence",), "add --grow confidence"),
    "tail_start": ("grow", ("confidence",), "add --grow confidence"),
    "tail_bound": ("grow", ("confidence",), "add --grow confidence"),
    "window": ("method", ("vicinity",), "add --method vicinity"),
    "top_k": ("temperature", None, "give a --temperature above 0"),
    "top_p": ("temperature", None, "give a --temperature above 0"),
    "tempered_confidence": ("temperature", None, "give a --temperature above 0"),
}

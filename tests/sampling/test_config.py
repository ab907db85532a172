"""SamplingConfig: what is refused, how it is said, and the nearest name for a misspelt one."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

import dlm
from dlm import SamplingConfig
from dlm.serving.requests import Request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gen_length", 0), ("gen_length", -5), ("gen_length", 1.5), ("gen_length", "8"), ("gen_length", None),
        ("steps", 0), ("steps", -1), ("steps", 2.5),
        ("block_length", 0), ("block_length", -2), ("block_length", 1.5),
        ("threshold", 1.1), ("threshold", math.nan), ("threshold", -math.inf),
        ("factor", 0.0), ("factor", -1.0), ("factor", math.nan),
        ("entropy_bound", -0.1), ("entropy_bound", math.nan),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 1e-50), ("temperature", 1e300),  # 0 and infinity in fp32: logits / T were no numbers
        *((name, 2**70) for name in ("gen_length", "steps", "block_length", "sub_block_length", "window", "draft")),
        ("eos_token_id", 2**70),
        ("top_k", 0), ("top_k", -1), ("top_k", 1.5),
        ("top_p", 0.0), ("top_p", 1.5), ("top_p", -0.1), ("top_p", math.nan),
        ("cfg_scale", -0.5), ("cfg_scale", math.nan), ("cfg_scale", math.inf),
        ("window", -1), ("window", 1.5),
        ("seed", 1.5), ("seed", "x"), ("seed", (1, "x")), ("seed", None),
        ("temperature", None),
        ("cfg_scale", None),
        ("threshold", None),
        ("threshold", "0.5"),
        ("stop_at_eos", "yes"),
        ("delay_eos", 1),
        ("eos_token_id", -1), ("eos_token_id", "x"), ("eos_token_id", (1, -1)),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_setting(field, value):
    with pytest.raises(ValueError, match=field) as error:
        SamplingConfig(**{field: value})
    said = str(error.value)
    assert str(value) in said or repr(value) in said
    assert "\n" not in said
    assert len(said) > len(field) + len(str(value)) + 15  # a reason or a way out, not the name alone


@pytest.mark.parametrize(
    ("field", "typo", "nearest"),
    [
        ("method", "duel", "dual"),
        ("method", "cf2", "c2f"),
        ("method", "vicinty", "vicinity"),
        ("method", "prefix_cache", "prefix"),
        ("method", "block-causal", "block_causal"),
        ("method", "None", "none"),
        ("commit", "qouta", "quota"),
        ("commit", "treshold", "threshold"),
        ("commit", "entropy-bound", "entropy_bound"),
        ("commit", "facter", "factor"),
        ("confidence", "prob", "probability"),
        ("confidence", "margins", "margin"),
        ("confidence", "entropi", "entropy"),
        ("confidence", "ramdom", "random"),
        ("split", "round", "rounded"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(field, typo, nearest):
    with pytest.raises(ValueError, match=field) as error:
        SamplingConfig(**{field: typo})
    assert repr(typo) in str(error.value) or typo in str(error.value)
    assert nearest in str(error.value)


@pytest.mark.parametrize("field", ["method", "commit", "confidence"])
@pytest.mark.parametrize("value", ["zzzz", "", 3, ["none"]])
def test_a_name_like_no_other_is_still_one_error(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingConfig(**{field: value})


def test_an_unknown_setting_is_an_error():
    with pytest.raises((TypeError, ValueError), match="treshold"):
        SamplingConfig(treshold=0.5)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().steps = 3


def test_settings_are_checked_again_on_replace():
    with pytest.raises(ValueError, match="steps"):
        dataclasses.replace(SamplingConfig(steps=4), steps=0)


def test_whole_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    config = SamplingConfig(gen_length=np.int64(4), temperature=np.float32(0.5), seed=np.int64(3))
    assert (config.gen_length, config.temperature, config.seed) == (4, 0.5, 3)


def test_lists_become_tuples():
    """As JSON and command lines have them; the settings stay hashable."""
    config = SamplingConfig(seed=[1, 2], eos_token_id=[3, 4])
    assert config.seed == (1, 2)
    assert config.eos_token_id == (3, 4)
    hash(config)


def test_numbers_of_any_kind_are_numbers():
    """A fraction was accepted, and failed in the first pass."""
    config = SamplingConfig(temperature=Fraction(1, 2), threshold=np.float32(0.5))
    assert config == SamplingConfig(temperature=0.5, threshold=0.5)
    assert (type(config.temperature), type(config.threshold)) == (float, float)


@pytest.mark.parametrize("config", [{"gen_length": 4}, "none", 4, dlm.SamplingConfig])
def test_settings_of_another_type_are_one_line(tiny, config):
    """Was: an AttributeError about 'start_length'."""
    canvas = dlm.Canvas.from_prompts([[1, 2]], 3, 39)
    fix = r"dlm\.SamplingConfig\(\*\*config\)" if isinstance(config, dict) else r"a dlm\.SamplingConfig, or None"
    for call in (dlm.generate, dlm.denoise):
        with pytest.raises(TypeError, match=rf"^config is a {type(config).__name__}: give {fix}$"):
            call(tiny, canvas, config)
    with pytest.raises(TypeError, match=r"^config is a "):
        Request([1, 39], config)

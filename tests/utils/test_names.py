"""Names with a number behind a colon."""

import pytest

from dlm.utils.names import name_and_number

NUMBERS = {"verify": "verify_threshold", "none": None}


def test_the_number_sets_its_field():
    assert name_and_number("rule", "verify:0.01", NUMBERS) == ("verify", {"verify_threshold": 0.01})
    assert name_and_number("rule", "verify", NUMBERS) == ("verify", {})
    assert name_and_number("rule", "none", NUMBERS) == ("none", {})


@pytest.mark.parametrize(
    "text, said",
    [
        ("verfy:1", "rule is 'verfy', which is not known: did you mean 'verify'"),
        ("verify:x", "rule is 'verify:x': 'x' is no number; write verify:0.5, or verify alone"),
        ("verify:", "'' is no number"),
        ("none:1", "rule is 'none:1': none takes no number; write none alone"),
    ],
)
def test_errors_name_value_reason_and_fix(text, said):
    with pytest.raises(ValueError) as error:
        name_and_number("rule", text, NUMBERS)
    assert said in str(error.value)

"""Results that are kept within so many bytes."""

import pytest

from dlm.utils.kept import kept


def test_the_longest_unused_go_first_and_what_is_too_large_is_not_kept():
    made = []

    @kept(10, len)
    def text(letter, count):
        made.append(letter)
        if not count:
            raise ValueError("nothing")
        return letter * count

    for letter, count in [("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4), ("long", 3), ("long", 3)]:
        assert text(letter, count) == letter * count
    assert made == ["a", "b", "c", "b", "long", "long"]  # c took the place of b, b that of c
    assert text("a", 4) == "aaaa" and len(made) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing"):
            text("d", 0)
    assert made[6:] == ["d", "d"]

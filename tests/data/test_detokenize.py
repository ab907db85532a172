"""Detokenizers: sentences worked by hand."""

import pytest

from dlm.data.detokenize import detokenize

CASES = [
    ("none", "a , b", "a , b"),
    ("wikitext", '1 @,@ 000 boys \' band ( ex @-@ pop ) said " no " .\n', '1,000 boys\' band (ex-pop) said "no" .\n'),
    ("wikitext", " = = Life = = \n He 's 5 @.@ 5 ° N ; [ sic ] !", " == Life ==\nHe's 5.5°N; [sic] !"),
    ("ptb", "banks ' N N shares do n't pay $ N \\/ # N to <unk> 's ", "banks' 1 1 shares don't pay $1 / #1 to ?'s "),
    ("lm1b", 'He : " It \'s in ( the ) U.S. , is it ? " $ 5 / 6 .', 'He: "It\'s in (the) U.S., is it?" $5/6.'),
    ("lm1b", "Why ? See http : / / a [ b ] now !", "Why? See http://a [b] now!"),
    ("lambada", " “ no ” he said \n", '\n" no " he said'),
]


@pytest.mark.parametrize(("name", "text", "wanted"), CASES)
def test_by_hand(name, text, wanted):
    assert detokenize(text, name) == wanted


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="did you mean 'wikitext'"):
        detokenize("a", "wikitxt")

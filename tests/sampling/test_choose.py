"""Options of blanks: exact for one token, the joint distribution for several, and what is refused."""

import itertools

import pytest
import torch

import dlm
from dlm.cli.main import main
from dlm.kernels.packing import packed
from dlm.sampling.choose import choose, read_options
from tests.helpers.toys import Predictor, tiny_model

WORDS = {(0, 0): 0.5, (1, 1): 0.3, (0, 1): 0.15, (1, 0): 0.05}
MASK = 4


class Letters:
    """a, b and a low line are a token each; nothing in front of a text."""

    bos_token_id = eos_token_id = None
    mask_token_id, eos_token = MASK, "<end>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ["ab-".index(letter) for letter in text]}

    def get_vocab(self):
        return {"a": 0, "b": 1, "-": 2, "<mask>": MASK}

    def convert_ids_to_tokens(self, number):
        return "ab-#"[number]


class Joint(Predictor):
    """The perfect predictor of the letters at slots 0 and 2, from WORDS."""

    def __call__(self, tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
        out = torch.full((*tokens.shape, 5), -60.0, dtype=torch.float64)
        for row, ids in enumerate(tokens.tolist()):
            known = (ids[0], ids[2])
            fits = {w: p for w, p in WORDS.items() if all(k in (MASK, v) for k, v in zip(known, w, strict=True))}
            for place, slot in enumerate((0, 2)):
                for letter in (0, 1):
                    share = sum(p for w, p in fits.items() if w[place] == letter) / sum(fits.values())
                    if share:
                        out[row, slot, letter] = torch.tensor(share).log()
        self.calls.append(tuple(tokens.shape))
        return out.gather(1, logits_to_keep[..., None].expand(-1, -1, 5))


def test_the_joint_distribution_of_a_perfect_predictor():
    chosen = choose(Joint(), "___{a|b}-___{a|b}", tokenizer=Letters(), mask_id=MASK)
    got = {tuple("ab".index(o) for o in row.options): row.probability for row in chosen.ranked}
    assert got == pytest.approx(WORDS)
    assert all(row.error == 0 for row in chosen.ranked)
    assert chosen.best == ("a", "a")
    assert chosen.of_blank(1) == pytest.approx({"a": 0.55, "b": 0.45})


def test_one_token_options_are_the_softmax_over_them():
    model, tokenizer = dlm.load()
    text = "The dog ran to the ___{ball|house|door}."
    chosen = dlm.choose(model, text, tokenizer=tokenizer)
    ids = tokenizer("The dog ran to the")["input_ids"]
    words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in ("ball", "house", "door")]
    assert all(len(word) == 1 for word in words)
    row = [*ids, tokenizer.mask_token_id, *tokenizer(".", add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        logits = packed(model)(torch.tensor([row]))[0, len(ids)]
    want = logits[[word[0] for word in words]].softmax(-1).tolist()
    got = {ranked.options[0]: ranked.probability for ranked in chosen.ranked}
    assert [got[word] for word in ("ball", "house", "door")] == pytest.approx(want, rel=1e-4)
    assert chosen.passes == 1


def test_the_guess_of_a_shifted_model_stands_one_place_before():
    """Dream, RND1 and Fast-dLLM v2 were asked at the blank's own place, where they predict what follows it."""
    model = tiny_model(0, vocab_size=5, embedding_size=5, mask_token_id=MASK, eos_token_id=3, shift_logits=True)
    chosen = choose(model, "ba___{a|b}ab", tokenizer=Letters(), mask_id=MASK)
    logits = model.predict(torch.tensor([[1, 0, MASK, 0, 1]]))[0, 1, :2].detach()
    got = {row.options[0]: row.probability for row in chosen.ranked}
    assert [got["a"], got["b"]] == pytest.approx(logits.softmax(dim=0).tolist())


def letters_model(**changes):
    return tiny_model(0, vocab_size=5, embedding_size=5, mask_token_id=MASK, eos_token_id=3, **changes)


def test_a_block_causal_model_weighs_the_text_behind_the_blank():
    """Was: text behind the blank's block had no effect, since the model does not see it from there."""
    model = letters_model(block_length=1)  # one order, left to right: the probability of the whole text
    chosen = choose(model, "ba___{a|b}ab", tokenizer=Letters(), mask_id=MASK)
    got, logs = {row.options[0]: row.probability for row in chosen.ranked}, []
    for option in (0, 1):
        ids, total = [1, 0, option, 0, 1], 0.0
        for slot in range(2, 5):
            logits = model.predict(torch.tensor([[*ids[:slot], MASK]]))[0, slot].detach()
            total += float(logits[:MASK].log_softmax(dim=0)[ids[slot]])
        logs.append(total)
    assert [got["a"], got["b"]] == pytest.approx(torch.tensor(logs).softmax(dim=0).tolist())
    assert all(row.error == 0 for row in chosen.ranked)
    blocks = letters_model(block_length=4)
    ranked = [choose(blocks, f"ba___{{a|b}}a{tail}", tokenizer=Letters(), mask_id=MASK) for tail in ("bab", "---")]
    assert ranked[0].ranked[0].log_probability != ranked[1].ranked[0].log_probability


def test_what_a_block_causal_model_sees_is_given_and_not_predicted():
    """Text that ends in the blank's block, and a model of both visibilities: one pass over one place, as before."""
    for model in (letters_model(block_length=8), letters_model(block_length=2, full_attention=True)):
        chosen = choose(model, "ba___{a|b}ab", tokenizer=Letters(), mask_id=MASK)
        logits = model.predict(torch.tensor([[1, 0, MASK, 0, 1]]))[0, 2, :2].detach()
        got = {row.options[0]: row.probability for row in chosen.ranked}
        assert [got["a"], got["b"]] == pytest.approx(logits.softmax(dim=0).tolist())
        assert chosen.passes == 1


def test_more_rows_than_anyone_waits_for_are_refused_first():
    with pytest.raises(ValueError, match="rows of the model, above 200,000: give fewer options"):
        choose(Joint(), "___{a|b}-" * 12, tokenizer=Letters(), mask_id=MASK, orders=1000)


def test_an_open_checkpoint_brings_its_tokenizer_and_limits():
    """`dlm.choose` asked for the tokenizer all the same; a blank of 2 * 10^9 tokens took memory first."""
    opened, text = dlm.load_pretrained(), "The dog ran to the ___{ball|house}."
    assert dlm.choose(opened, text).best == dlm.choose(opened.model, text, tokenizer=opened.tokenizer).best
    for call in (dlm.choose, dlm.infill):
        with pytest.raises(ValueError, match="no tokenizer"):
            call(packed, text)
    with pytest.raises(ValueError, match="max_sequence_length 512: shorten the text"):
        dlm.choose(opened, text + " ball" * 600)
    with pytest.raises(ValueError, match="the blanks are 2000000000 tokens together"):
        dlm.infill(opened, "The dog ___{2000000000}.")


def test_options_of_different_lengths_and_one_that_begins_another():
    model, tokenizer = dlm.load()
    text = "He saw a ___{cat|cat and a dog|caterpillar in the garden}."
    a, b = (dlm.choose(model, text, tokenizer=tokenizer, orders=4) for _ in range(2))
    assert a == b  # the same seed
    assert sum(row.probability for row in a.ranked) == pytest.approx(1)
    assert any(row.error > 0 for row in a.ranked)  # an estimate
    assert {row.options[0] for row in a.ranked} == {"cat", "cat and a dog", "caterpillar in the garden"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no blank", "no blank with options"),
        ("___{12}", "no blank with options"),
        ("___{a|a}", "stands twice"),
        ("".join("___{a|b|c|d|e|f|g|h}" for _ in range(5)), "fillings together"),
    ],
)
def test_bad_texts_are_one_line(text, said, capsys):
    with pytest.raises(ValueError, match=said):
        read_options(text)
    assert main(["choose", text]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1


def test_the_command_prints_all_fillings(capsys):
    assert main(["choose", "Tom was a ___{boy|girl} and ___{he|she} was happy."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.split("  ")[-1] for line in lines} == {
        f"{a} | {b}" for a, b in itertools.product(("boy", "girl"), ("he", "she"))
    }

"""Constraints: the automaton equals brute force, and what is written always matches, whatever the settings."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

import dlm
from dlm import Canvas, SamplingConfig, denoise, generate
from dlm.sampling import pattern_worker
from dlm.sampling.automaton import compile_pattern
from dlm.sampling.constraints import Constraint
from dlm.sampling.patterns import choice_pattern, schema_pattern
from dlm.sampling.places import Places, _open
from tests.helpers.toys import Table, tiny_model

pytest.importorskip("outlines_core")


class Letters:
    """A vocabulary of short words of a, b, c; id 6 is the mask, 7 end-of-text."""

    words = ("a", "b", "c", "ab", "bc", "abc", "<mask>", "<end>")
    all_special_ids = (6, 7)
    added_tokens_decoder: dict = {}
    backend_tokenizer = None
    mask_token_id, mask_token = 6, "<mask>"

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def text(self, ids):
        return "".join(self.words[i] for i in ids if i != 7)


LETTERS, MASK, END = Letters(), 6, 7
PATTERNS = ["(ab)*", "(ab|b)*c?", "a{2,3}", "(a|b)*a(a|b)", "abc|ab|a", "[ab]+(c[ab]+)?", "c*"]


def words_of(pattern, size):
    """All fillings of `size` places that match, by trying every one."""
    found = set()
    for ids in itertools.product([0, 1, 2, 3, 4, 5, END], repeat=size):
        ended = [i for i, token in enumerate(ids) if token == END]
        if ended and any(token != END for token in ids[ended[0] :]):
            continue
        if re.fullmatch(pattern, LETTERS.text(ids)):
            found.add(ids)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_allowed_tokens_are_those_of_brute_force(pattern):
    rng, automaton = random.Random(0), compile_pattern(LETTERS, pattern, (END,))
    for size in (1, 2, 4):
        words = words_of(pattern, size)
        if not words:
            with pytest.raises(ValueError, match=f"fits {size} tokens"):
                Places(automaton, [None] * size)
            continue
        for _ in range(6):
            places, left = Places(automaton, [None] * size), set(words)
            for i in rng.sample(range(size), size):
                allowed = {word[i] for word in left}
                assert set(np.flatnonzero(places.allowed(i)).tolist()) == allowed
                assert {token for token in range(8) if places.permits(i, token)} == allowed
                token = rng.choice(sorted(allowed))
                places.set(i, token)
                left = {word for word in left if word[i] == token}
            places.set(0, None)  # and a place that is emptied again
            assert set(np.flatnonzero(places.allowed(0)).tolist()) == {
                word[0] for word in words if word[1:] == tuple(places.tokens[1:])
            }


def test_large_automata_open_the_same_sets(monkeypatch):
    """Without the table of edges and classes."""
    automaton = compile_pattern(LETTERS, PATTERNS[3], (END,))
    assert automaton.holds is not None
    places = Places(automaton, [None] * 5)
    pairs = [(places.ahead(i), places.back(i + 1)) for i in range(5)]
    small = _open(automaton, pairs)
    monkeypatch.setitem(automaton.__dict__, "holds", None)
    assert small.any() and (_open(automaton, pairs) == small).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sets_follow_any_order_of_writing_emptying_and_asking(pattern):
    """They are brought up to date where they are asked for alone: any mixture gives what a fresh start gives."""
    rng, automaton, size = random.Random(5), compile_pattern(LETTERS, pattern, (END,)), 8
    try:
        places = Places(automaton, [None] * size)
    except ValueError:
        return
    for _ in range(150):
        place = rng.randrange(size)
        if places.tokens[place] is None and rng.random() < 0.7:
            places.set(place, int(rng.choice(np.flatnonzero(places.allowed(place)).tolist())))
        else:
            places.set(place, None)
        for asked in rng.sample(range(size), rng.choice([0, 1, 3])):
            if places.tokens[asked] is None:
                fresh = Places(automaton, places.tokens)
                assert places.classes([asked])[0].tolist() == fresh.classes([asked])[0].tolist()
                assert places.ahead(asked) == fresh.ahead(asked) and places.back(asked) == fresh.back(asked)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_viterbi_is_the_best_word_of_brute_force(pattern):
    rng, automaton = np.random.default_rng(1), compile_pattern(LETTERS, pattern, (END,))
    for size in (2, 4):
        if not (words := words_of(pattern, size)):
            continue
        for scored in (range(size), range(size - 1), [0]):
            scores = {i: rng.normal(size=8) for i in scored}
            word = Places(automaton, [None] * size).best(scores)
            assert tuple(word) in words
            best = max(sum(scores[i][w[i]] for i in scored) for w in words)
            assert sum(scores[i][word[i]] for i in scored) == pytest.approx(best)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "unterminated"), ("a(?=b)", "look-around"), ("", "only the empty text"), ("d", "nothing that matches")],
)
def test_bad_patterns_are_one_line(pattern, said):
    with pytest.raises(ValueError, match=said) as error:
        compile_pattern(LETTERS, pattern, (END,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "not JSON"),
        ("[]", "it is no object"),
        ("[" * 10**5, "nested too deeply"),
        ('{"properties": 3}', "3 at #/properties: it must be an object"),
        ('{"anyOf": 5}', "5 at #/anyOf: it must be a list"),
        ('{"$ref": "#"}', "refers to itself"),
        ('{"type": "object", "properties": {"a": {"$ref": "#"}}}', "refers to itself at #/properties/a"),
        ('{"type": "integer", "minimum": 3}', "'minimum' at #"),
        ('{"$ref": "#/$defs/x"}', "not in it"),
        ('{"type": "foo"}', "foo"),
    ],
)
def test_bad_schemas_are_one_line(schema, said):
    with pytest.raises(ValueError, match=said) as error:
        schema_pattern(schema)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"regex": "("}, "regex is '(': missing ), unterminated subpattern at position 0; mend the regular expression"),
        ({"regex": "x*)(y"}, "regex is 'x*)(y': unbalanced parenthesis at position 2"),  # it was read as (x*)(y)
        ({"regex": "a(?=b)"}, "regex is 'a(?=b)': no finite automaton can follow it; write it without look-around"),
        ({"regex": ""}, "regex is '': give a text"),
        ({"json_schema": "{"}, "json_schema is '{': it is not JSON"),
        ({"json_schema": '{"type": "string", "pattern": "("}'}, "json_schema's pattern is"),
        ({"choices": ("",)}, "choices is ('',)"),
    ],
)
def test_settings_refuse_what_no_text_can_match(settings, said):
    """A bad pattern was refused only once a model was loaded."""
    with pytest.raises(ValueError) as error:
        SamplingConfig(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)


# --- in the loop ---------------------------------------------------------------------------------------------------


def automata():
    return [compile_pattern(LETTERS, pattern, (END,)) for pattern in PATTERNS]


def test_random_settings_always_match():
    """Every method, commit rule, temperature, template, guidance, revision and search: what comes out matches."""
    from dlm.sampling.constraints import Constraint

    sizes = {"vocab_size": 8, "embedding_size": 10, "mask_token_id": MASK, "eos_token_id": END, "pad_token_id": END}
    model = tiny_model(4, d_model=8, n_heads=2, n_kv_heads=1, n_layers=1, mlp_hidden_size=12, sharp=3.0, **sizes)
    rng, patterns, done = random.Random(7), list(zip(PATTERNS, automata(), strict=True)), 0
    while done < 120:
        config = {
            "block_length": rng.randint(1, 6),
            "method": rng.choice(["none", "prefix", "dual", "vicinity", "c2f"]),
            "commit": rng.choice(["quota", "threshold", "factor", "entropy_bound"]),
            "threshold": rng.choice([0.05, 0.3]),
            "factor": 30.0,
            "temperature": rng.choice([0.0, 1.0, 3.0]),
            "top_k": rng.choice([None, 2]),
            "cfg_scale": rng.choice([0.0, 0.0, 1.0]),
            "suppress_eos": rng.random() < 0.2,
            "revise": rng.choice(["none", "none", "edit"]),
            "edit_threshold": 0.1,
            "constraint_search": rng.choice(["greedy", "viterbi"]),
            "seed": rng.randrange(1000),
        }
        try:
            config = SamplingConfig(**config)
        except ValueError as error:
            assert "viterbi" in str(error)
            continue
        rows, constraints, wanted = [], [], []
        for _ in range(rng.choice([1, 2])):
            row, here = [rng.randrange(6) for _ in range(rng.randint(0, 3))], []
            for _ in range(rng.choice([1, 2])):
                pattern, automaton = rng.choice(patterns)
                size = rng.randint(3, 6)
                here.append(Constraint(automaton, tuple(range(len(row), len(row) + size))))
                wanted.append((len(rows), here[-1].slots, pattern))
                row += [MASK] * size + [0]
            rows.append(row)
            constraints.append(here)
        canvas = Canvas.from_templates(rows, MASK)
        known = {"vocab_size": 8, "eos_token_ids": (END,), "constraints": constraints}
        *_, last = denoise(model, canvas, config, **known)
        assert not last.canvas.masked.any()
        for row, slots, pattern in wanted:
            ids = last.canvas.tokens[row, list(slots)].tolist()
            assert re.fullmatch(pattern, LETTERS.text(ids)), (pattern, ids, config)
            assert END not in ids or set(ids[ids.index(END) :]) == {END}
        done += 1


def test_a_token_ruled_out_in_the_same_pass_is_proposed_again():
    """Both places want what the other excludes: the surer one has it, and the other its best among what is left."""
    from dlm.sampling.constraints import Constraint

    table = torch.full((2, 8), -5.0)
    table[0, 0], table[0, 1] = 4.0, 3.0  # a, then b
    table[1, 1], table[1, 0] = 2.0, 1.0  # b, then a
    automaton = compile_pattern(LETTERS, "aa|bb", (END,))
    config = SamplingConfig(gen_length=2, block_length=2, steps=1)
    known = {"eos_token_ids": (END,), "constraints": [[Constraint(automaton, (0, 1))]]}
    *_, last = denoise(Table(table), Canvas.from_prompts([[]], 2, MASK), config, **known)
    assert last.canvas.tokens.tolist() == [[0, 0]]
    assert last.nfe.tolist() == [1]
    best = SamplingConfig(gen_length=2, block_length=2, steps=1, constraint_search="viterbi")
    table[1, 1] = 9.0  # the best pair is now bb
    *_, last = denoise(Table(table), Canvas.from_prompts([[]], 2, MASK), best, **known)
    assert last.canvas.tokens.tolist() == [[1, 1]]


def test_what_does_not_fit_is_refused_before_the_first_pass():
    from dlm.sampling.constraints import Constraint

    model = Table(torch.zeros(1, 8))
    constraints = [[Constraint(compile_pattern(LETTERS, "(abc){9}", (END,)), (0, 1))]]
    with pytest.raises(ValueError, match="fits 2 tokens"):
        next(denoise(model, Canvas.from_prompts([[]], 2, MASK), SamplingConfig(), constraints=constraints))
    assert model.calls == []


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "a", "choices": ("b",)},
        {"choices": ()},
        {"choices": ("a", "")},
        {"regex": 3},
        {"regex": "a", "constraint_search": "viterbi", "temperature": 1.0},
        {"constraint_search": "best"},
    ],
)
def test_contradictions_are_refused(options):
    with pytest.raises(ValueError):
        SamplingConfig(**options)


# --- the shipped model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return dlm.load()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "friends": {"enum": ["many", "few", "none"]},
    },
    "required": ["name", "age", "friends"],
}


@pytest.mark.parametrize("steps", [40, 10])
def test_json_always_parses(shipped, steps):
    model, tokenizer = shipped
    config = SamplingConfig(
        gen_length=40, block_length=40, steps=steps, temperature=1.0, json_schema=json.dumps(SCHEMA)
    )
    out = generate(model, ["A little girl:"] * 4, config, tokenizer=tokenizer)
    for row in out.sequences:
        found = json.loads(tokenizer.decode(row, skip_special_tokens=True))
        assert set(found) == {"name", "age", "friends"}
        assert isinstance(found["age"], int)


def test_choices_of_which_one_begins_another(shipped):
    model, tokenizer = shipped
    choices = ("cat", "cat and dog", "cat and", "caterpillar")
    for seed in range(4):
        config = SamplingConfig(gen_length=6, temperature=1.5, choices=choices, seed=seed)
        out = generate(model, "There was a", config, tokenizer=tokenizer)
        assert tokenizer.decode(out.sequences[0], skip_special_tokens=True).strip() in choices
    assert re.fullmatch(choice_pattern(["a.b", "c"]), "a.b")
    assert not re.fullmatch(choice_pattern(["a.b", "c"]), "axb")


def test_blanks_with_patterns(shipped):
    from dlm.sampling.constraints import constraints_of_blanks
    from dlm.tokenizer import blanks

    model, tokenizer = shipped
    mask = tokenizer.mask_token_id
    ids, found = blanks(tokenizer, "Tom is ___{4:/[0-9]+/} years old and ___{3}.", 4, mask)
    assert [(length, pattern) for _, length, pattern in found] == [(4, " (?:[0-9]+)"), (3, None)]
    eos = (tokenizer.eos_token_id,)
    constraints = [constraints_of_blanks(tokenizer, found, eos)]
    canvas = Canvas.from_templates([ids], mask)
    *_, last = denoise(model, canvas, SamplingConfig(), eos_token_ids=eos, constraints=constraints)
    text = tokenizer.decode(last.canvas.tokens[0], skip_special_tokens=True)
    assert re.match(r"Tom is [0-9]+ years old and", text), text


def test_a_row_beside_a_constrained_one_is_not_edited_into_what_is_suppressed():
    """The most probable token that an edit writes forgot suppress_eos where another row of the batch was bound."""
    table = torch.zeros(6, 8)
    table[:, END] = 9.0
    config = SamplingConfig(
        gen_length=3, block_length=3, revise="edit", edit_threshold=0.0, suppress_eos=True, temperature=0.7
    )
    rules = [[], [Constraint(compile_pattern(LETTERS, "(ab)*", (END,)), (1, 2, 3))]]
    for rows, wanted in (([[0], [1]], rules), ([[0]], None)):
        canvas = Canvas.from_prompts(rows, 3, MASK)
        for state in denoise(Table(table), canvas, config, eos_token_ids=(END,), constraints=wanted):
            assert END not in state.canvas.tokens[0]


def test_a_row_beside_a_constrained_one_is_as_sure_as_alone():
    """Its confidence counted what suppress_eos takes out of the prediction, and it committed in another order."""
    table = torch.zeros(6, 8, dtype=torch.float64)
    table[1, 0], table[1, END] = 2.0, 3.0  # the surer place only where end-of-text is not counted
    table[2, 0] = 2.0
    config = SamplingConfig(gen_length=3, block_length=3, suppress_eos=True)
    rules = [[], [Constraint(compile_pattern(LETTERS, "(ab)*", (END,)), (1, 2, 3))]]
    first = []
    for rows, wanted in (([[0], [1]], rules), ([[0]], None)):
        canvas = Canvas.from_prompts(rows, 3, MASK)
        state = next(denoise(Table(table), canvas, config, eos_token_ids=(END,), constraints=wanted))
        first.append((state.committed[0].tolist()[:4], state.confidence[0].tolist()[:4]))
    assert first[0] == first[1] and first[0][0] == [False, True, False, False]


def test_a_pattern_of_a_megabyte_is_refused_unread():
    """Python's parser took twelve seconds for it, and held the whole process."""
    with pytest.raises(ValueError, match="it has 1,000,001 characters, above 65,536"):
        SamplingConfig(regex="a|" * 500_000 + "b")


@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){25}", "(a|b)*a(a|b){14}", "(?:a{1000}){1000}"])
def test_a_pattern_with_too_large_an_automaton_is_refused(pattern, monkeypatch):
    """Each of these took minutes and gigabytes, in a server while all other requests waited."""
    monkeypatch.setattr(pattern_worker, "SECONDS", 2.0)
    with pytest.raises(ValueError, match=r"regex is .*its automaton (takes more than|has 32,772 states)") as error:
        SamplingConfig(regex=pattern)
    assert "\n" not in str(error.value)
    assert SamplingConfig(regex="[a-c]{3}x").regex  # and the next one is read


def test_a_schema_that_doubles_with_every_reference_is_refused():
    definitions = {"a0": {"type": "null"}}
    for level in range(1, 40):
        both = {"$ref": f"#/$defs/a{level - 1}"}
        definitions[f"a{level}"] = {"type": "object", "properties": {"x": both, "y": both}}
    with pytest.raises(ValueError, match="more than 10,000 parts once its references"):
        schema_pattern(json.dumps({"$defs": definitions, "$ref": "#/$defs/a39"}))
    for levels in (200, 900):  # was a TypeError, a RecursionError
        deep = '{"type": "array", "items": ' * levels + '{"type": "null"}' + "}" * levels
        with pytest.raises(ValueError, match=r"nested too deeply|has no pattern"):
            schema_pattern(deep)

"""The judge's numbers against hand calculations; judges of other kinds and vocabularies."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import dlm
from dlm.checkpoints.files import TWIN
from dlm.evaluation.judge import open_judge
from dlm.models.attention import causal
from dlm.tokenizer import train_tokenizer
from tests.helpers import commandline
from tests.helpers.commandline import STORY, make_checkpoint

tokenizer = commandline.tokenizer  # a fixture
PAIRS = [
    ("Once upon a time", " there was a fox."),
    ("The cat", " sat on the mat, and then it slept."),
    ("", "She walked"),
]


@pytest.fixture(scope="module")
def twin(tmp_path_factory, tokenizer):
    """A tiny autoregressive checkpoint in dlm's layout."""
    folder = make_checkpoint(tmp_path_factory.mktemp("twin") / "twin", tokenizer, objective="autoregressive")
    return folder


def gpt2(folder, tokenizer, **changes):
    """A tiny causal model of another family, with a tokenizer or without one."""
    torch.manual_seed(1)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)} | changes
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(logits_of, prompt, answer):
    """exp of the mean -log p of the answer's tokens, one softmax at a time."""
    ids, total = prompt + answer, 0.0
    for place in range(max(len(prompt), 1), len(ids)):
        row = logits_of(torch.tensor([ids[:place]]))[0, -1].double()
        total -= float(row[ids[place]] - row.exp().sum().log())
    count = len(ids) - max(len(prompt), 1)
    return math.exp(total / count), count


def test_perplexity_equals_a_hand_calculation(twin, tokenizer):
    judge = open_judge(str(twin), device="cpu")
    model, _ = dlm.load(twin, device="cpu")
    scores = judge.score(PAIRS)
    for (prompt, answer), score in zip(PAIRS, scores, strict=True):
        first, rest = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        wanted, count = by_hand(lambda ids: model.predict(ids, visible=causal), first, rest)
        assert score.tokens == count and abs(score.perplexity - wanted) < 1e-5 * wanted
    assert judge.facts["kind"] == "llada" and judge.facts["revision"].startswith("sha256:")


def test_a_judge_of_another_family_and_vocabulary(tmp_path):
    other = train_tokenizer([STORY * 3], 300)  # other merges than the model's own tokenizer
    other.save_pretrained(gpt2(tmp_path / "gpt2", other))
    judge = open_judge(str(tmp_path / "gpt2"), device="cpu")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    for (prompt, answer), score in zip(PAIRS, judge.score(PAIRS), strict=True):
        first, rest = other(prompt)["input_ids"], other(answer, add_special_tokens=False)["input_ids"]
        wanted, count = by_hand(lambda ids: model(ids).logits, first, rest)
        assert score.tokens == count and abs(score.perplexity - wanted) < 1e-5 * wanted


def test_answers_are_batched_and_cached(twin):
    judge = open_judge(str(twin), device="cpu")
    alone = [judge.score([pair])[0] for pair in PAIRS]
    fresh, calls = open_judge(str(twin), device="cpu"), []
    logits = fresh.logits
    fresh.logits = lambda *tensors: calls.append(tensors[0].shape) or logits(*tensors)
    together = fresh.score([*PAIRS, PAIRS[0]])
    assert [shape[0] for shape in calls] == [3]  # one batch, and the fourth pair is the first again
    assert fresh.score(PAIRS) == together[:3] and len(calls) == 1
    for a, b in zip(alone, together, strict=False):
        assert a.nll == pytest.approx(b.nll, abs=1e-5) and a.tokens == b.tokens
    assert together[3] == together[0]


def test_an_answer_without_tokens_has_no_perplexity(twin):
    [score] = open_judge(str(twin), device="cpu").score([("Once", "")])
    assert (score.nll, score.tokens, score.perplexity) == (0.0, 0, None)


def test_a_chat_template_is_context_and_not_scored(twin, tokenizer):
    judge = open_judge(str(twin), device="cpu")
    plain, chat = judge.score([PAIRS[0]])[0], judge.score([PAIRS[0]], chat=True)[0]
    assert chat.tokens == plain.tokens and chat.nll != plain.nll
    turn = [{"role": "user", "content": PAIRS[0][0]}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    model, _ = dlm.load(twin, device="cpu")
    answer = tokenizer(PAIRS[0][1], add_special_tokens=False)["input_ids"]
    wanted, _ = by_hand(lambda row: model.predict(row, visible=causal), ids, answer)
    assert chat.perplexity == pytest.approx(wanted, rel=1e-5)


def test_a_text_longer_than_the_judge_loses_its_beginning(tmp_path, tokenizer):
    tokenizer.save_pretrained(gpt2(tmp_path / "short", tokenizer, n_positions=16))
    judge = open_judge(str(tmp_path / "short"), device="cpu")
    [score] = judge.score([("Once upon a time there was a fox. " * 9, " The cat.")])
    assert score.tokens == len(tokenizer(" The cat.", add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match="reads 16"):
        judge.score([("", "Once upon a time there was a little fox. " * 9)])


def test_refusals(tmp_path, twin, tokenizer):
    bare = gpt2(tmp_path / "bare", tokenizer)
    assert open_judge(str(bare), device="cpu", tokenizer=tokenizer, vocab_size=len(tokenizer)).score(PAIRS)
    with pytest.raises(ValueError, match="no tokenizer, and its vocabulary of"):
        open_judge(str(bare), device="cpu", tokenizer=tokenizer, vocab_size=999)
    diffusion = make_checkpoint(tmp_path / "diffusion", tokenizer)
    with pytest.raises(ValueError, match="must be autoregressive"):
        open_judge(str(diffusion), device="cpu")


@pytest.mark.skipif(not TWIN.is_dir(), reason="there is no shipped model in this tree")
def test_the_judge_that_ships_knows_a_story_from_its_words():
    judge = open_judge(str(TWIN), device="cpu")
    prompt, words = "Once upon a time there was a little fox", " who lived by the sea with her mother."
    story, shuffled = judge.score([(prompt, words), (prompt, " " + " ".join(sorted(words.split())))])
    assert story.perplexity < 20 < 100 < shuffled.perplexity
    assert judge.facts["id"] == TWIN.name and judge.facts["revision"].startswith("sha256:")

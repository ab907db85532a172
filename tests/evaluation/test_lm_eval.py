"""The lm_eval model: requests answered by hand on a model that knows how often tokens are, and nothing else."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import dlm
from dlm.evaluation.lm_eval import Answers, register, until
from dlm.tokenizer import encode_prompt
from eval.harness import main
from tests.helpers.commandline import make_checkpoint, tokenizer  # noqa: F401

EXACT = {"estimator": "chain", "draws": 64}  # every place is met: no error


@pytest.fixture(scope="module")
def words(tokenizer):  # noqa: F811
    """A probability of each token: " cat" 0.4, "b" 0.3, " mat" 0.1, and the others share the rest."""
    [cat], [mat], [b] = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" cat", " mat", "b"))
    p = torch.full((len(tokenizer),), 0.2 / (len(tokenizer) - 3), dtype=torch.float64)
    p[cat], p[b], p[mat] = 0.4, 0.3, 0.1
    return p


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory, tokenizer, words):  # noqa: F811
    """A checkpoint whose layers add nothing to a constant, so that its prediction is `words` at every place."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "unigrams", tokenizer, max_sequence_length=24)
    model, _ = dlm.load(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_()
            if "wte" in name or "ln_f" in name:
                weight.fill_(1.0)
        model.model.transformer.ff_out.weight.copy_((words.log() / 32).float()[:, None].expand(-1, 32))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(unigrams):
    return Answers(unigrams, batch_size=3, **EXACT)


def ask(*args):
    return SimpleNamespace(args=args)


def cost(tokenizer, words, text):  # noqa: F811
    return -float(words[tokenizer(text, add_special_tokens=False)["input_ids"]].log().sum())


def test_loglikelihood_by_hand(model, tokenizer, words):  # noqa: F811
    options = [" cat", " mat", " cat cat", " the"]
    found = model.loglikelihood([ask("The cat sat on the", option) for option in options])
    assert [one for one, _ in found] == pytest.approx([-cost(tokenizer, words, text) for text in options], rel=1e-5)
    assert [same for _, same in found] == [True, False, True, False]
    spaces = model.loglikelihood([ask("The cat sat on the ", "cat"), ask("", " cat")])
    assert [one for one, _ in spaces] == pytest.approx([math.log(0.4)] * 2, rel=1e-5), "the space belongs to the word"


def test_loglikelihood_rolling_by_hand(model, tokenizer, words):  # noqa: F811
    long = " cat mat" * 20  # two windows of 24
    found = model.loglikelihood_rolling([ask(" cat cat"), ask(long), ask("The fox")])
    wanted = [2 * math.log(0.4), 20 * math.log(0.4 * 0.1), -cost(tokenizer, words, "The fox")]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_generate_until_by_hand(model):
    plain, stopped = {"until": ["x"], "max_gen_toks": 3}, {"until": " cat cat", "max_gen_toks": 4}
    requests = [ask("The", plain), ask("A fox and a", stopped), ask("", plain), ask("Once", {"max_new_tokens": 2})]
    assert model.generate_until(requests) == [" cat cat cat", "", " cat cat cat", " cat cat"]
    assert until("ab.cd\nef", ["\n", "."]) == "ab" and until("abc", ["", "x"]) == "abc"


def test_long_options_and_prompts_are_cut_from_the_left_and_counted(unigrams, tokenizer, words):  # noqa: F811
    model = Answers(unigrams, **EXACT)
    [(long, _)] = model.loglikelihood([ask("The", " mat" * 30)])
    assert long == pytest.approx(24 * math.log(0.1), rel=1e-5), "what fits is scored, never zero"
    [(short, _)] = model.loglikelihood([ask(" fox" * 40, " cat")])
    assert short == pytest.approx(math.log(0.4), rel=1e-5)
    model.generate_until([ask(" mat" * 30, {"max_gen_toks": 5})])
    assert model.truncated == {"options": 2, "prompts": 1} == model.get_model_info()["truncated"]


def test_answers_do_not_depend_on_the_batch(tmp_path_factory, tokenizer):  # noqa: F811
    """Noise and seeds come from the text: any order, any batch, and options of one question share them."""
    folder = str(make_checkpoint(tmp_path_factory.mktemp("random") / "tiny", tokenizer))
    settings = {"draws": 4, "temperature": 0.9, "method": "dual", "block_length": 4}
    many, one = (Answers(folder, batch_size=size, **settings) for size in (5, 1))
    pairs = [ask(f"The cat {i}", option) for i in range(3) for option in (" sat on", " slept, and")]
    forward = many.loglikelihood(pairs)
    back = one.loglikelihood(pairs[::-1])[::-1]
    assert [a for a, _ in forward] == pytest.approx([b for b, _ in back], rel=1e-5)
    asked = [ask(f"Once {i}", {"max_gen_toks": 6}) for i in range(4)]
    assert many.generate_until(asked) == one.generate_until(asked[::-1])[::-1]
    cold = [ask("Once 0", {"max_gen_toks": 6, "do_sample": False})]
    assert one.generate_until(cold) == many.generate_until(cold)


def test_bad_arguments_are_refused(unigrams):
    with pytest.raises(ValueError, match="did you mean 'method'"):
        Answers(unigrams, metod="dual")
    with pytest.raises(ValueError, match="reads 2 to 24"):
        Answers(unigrams, max_length=100)
    with pytest.raises(ValueError, match="did you mean 'dual'"):
        Answers(unigrams, method="daul")


# ------------------------------------------------------------------------------------------------------ with lm_eval

TASKS = {
    "toy_choice": (
        {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
         "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
        [{"question": "on the", "choices": [" cat", " mat"], "gold": 0},
         {"question": "on the", "choices": [" mat", " cat"], "gold": 0},
         {"question": "on the", "choices": [" fox fox", " mat"], "gold": 1},
         {"question": "on the", "choices": ["b", " cat"], "gold": 1}],
    ),
    "toy_rolling": (
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
         "metric_list": [{"metric": "bits_per_byte"}]},
        [{"text": " cat cat"}, {"text": " mat"}],
    ),
    "toy_generate": (
        {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
         "generation_kwargs": {"until": ["x"], "max_gen_toks": 2}, "metric_list": [{"metric": "exact_match"}]},
        [{"question": "The", "answer": " cat cat"}, {"question": "A", "answer": " mat"}],
    ),
}  # fmt: skip


def test_lm_eval_runs_local_tasks_of_each_kind(unigrams, tmp_path, monkeypatch):
    """From a folder, without a network: 3 of 4 choices, the bits of three tokens over 12 bytes, 1 of 2 answers."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, (fields, rows) in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test", "num_fewshot": 0} | fields  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    register()
    results = simple_evaluate(
        "dlm", f"pretrained={unigrams},estimator=chain,draws=64", tasks=list(TASKS), batch_size=2, device="cuda:0",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]  # fmt: skip
    assert results["toy_choice"]["acc,none"] == 0.75
    assert results["toy_rolling"]["bits_per_byte,none"] == pytest.approx(-math.log2(0.4 * 0.4 * 0.1) / 12, rel=1e-4)
    assert results["toy_generate"]["exact_match,none"] == 0.5


def test_the_command_is_lm_evals_with_our_model(monkeypatch):
    """Options reach lm_eval's own parser, with `--model dlm` unless another one is named."""
    cli = pytest.importorskip("lm_eval._cli")
    seen = []
    monkeypatch.setattr(cli.HarnessCLI, "execute", lambda self, args: seen.append((args.model, args.tasks)))
    before = list(sys.argv)
    assert main(["--tasks", "a,b", "--model_args", "method=dual"]) == 0
    assert main(["run", "--model", "hf", "--tasks", "a"]) == 0
    assert seen == [("dlm", ["a", "b"]), ("hf", ["a"])] and sys.argv == before


def test_without_lm_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["--tasks", "x"]) == 2
    assert "pip install 'dlm[eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shipped():
    return Answers(device="cpu", max_length=64, batch_size=3)


def asked(context, **settings):
    return SimpleNamespace(args=(context, {"until": ["\n\n"], **settings}))


def test_a_continuation_that_merges_into_the_context_is_scored(shipped):
    """ "He said a" + "nswer" is one token less than its parts: nothing was scored, so that this option always won."""
    options = ("nswer", "zebra", "zzzzqqqq")
    requests = [SimpleNamespace(args=("He said a", option)) for option in options]
    scores = [score for score, _ in shipped.loglikelihood(requests, disable_tqdm=True)]
    assert max(scores) < -0.5 and scores[0] == max(scores)
    example = shipped._example("He said a", "nswer")
    ids = encode_prompt(shipped.tokenizer, "He said answer", shipped.mask)
    assert example.tokens.tolist() == ids and example.target.any()


def test_repeats_of_a_request_differ_and_come_again(shipped):
    """lm_eval's `repeats: k` gave k copies of one sample."""
    sampled = asked("The dog", do_sample=True, temperature=1.0, max_gen_toks=8)
    first = shipped.generate_until([sampled] * 4 + [asked("A cat", max_gen_toks=8)], disable_tqdm=True)
    assert len(set(first[:4])) == 4
    assert shipped.generate_until([sampled] * 4, disable_tqdm=True) == first[:4]
    assert shipped.generate_until([sampled], disable_tqdm=True) == first[:1]


def test_the_prompt_keeps_room_and_its_beginning(shipped):
    """max_gen_toks at the model's length left one token of the prompt, and not its begin-of-text."""
    config, _ = shipped._settings({"max_gen_toks": 1024}, 20)
    assert config.gen_length == 44
    config, _ = shipped._settings({"max_gen_toks": 1024}, 500)
    assert config.gen_length == 32
    begin = shipped.tokenizer.bos_token_id
    assert shipped._cut([begin, *range(100, 200)], 32) == [begin, *range(169, 200)]


def test_do_sample_without_a_temperature_samples(shipped):
    assert shipped._settings({"do_sample": True}, 5)[0].temperature == 1.0
    assert shipped._settings({"do_sample": False, "temperature": 0.7}, 5)[0].temperature == 0.0

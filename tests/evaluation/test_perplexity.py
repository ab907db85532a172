"""`dlm eval perplexity`: the numbers by hand, the same whatever the batch and the processes, and across a kill."""

import json
import math
import subprocess
import sys

import pytest
import torch

import dlm
from dlm.data.windows import CorpusConfig, load_corpus
from dlm.evaluation import perplexity
from dlm.models.attention import causal
from dlm.objectives.likelihood import Bound, LikelihoodConfig, bound
from eval.perplexity import main
from tests.helpers.commandline import ENVIRONMENT, ROOT, STORY, checkpoint, make_checkpoint, tokenizer  # noqa: F401

TEXTS = [STORY.strip(), "The cat slept. The cat slept.", "A fox", STORY[40:90].strip()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def twin(tmp_path_factory, tokenizer):  # noqa: F811
    """A checkpoint whose config.json says that it predicts the next token."""
    folder = make_checkpoint(tmp_path_factory.mktemp("twin") / "tiny-twin", tokenizer, objective="autoregressive")
    return folder


def results(out):
    return json.loads(out.read_text())["results"]


def test_exact_by_hand_and_bits_per_byte(data, twin, tmp_path, tokenizer, capsys):  # noqa: F811
    assert main(["--data", str(data), "--model", str(twin), "--out", str(tmp_path / "o.json")]) == 0
    [row] = results(tmp_path / "o.json")
    model, _ = dlm.load(twin)
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            ce = torch.nn.functional.cross_entropy(
                model.predict(torch.tensor([ids]), visible=causal)[0, :-1], torch.tensor(ids[1:]), reduction="sum"
            )
        nats, count = nats + float(ce), count + len(ids) - 1
    size = sum(len(text.encode()) for text in TEXTS)
    assert (row["tokens"], row["bytes"], row["exact"], row["evaluations"]) == (count, size, True, 4)
    assert row["nats_per_token"]["value"] == pytest.approx(nats / count, rel=1e-5)
    assert row["perplexity"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert row["bits_per_byte"]["value"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert row["nats_per_token"]["error"] == 0 < row["nats_per_token"]["sampling_error"]
    made = json.loads((tmp_path / "o.json").read_text())
    assert {"command", "commit", "hardware", "versions", "settings"} <= made.keys()
    out = capsys.readouterr().out
    assert "tiny-twin" in out and "≤" not in out and not (tmp_path / "o.json.parts").exists()


def test_windows_without_a_beginning_lose_their_first_token(data, twin, tmp_path):
    assert main(["--data", str(data), "--model", str(twin), "--bos", "none", "--eos", "none", "--length", "8",
                 "--out", str(tmp_path / "o.json")]) == 0  # fmt: skip
    [row] = results(tmp_path / "o.json")
    assert row["bytes"] < sum(len(text.encode()) for text in TEXTS) and row["bos"] == "none"


def test_the_same_numbers_whatever_the_batch_and_the_processes(data, twin, checkpoint, tmp_path):  # noqa: F811
    words = ["--data", str(data), "--model", str(checkpoint), str(twin), "--length", "24", "--draws", "4",
             "--device", "cpu", "--out"]  # fmt: skip
    assert main([*words, str(tmp_path / "one.json"), "--batch-size", "3"]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              str(ROOT / "eval" / "perplexity.py"), *words, str(tmp_path / "two.json")]  # fmt: skip
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny-twin") == 1, "one process prints"
    for one, two in zip(results(tmp_path / "one.json"), results(tmp_path / "two.json"), strict=True):
        for name in ("nats_per_token", "perplexity", "bits_per_byte"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
        assert (one["tokens"], one["evaluations"]) == (two["tokens"], two["evaluations"])


def test_a_killed_run_goes_on(data, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is done twice, the numbers are those of a run in one piece, and a line cut short is done again."""
    words = ["--data", str(data), "--model", str(checkpoint), "--length", "8", "--batch-size", "2", "--out"]
    assert main([*words, str(tmp_path / "whole.json")]) == 0
    real, windows = bound, []

    def dies(model, examples, *rest, **named):
        windows.extend(example.index for example in examples)
        if len(windows) == 8:
            raise KeyboardInterrupt
        return real(model, examples, *rest, **named)

    monkeypatch.setattr(perplexity, "bound", dies)
    out = tmp_path / "again.json"
    assert main([*words, str(out)]) == 130
    [part] = (tmp_path / "again.json.parts").glob("*/*.jsonl")
    part.write_text(part.read_text().rstrip()[:-9])  # the kill came in the middle of a line
    assert main([*words, str(out)]) == 0
    [whole], [again] = results(tmp_path / "whole.json"), results(out)
    assert again["nats_per_token"] == whole["nats_per_token"] and again["evaluations"] == whole["evaluations"]
    assert sorted(windows) == sorted([*range(whole["windows"]), *windows[5:8]]), "one line and the batch that died"


def test_rounds_until_the_error_is_small_enough(data, checkpoint):  # noqa: F811
    scorer = perplexity.open_scorer(checkpoint)
    corpus = load_corpus(str(data), scorer.tokenizer, CorpusConfig(32))
    config = LikelihoodConfig(draws=2)
    first = perplexity.summarise(perplexity.score_corpus(scorer, corpus, config), corpus, 1, 0.0)
    bounds = perplexity.score_corpus(scorer, corpus, config, target_error=first.error / 2)
    more = perplexity.summarise(bounds, corpus, 1, 0.0)
    assert more.error <= first.error / 2 and more.evaluations % first.evaluations == 0
    assert 0 < abs(more.nats_per_token - first.nats_per_token) < 5 * first.error, "each round has noise of its own"


def test_rounds_are_merged_by_hand():
    assert perplexity.merge([Bound(1.0, 3.0, 5, 7), Bound(2.0, 4.0, 6, 7)]) == Bound(1.5, 2.5, 11, 7)


def test_one_document_has_no_sampling_error_and_says_why(tmp_path, checkpoint, capsys):  # noqa: F811
    """Fault: `nan` stood in the table, and NaN in the file, of a text of three lines."""
    text = tmp_path / f"three{'-' * 40}.txt"
    text.write_text("The cat sat on the mat.\nOnce there was a fox.\nShe walked.\n")
    words = ["--data", str(text), "--model", str(checkpoint), "--draws", "2", "--out", str(tmp_path / "o.json")]
    assert main(words) == 0
    out, error = capsys.readouterr()
    head, row = out.splitlines()
    assert len(head) == len(row) and "nan" not in out and row.split()[-4] == "-"
    assert f"no sampling error for {text.name}: it is one document" in error
    [result] = results(tmp_path / "o.json")
    assert result["nats_per_token"]["sampling_error"] is None and "NaN" not in (tmp_path / "o.json").read_text()


def test_bad_input_is_one_line(data, tmp_path, capsys):
    for words, message in (
        (["--data", "nothing.txt"], "no such file"),
        (["--data", str(data), "--model", str(tmp_path)], "no config.json"),
        (["--data", str(data), "--estimator", "cuont"], "did you mean 'count'"),
        (["--data", str(data), "--detokenizer", "x"], "not known"),
        (["--data", str(data), "--out", str(tmp_path / "no" / "o.json")], "there is no folder"),
        (["--data", str(data), "--target-error", "0"], "above 0"),
        (["--dtaa", str(data)], "--data"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0, error


def test_the_same_in_another_type(data, twin, tmp_path, capsys):
    out = tmp_path / "two.json"
    assert main(["--data", str(data), "--model", str(twin), "--also-dtype", "bfloat16", "--out", str(out)]) == 0
    first, second = results(out)
    assert (first["dtype"], second["dtype"]) == ("float32", "bfloat16")
    change = second["nats_per_token"]["value"] - first["nats_per_token"]["value"]
    assert second["change"] == change and 0 < abs(change) < 0.05
    assert "bfloat16 for float32: " in capsys.readouterr().out

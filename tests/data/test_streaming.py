"""Streamed data: what is read, its order, where a run goes on, mixtures, and that it trains as data on disk does."""

import json
import shutil

import numpy as np
import pytest
import torch

from dlm.data.conversations import ChatFormat, chat_source
from dlm.data.documents import load_documents
from dlm.data.examples import Examples
from dlm.data.streaming import StreamedExamples, StreamedSource, text_source
from dlm.tokenizer import train_tokenizer
from dlm.training.state import checkpoints
from dlm.training.trainer import fit
from tests.helpers.ranks import MASK, settings, streamed_data, tiny_data, tiny_model
from tests.helpers.training import fresh_accelerate, weights
from train import pretrain, sft

assert fresh_accelerate  # a fixture for every test here

TEXTS = [f"the cat {number} sat on the mat " * (1 + number % 5) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def memory(name, count, weight=1.0, start=0):
    rows = [np.full(1 + number % 6, start + number) for number in range(count)]

    def read(skip):
        return ((number, rows[number], np.ones(len(rows[number]), bool)) for number in range(skip, count))

    return StreamedSource(name, read, weight)


def met(data, stream, rows):
    """(visit, index, tokens) of every example of the next rows."""
    return [(*pair, tuple(data[pair[1]].tokens)) for _ in range(rows) for row in stream.take(1) for pair in row]


@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_has_every_example_once_as_data_on_disk_has(tmp_path, tokenizer, packing):
    """Two files one after another, cut and packed; windows of 7."""
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    paths[0].write_text("\n<|endoftext|>\n".join(TEXTS[:25]))
    paths[1].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[25:]))
    whole = Examples([load_documents(path, tokenizer, cache=tmp_path / "cache") for path in paths], 16)
    data = StreamedExamples([text_source(paths, tokenizer, "text", "train")], 16, 7)
    found = met(data, data.stream(3, packing), 2 * len(whole) if not packing else len(whole))
    first = [(index, tokens) for visit, index, tokens in found if visit == 0]
    assert sorted(first) == [(index, tuple(whole[index].tokens)) for index in range(len(whole))]
    assert len({pair[:2] for pair in found}) == len(found) and max(visit for visit, _, _ in found) >= 1
    assert [index for index, _ in first] != sorted(index for index, _ in first)
    assert all(abs(place - index) < 14 for place, (index, _) in enumerate(first))  # no further than its window
    assert found != met(data, data.stream(4, packing), 10)[: len(found)]


def test_it_goes_on_from_any_position():
    data = StreamedExamples([memory("a", 11, 2.0), memory("b", 5, 1.0, 100)], 4, 6)
    stream = data.stream(0)
    rows = []
    for _ in range(40):
        rows.append((json.dumps(stream.position), met(data, stream, 1)))
    for number, (position, _) in enumerate(rows[:-5]):
        again = data.stream(0, position=json.loads(position))
        assert met(data, again, 5) == [pair for _, row in rows[number : number + 5] for pair in row]


def test_every_window_has_an_order_of_its_own():
    """A source of just one window: each pass is a window, with the same examples in another order."""
    data = StreamedExamples([memory("a", 12)], 8, 12)
    passes = [[index for _, index, _ in met(data, stream, 12)] for stream in [data.stream(0, False)] for _ in range(3)]
    assert [sorted(one) for one in passes] == [list(range(12))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_mixture_has_its_shares_at_every_moment():
    data = StreamedExamples([memory("a", 30, 3.0), memory("b", 4, 1.0, 100)], 8, 10)
    found = met(data, data.stream(0, packing=False), 200)
    small = [(visit, index) for visit, index, tokens in found if tokens[0] >= 100]
    assert len(small) == 50 and len(set(small)) == 50
    for window in range(20):
        share = sum(tokens[0] >= 100 for _, _, tokens in found[window * 10 : window * 10 + 10])
        assert 2 <= share <= 3
    assert {index % 2 for _, index in small} == {1}


def test_what_cannot_be_streamed_is_one_line(tmp_path, tokenizer, capsys):
    with pytest.raises(ValueError, match="empty: no example in all of it"):
        StreamedExamples([memory("empty", 0)], 4, 6).stream(0).take(1)
    with pytest.raises(ValueError, match="shuffle_window is 0"):
        StreamedExamples([memory("a", 3)], 4, 0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    source = chat_source([path], tokenizer, ChatFormat(chat=False, length=16), "train")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        StreamedExamples([source], 16, 4).stream(0).take(1)
    argv = ["--data", str(path), "--streaming", "--output", str(tmp_path / "run")]
    assert pretrain.main(argv) == 2
    assert "give one with --tokenizer" in capsys.readouterr().err


def test_a_resumed_run_is_bitwise_the_same(tmp_path):
    def train(name, data=None, **changes):
        model = tiny_model()
        config = settings(tmp_path / name, max_steps=9, checkpoint_every=1, keep_last=9, optimizer="adamw")
        fit(model, None, data or streamed_data(), None, config, mask_id=MASK, report=lambda line: None, **changes)
        return weights(model)

    whole = train("whole")
    train("parts")
    for step, folder in checkpoints(tmp_path / "parts"):
        if step > 4:  # as if killed after step 4
            shutil.rmtree(folder)
    assert torch.equal(train("parts", resume=True), whole)
    with pytest.raises(ValueError, match=r"windows of 7, the data now gives .* windows of 8"):
        train("parts", streamed_data(window=8), resume=True)
    with pytest.raises(ValueError, match=r"the data now gives .* examples"):
        train("parts", tiny_data(), resume=True)


def test_a_fine_tune_on_streamed_conversations_reports_what_it_read(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "base")
    model = tiny_model()
    config = model.config.__class__(**{**model.config.to_dict(), "vocab_size": len(tokenizer), "embedding_size": None,
        "mask_token_id": tokenizer.mask_token_id, "dtype": None})  # fmt: skip
    model.__class__(config).save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {n}?", "response": "one " * (1 + n % 4)} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = f"{tmp_path / 'a.jsonl'}:0.75,{tmp_path / 'b.jsonl'}:0.25"
    argv = ["--model", tmp_path / "base", "--data", mixture, "--streaming", "--shuffle-window", "8",
        "--format", "plain", "--max-steps", "3", "--batch-size", "4", "--precision", "no",
        "--output", tmp_path / "run"]  # fmt: skip
    assert sft.main([str(word) for word in argv]) == 0
    told = capsys.readouterr().out
    assert "streamed in windows of 8 examples" in told and "rows, 0 truncated" in told
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["epochs"] is None

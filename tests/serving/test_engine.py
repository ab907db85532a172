"""The engine: what a request gets is what it gets alone, and one request's trouble is not another's."""

import asyncio
import dataclasses
import random
import threading
import time

import pytest
import torch

import dlm
from dlm.sampling.growth import DELETE, EXPAND
from dlm.sampling.rows import Batch
from dlm.serving.engine import Engine
from dlm.serving.requests import Cancelled, Closing, Expired, QueueFull, Request, RowFailed
from dlm.serving.text import FinalText
from dlm.tokenizer import EOT, train_tokenizer
from tests.helpers.commandline import STORY, make_checkpoint


def canvas_ids(opened, prompt, length):
    return opened.tokenizer(prompt)["input_ids"] + [opened.mask_id] * length


def request(opened, prompt="Once upon", length=8, **settings):
    own = {
        "method": "block_causal",
        "seed": 1,
        **{k: v for k, v in settings.items() if k in dlm.SamplingConfig.__match_args__},
    }
    more = {name: value for name, value in settings.items() if name not in own}
    return Request(canvas_ids(opened, prompt, length), dlm.SamplingConfig(**own), **more)


def random_request(opened, rng):
    words = STORY.split()
    prompt = " ".join(rng.choice(words) for _ in range(rng.randint(0, 12)))
    length = rng.randint(1, 14)
    more = rng.choice([{"grow": "block"}, {"whole_blocks": True}, {"align": "prompt"}, {}, {}, {}])
    config = dlm.SamplingConfig(
        method=rng.choice(["none", "block_causal"]),
        commit=rng.choice(["quota", "threshold", "factor"]),
        threshold=0.02,
        confidence=rng.choice([None, "margin", "random"]) if rng.random() < 0.3 else None,
        temperature=rng.choice([0.0, 0.8]),
        cfg_scale=rng.choice([0.0, 0.0, 0.0, 0.7]),
        stop_at_eos=rng.random() < 0.5,
        suppress_eos=rng.random() < 0.2,
        seed=rng.randrange(10**6),
        **more,
    )
    return prompt, length, config


def make_random(opened, seed, count):
    rng, made = random.Random(seed), []
    while len(made) < count:
        try:
            made.append(random_request(opened, rng))
        except ValueError:  # settings that contradict each other
            continue
    return made


def alone(opened, prompt, length, config):
    """The ids and passes of `dlm.generate`, and the confidences that `dlm.denoise` reports."""
    canvas = dlm.Canvas.from_templates([canvas_ids(opened, prompt, length)], opened.mask_id)
    sure, state = {}, None
    for state in dlm.denoise(
        opened.predictor, canvas, config, vocab_size=len(opened.tokenizer), eos_token_ids=opened.end_ids
    ):
        for slot in state.committed[0].nonzero()[:, 0].tolist():
            sure[slot] = float(state.confidence[0, slot])
    out = dlm.generate(opened.predictor, canvas, config, tokenizer=opened.tokenizer)
    ids = out.sequences[0].tolist()
    end_of_turn = opened.tokenizer.convert_tokens_to_ids(EOT)  # where `dlm.tokenizer.decode` ends a text too
    ends = [i for i, token in enumerate(ids) if token in (*opened.end_ids, end_of_turn)]
    return ids[: ends[0]] if ends else ids, int(out.nfe[0]), sure


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_random_requests_at_once_are_what_they_are_alone(engine, opened, count):
    """Ids, passes and, on processors whose products allow it, the bits of every confidence."""
    made = make_random(opened, count, count)
    handles = [None] * count

    def send(part):
        for i in range(part, count, 4):
            prompt, length, config = made[i]
            time.sleep(0.002)
            handles[i] = engine.submit(Request(canvas_ids(opened, prompt, length), config, likely=0))

    threads = [threading.Thread(target=send, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [handle.result(1800) for handle in handles]  # beside other programs it took more than the 120 s of before
    before, exact = torch.get_num_threads(), getattr(opened.predictor, "exact_rows", False)
    torch.set_num_threads(engine._threads)
    try:
        for (prompt, length, config), result in zip(made, results, strict=True):
            ids, nfe, sure = alone(opened, prompt, length, config)
            assert list(result.ids) == ids, config
            assert result.nfe == nfe, config
            first = len(canvas_ids(opened, prompt, 0))
            if exact:
                found = [place.probability for place in result.places]
                assert found == [sure.get(first + i, 1.0) for i in range(len(found))], config
    finally:
        torch.set_num_threads(before)
    assert engine.stats.rows.sum > engine.stats.rows.count  # some shared a pass


def test_requests_of_other_lengths_share_a_commit(make_engine, opened):
    """Was: settings that differed in gen_length alone were committed one by one."""
    engine = make_engine(max_rows=4)
    handles = engine.submit_all([request(opened, length=6 + i, gen_length=6 + i, seed=i) for i in range(3)])
    for handle in handles:
        handle.result(30)
    assert engine.stats.passes <= 8 + 3


def test_blocks_of_a_prompt_are_computed_once(make_engine, opened):
    """The second prompt begins with two blocks of the first: fewer slots are computed, and no bit changes."""
    engine = make_engine()
    head = "The cat sat on the mat, and then it slept."
    for number, tail in enumerate([" She walked", " Once upon a time there was", " She walked"]):
        asked = request(opened, head + tail, 9 + number, likely=0)
        result = engine.submit(asked).result(30)
        ids, nfe, sure = alone(opened, head + tail, 9 + number, asked.config)
        assert (list(result.ids), result.nfe) == (ids, nfe)
        if getattr(opened.predictor, "exact_rows", False):
            first = len(canvas_ids(opened, head + tail, 0))
            assert [place.probability for place in result.places] == [sure[first + i] for i in range(len(ids))]
            assert (engine.prefixes.reused > 0) == (number > 0)
    again = make_engine(prefix_bytes=0)
    again.submit(asked).result(30)
    assert again.prefixes.reused == again.prefixes.bytes == 0


def test_a_known_prompt_joins_a_batch_that_goes_on(make_engine, opened):
    """Fault: keys and values that a pass had made could not be written between passes: a request that began as one
    before it, and took a place in their batch, lost all of its rows with "Inplace update to inference tensor"."""
    engine = make_engine(max_rows=2)
    head = "The cat sat on the mat, and then it slept."
    long, short = engine.submit_all([request(opened, head, 40, likely=0), request(opened, head, 4, seed=2, likely=0)])
    short.result(60)
    third = request(opened, head, 40, seed=3, likely=0)
    result = engine.submit(third).result(60)
    assert list(result.ids) == alone(opened, head, 40, third.config)[0] and len(long.result(60).ids) == 40
    if getattr(opened.predictor, "exact_rows", False):
        assert engine.prefixes.reused > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_of_nan_fails_alone(slow, opened, temperature):
    bad = opened.tokenizer(" fox", add_special_tokens=False)["input_ids"][0]
    engine = slow(bad=bad)
    good = [request(opened, "The cat sat", 9, method="none", temperature=temperature, seed=i) for i in range(2)]
    broken = request(opened, "a little fox", 9, method="none", temperature=temperature)
    first, failed, second = engine.submit_all([good[0], broken, good[1]])
    with pytest.raises(RowFailed, match="logits are nan"):
        failed.result(30)
    for handle, asked in ((first, good[0]), (second, good[1])):
        ids, _, _ = alone(opened, "The cat sat", 9, asked.config)
        assert list(handle.result(30).ids) == ids
    assert engine.submit(good[0]).result(30).ids == first.result().ids  # the server goes on


def test_a_pass_that_raises_loses_its_rows_and_not_the_engine(make_engine, opened, monkeypatch):
    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr("dlm.serving.engine.turn", lambda batch: 1 / 0)
        with pytest.raises(RowFailed, match="division by zero"):
            engine.submit(request(opened)).result(30)
    assert engine.submit(request(opened)).result(30).written == 8


def test_a_row_that_cannot_join_is_lost_alone(slow, opened, monkeypatch):
    """Was: taken from the queue and in no batch, such a request was never answered, and all others ended with it."""
    engine = slow(0.01)
    other = engine.submit(request(opened, length=30))
    join = Batch.join

    def broken(self, canvas, config, constraints=None):
        if config.seed == 77:
            raise RuntimeError("no room")
        return join(self, canvas, config, constraints)

    monkeypatch.setattr(Batch, "join", broken)
    with pytest.raises(RowFailed, match=r"^the request could not begin: .*no room"):
        engine.submit(request(opened, seed=77)).result(10)
    assert other.result(30).written == 30
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_text_that_cannot_be_told_is_lost_alone(slow, opened, monkeypatch):
    """Was: all rows of the pass were lost."""
    engine, update = slow(0.01), FinalText.update

    def broken(self, ids, last=False):
        if self.stop:
            raise UnicodeError("no such text")
        return update(self, ids, last)

    monkeypatch.setattr(FinalText, "update", broken)
    other, bad = engine.submit_all([request(opened, length=20), request(opened, stop=("x",))])
    with pytest.raises(RowFailed, match=r"^the text cannot be told: .*no such text"):
        bad.result(10)
    assert other.result(30).written == 20
    assert engine.stats.outcomes == {"error": 1, "length": 1} and engine.running == 0


def test_an_event_loop_that_was_closed_takes_nobody_along(slow, opened):
    """Was: the engine's thread raised where it told a loop that was gone, all rows were lost, and then the thread."""
    engine = slow(0.01)
    handle, loop = engine.submit(request(opened, length=30, stream=True)), asyncio.new_event_loop()
    events = aiter(handle)
    loop.run_until_complete(anext(events))
    loop.close()
    assert handle.result(30).written == 30
    assert engine.submit(request(opened)).result(30).written == 8


def test_a_request_that_comes_while_the_engine_closes_is_refused(slow, opened):
    """Was: behind the last emptying of the queue it was taken, and never answered."""
    engine, late = slow(0.01), []
    engine.submit(request(opened, length=60))
    end_all = engine._end_all

    def emptied(error):
        end_all(error)
        with pytest.raises(Closing):
            engine.submit(request(opened))
        late.append(True)

    engine._end_all = emptied
    engine.drain = lambda timeout=None: engine.ended.wait(10)  # the thread ends before this one asks it to
    engine.close()
    assert late and engine.state == "closed"


def test_an_engine_that_fails_says_so_to_all_who_wait(make_engine, opened):
    """Was: its thread went in silence, and requests waited for ever."""
    engine = make_engine()
    engine._work_came = lambda: 1 / 0
    with pytest.raises(Closing, match="division by zero"):
        engine.submit(request(opened)).result(10)
    assert engine.state == "failed"
    with pytest.raises(Closing, match="division by zero"):
        engine.submit(request(opened))


def test_cancelled_row_leaves_at_the_next_pass(slow, opened):
    engine = slow(0.02)
    handle = engine.submit(request(opened, length=60, stream=True))
    next(iter(handle))
    handle.cancel()
    with pytest.raises(Cancelled):
        handle.result(10)
    assert engine.stats.passes < 20
    assert engine.running == 0 and engine.kv_used == 0
    assert engine.stats.outcomes["cancelled"] == 1


def test_full_queue_and_time_limit(slow, opened):
    engine = slow(0.03, max_rows=1, max_waiting=1, timeout=0.25)
    first = engine.submit(request(opened, length=60))
    while not engine.running:
        time.sleep(0.005)
    second = engine.submit(request(opened))
    with pytest.raises(QueueFull):
        engine.submit(request(opened))
    for handle in (first, second):
        with pytest.raises(Expired, match=r"0\.25 s"):
            handle.result(10)
    assert engine.stats.refused == 1 and engine.stats.outcomes["timeout"] == 2


def test_keys_and_values_are_counted_before_a_row_joins(slow, opened):
    """Two rows of 24 slots fit, three do not; a request that never fits is refused."""
    engine = slow(0.01)
    bytes_of_two = 2 * 24 * engine.slot_bytes
    engine.settings = dataclasses.replace(engine.settings, kv_bytes=bytes_of_two)
    length = 24 - len(canvas_ids(opened, "Once upon", 0))
    handles = engine.submit_all([request(opened, length=length, seed=i) for i in range(5)])
    most = 0
    while not all(handle.finished for handle in handles):
        most = max(most, engine.running)
        assert engine.kv_used <= bytes_of_two
        time.sleep(0.002)
    assert most == 2
    with pytest.raises(ValueError, match="keys and values of"):
        engine.submit(request(opened, length=60)).result(10)


def test_drain_finishes_what_is_there_and_close_does_not(slow, opened):
    engine = slow(0.01, max_rows=1)
    handles = engine.submit_all([request(opened), request(opened)])
    assert not engine.drain(0.01)
    with pytest.raises(Closing):
        engine.submit(request(opened))
    assert engine.drain(30)
    assert [handle.result().written for handle in handles] == [8, 8]
    other = slow(0.02)
    lost = other.submit(request(opened, length=60))
    other.close()
    with pytest.raises(Closing):
        lost.result(10)


def test_a_text_grows_by_the_checkpoint_s_expand_token(tmp_path):
    """Was: the engine did not tell the loop which token that is, and refused what `dlm.generate` does."""
    tokenizer = train_tokenizer([STORY] * 4, 340)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXPAND, DELETE]})
    opened = dlm.load_pretrained(make_checkpoint(tmp_path / "grows", tokenizer))
    canvas = dlm.Canvas.from_templates([canvas_ids(opened, "The cat", 40)], opened.mask_id)
    for seed in range(50):  # until the token is drawn
        config = dlm.SamplingConfig(grow="expand", gen_length=60, seed=seed, temperature=4.0)
        out = dlm.generate(opened.predictor, canvas, config, tokenizer=opened.tokenizer)
        if int(out.nfe[0]) > 40:
            break
    engine = Engine(opened)
    try:
        result = engine.submit(Request(canvas.tokens[0].tolist(), config)).result(60)
    finally:
        engine.close()
    assert result.nfe == int(out.nfe[0]) > 40
    assert list(result.ids) == out.sequences[0].tolist()[: len(result.ids)]


def test_autoregressive_checkpoint_is_refused_in_a_line():
    from pathlib import Path

    folder = Path(dlm.__file__).parent / "assets" / "llama-stories-6m-autoregressive"
    with pytest.raises(ValueError, match="predicts the next token, and cannot fill in masks: give a diffusion model"):
        Engine(dlm.load_pretrained(folder))

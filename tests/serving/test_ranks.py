"""A model shared out over processes: rank 0 tells the others which rows join and leave, and all run the same passes."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import dlm
from dlm.serving.engine import Engine, EngineSettings
from dlm.serving.ranks import Lead, RanksLost, Step, follow
from dlm.tokenizer import train_tokenizer
from tests.helpers.commandline import ENVIRONMENT, STORY, make_checkpoint
from tests.serving.test_engine import alone, request
from tests.serving.test_robust import get


class Wire:
    """Two ranks in one process: what rank 0 tells waits until the other takes it."""

    def __init__(self, monkeypatch):
        self.steps, self.came = [], threading.Condition()
        monkeypatch.setattr("dlm.serving.ranks._passed_on", self.passed_on)
        monkeypatch.setattr("dlm.serving.ranks.leave_processes", lambda: None)

    def passed_on(self, steps):
        with self.came:
            if steps[0] is None:
                assert self.came.wait_for(lambda: self.steps, 60)
                return [self.steps.pop(0)]
            self.steps.append(steps[0])
            self.came.notify()
            return steps


def test_the_others_run_the_passes_of_rank_0(opened, monkeypatch):
    """Joins, an end, a cancelled row and a second batch: the same rows, tokens and numbers of rows on both ranks."""
    from dlm.sampling import denoise

    seen = {"engine": [], "ranks": []}

    def watched(place):
        def run(batch):
            state = denoise.turn(batch)
            seen[place].append((len(batch.rows), state.canvas.tokens.tolist(), state.nfe.tolist()))
            return state

        monkeypatch.setattr(f"dlm.serving.{place}.turn", run)

    watched("engine")
    watched("ranks")
    Wire(monkeypatch)
    follower = threading.Thread(target=follow, args=(opened,), daemon=True)
    follower.start()
    engine = Engine(opened, EngineSettings(max_rows=3, prefix_bytes=0), Lead())
    handles = engine.submit_all([request(opened, length=5 + 2 * i, seed=i, temperature=0.7) for i in range(5)])
    lost = engine.submit(request(opened, length=60, stream=True))
    next(iter(lost))
    lost.cancel()
    texts = [handle.result(60) for handle in handles]
    again = engine.submit(request(opened, "The cat", 7)).result(60)
    engine.close()
    follower.join(60)
    assert not follower.is_alive()
    assert seen["engine"] == seen["ranks"] and len(seen["engine"]) > 10
    for result, handle in zip(texts, handles, strict=True):
        length = handle.request.ids.count(opened.mask_id)
        assert list(result.ids) == alone(opened, "Once upon", length, handle.request.config)[0]
    assert again.written == 7


def test_a_rank_that_has_gone_ends_the_engine(opened, monkeypatch):
    def gone(steps):
        raise RanksLost("another process of this model has gone (closed by peer): start all of them again")

    monkeypatch.setattr("dlm.serving.ranks._passed_on", gone)
    engine = Engine(opened, EngineSettings(), Lead())
    engine.wait_until_loaded(60)
    with pytest.raises(Exception, match="another process of this model has gone"):
        engine.submit(request(opened)).result(60)
    assert engine.ended.wait(10) and engine.state == "failed"
    assert Step().likely is None


# ---------------------------------------------------------------- processes


@pytest.fixture
def shared(tmp_path):
    """(torchrun of two ranks that serve, its port, the checkpoint, the log)."""
    folder = make_checkpoint(tmp_path / "shared", train_tokenizer([STORY] * 4, 340))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dlm"]
    words += ["serve", "--tensor-parallel", "--model", str(folder), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, env=ENVIRONMENT, stderr=log, stdout=log)
    until = time.monotonic() + 180
    while '"event": "ready"' not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)
    yield process, port, folder, tmp_path / "log"
    process.kill()


def ranks_of(process):
    import psutil

    found = [child for child in psutil.Process(process.pid).children() if "serve" in child.cmdline()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.slow
def test_two_processes_serve_what_one_does_and_stop(shared):
    process, port, folder, log = shared
    opened, url = dlm.load_pretrained(folder), f"http://127.0.0.1:{port}/v1/completions"
    bodies = [{"prompt": p, "max_tokens": 9, "seed": 1, "temperature": 0} for p in ("The cat", "Once upon a time")]
    answers = [None] * len(bodies)

    def ask(i):
        answers[i] = get(url, bodies[i] | {"logprobs": 0, "stop_at_eos": False})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for body, answer in zip(bodies, answers, strict=True):
        config = dlm.SamplingConfig(**{k: v for k, v in opened.defaults.items() if k != "chat"})
        ids, nfe, _ = alone(opened, body["prompt"], 9, dlm.SamplingConfig(method=config.method, seed=1))
        assert answer["choices"][0]["text"] == opened.text(ids) and answer["usage"]["nfe"] == nfe
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) is not None
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]
    assert events.count("stopping") == 1 and "dlm: error" not in log.read_text()
    assert log.read_text().count("Traceback") <= 1  # torchrun's own, about the signal


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all(shared, victim):
    process, _, _, log = shared
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[victim].kill()
    assert process.wait(90) != 0
    assert not any(rank.is_running() for rank in ranks)
    lines = [line for line in log.read_text().splitlines() if line.startswith("dlm: error:")]
    assert len(lines) <= 1, lines

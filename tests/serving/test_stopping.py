"""A server that loads, whose requests take too long, and that is told to stop twice."""

import asyncio
import json
import signal
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from dlm.serving.engine import Engine, EngineSettings
from dlm.serving.main import _Server
from dlm.serving.requests import Closing
from dlm.serving.server import ServerSettings, build_app
from tests.serving.test_robust import client_of

LONG = {"prompt": "Once", "max_tokens": 110, "stop_at_eos": False}


def test_while_the_model_is_loaded_requests_are_told_to_come_again(opened, monkeypatch):
    weights = threading.Event()
    monkeypatch.setattr(type(opened), "ready", lambda self: weights.wait(60))
    engine = Engine(opened, EngineSettings())

    async def ask():
        client = client_of(engine)
        before = [await client.get("/health"), await client.post("/v1/completions", json={"prompt": "a"})]
        models = await client.get("/v1/models")
        weights.set()
        engine.wait_until_loaded(60)
        return before, models, await client.get("/health")

    try:
        (health, refused), models, after = asyncio.run(ask())
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "loading" and "being loaded" in refused.json()["error"]["message"]
        assert models.status_code == 200
        assert (after.status_code, after.json()) == (200, {"status": "ready"})
    finally:
        weights.set()
        engine.close()


def test_a_model_that_cannot_be_loaded_fails_the_health_check(opened, monkeypatch):
    def broken(self):
        raise ValueError("the weights are damaged")

    monkeypatch.setattr(type(opened), "ready", broken)
    engine = Engine(opened, EngineSettings())
    with pytest.raises(ValueError, match="damaged"):
        engine.wait_until_loaded(60)

    async def ask():
        client = client_of(engine)
        return await client.get("/health"), await client.post("/v1/completions", json={"prompt": "a"})

    health, refused = asyncio.run(ask())
    assert (health.status_code, health.json()) == (503, {"status": "failed"})
    assert refused.status_code == 503 and refused.json()["error"]["message"] == "the weights are damaged"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_over(slow, stream):
    """504 in OpenAI's shape; in mid-stream the same error as the last event, behind the text that was final."""
    engine = slow(0.02, timeout=0.4)

    async def ask():
        client = client_of(engine)
        return await client.post("/v1/completions", json={**LONG, "stream": stream, "stream_canvas": stream or None})

    answer = asyncio.run(ask())
    if stream:
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        *before, last = [json.loads(event) for event in events]
        assert before and all("error" not in event for event in before)
        error = last["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    assert error["message"] == "not done within 0.4 s: ask for fewer tokens"
    assert engine.stats.outcomes == {"timeout": 1}


@pytest.mark.parametrize("signals", [1, 2])
def test_a_second_signal_stops_at_once(slow, signals):
    """After one signal the request that runs is finished, after two the server goes within a pass or two."""
    engine = slow(0.03)  # 3.3 s of passes
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(build_app(engine, ServerSettings()), log_config=None, lifespan="off")
    server, port = _Server(config, engine), bound.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    answers = []

    def ask():
        body = LONG | {"max_tokens": 30 if signals == 1 else 110}
        try:
            answers.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code)
        except httpx.HTTPError as error:
            answers.append(type(error).__name__)

    client = threading.Thread(target=ask)
    client.start()
    while not engine.running:
        time.sleep(0.005)
    passes = engine.stats.passes
    for _ in range(signals):
        server.handle_exit(signal.SIGTERM, None)
    thread.join(60)
    client.join(60)
    assert not thread.is_alive() and engine.state == "closed"
    with pytest.raises(Closing):
        engine.submit_all([])
    if signals == 1:
        assert answers == [200] and engine.stats.passes >= 30
    else:
        assert answers and answers != [200]
        assert engine.stats.passes - passes < 60

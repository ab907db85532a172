"""Clients that go, lie, flood or send nonsense; and a real process with a real socket."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import httpx
import pytest

from dlm.serving.server import ServerSettings, build_app
from tests.helpers.commandline import ENVIRONMENT

BASE = "http://localhost"


def client_of(engine, **settings):
    app = build_app(engine, ServerSettings(**({"allowed_hosts": ("localhost",)} | settings)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=BASE)


def test_api_key(engine):
    async def ask():
        client = client_of(engine, api_key="sesame")
        tries = [{}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}, {"authorization": "Bearer "}]
        refused = [await client.get("/v1/models", headers=headers) for headers in tries]
        right = await client.get("/v1/models", headers={"authorization": "Bearer sesame"})
        return refused, right, [await client.get(path) for path in ("/health", "/", "/metrics")]

    refused, right, opens = asyncio.run(ask())
    assert [answer.status_code for answer in refused] == [401] * 4
    assert refused[0].json()["error"]["code"] == "invalid_api_key"
    assert right.status_code == 200
    assert [answer.status_code for answer in opens] == [200, 200, 401]


def test_no_other_page_may_read_answers_unless_it_is_named(engine):
    origin = {"origin": "https://example.org"}

    async def ask():
        return [
            await client_of(engine, **more).get("/health", headers=origin)
            for more in ({}, {"cors_origins": ("https://example.org",)})
        ]

    closed, named = asyncio.run(ask())
    assert "access-control-allow-origin" not in closed.headers
    assert named.headers["access-control-allow-origin"] == "https://example.org"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(slow, stream):
    """The ASGI messages of a connection that closes after the request was read."""
    engine = slow(0.05)  # over in 5 s, if nobody stops it
    app = build_app(engine, ServerSettings())
    body = json.dumps({"prompt": "Once", "max_tokens": 110, "stream": stream, "stop_at_eos": False}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "headers": headers,
        "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "root_path": "",
        "client": ("localhost", 1), "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip

    async def run():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not engine.running:
                await asyncio.sleep(0.002)
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.sleep(0)

        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    until = time.monotonic() + 10
    while not engine.stats.outcomes and time.monotonic() < until:  # counted once the row has left
        time.sleep(0.005)
    assert engine.running == 0
    assert engine.stats.outcomes == {"cancelled": 1}


def test_a_full_queue_says_when_to_come_again(make_engine, monkeypatch):
    engine = make_engine(max_rows=1, max_waiting=0)
    monkeypatch.setattr(engine, "_admit", lambda: time.sleep(0.01))

    async def ask():
        client = client_of(engine)
        first = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}))
        while not engine.waiting:
            await asyncio.sleep(0.005)
        second = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        monkeypatch.undo()
        return await first, second

    first, second = asyncio.run(ask())
    assert (first.status_code, second.status_code) == (200, 429)
    assert int(second.headers["retry-after"]) >= 1
    assert second.json()["error"]["type"] == "rate_limit_error"


WRONG = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "x" * 3000,
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
    "\x00",
    "\u202e",
    ["a"] * 500,
]


def hostile(rng):
    """A body with one or two fields of any kind of value, known fields and unknown ones."""
    from dlm.serving.protocol import ChatBody, CompletionBody

    kind = rng.choice([ChatBody, CompletionBody])
    body = {"messages": [{"role": "user", "content": "a"}]} if kind is ChatBody else {"prompt": "a"}
    body |= {"max_tokens": 2}
    for _ in range(rng.randint(1, 2)):
        body[rng.choice([*kind.model_fields, "x", "__class__"])] = rng.choice(WRONG)
    return "/v1/chat/completions" if kind is ChatBody else "/v1/completions", body


def test_a_hundred_hostile_requests(engine):
    """Each is answered, none with an error of the server, and the next one is served."""
    rng = random.Random(0)
    raw = [
        b"",
        b"\xff\xfe",
        b"[" * 5000,
        b"{" + b'"a":' * 3000,
        b"null",
        b"1" * 5000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
    ]

    async def ask():
        client, answers = client_of(engine), []
        for content in raw:
            answers.append(
                await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            )
        for _ in range(92):
            path, body = hostile(rng)
            content = json.dumps(body).encode()
            answers.append(await client.post(path, content=content, headers={"content-type": "application/json"}))
        return answers, await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "seed": 0})

    answers, after = asyncio.run(ask())
    assert len(answers) == 100
    for answer in answers:
        assert answer.status_code in (200, 400, 404), (
            answer.status_code,
            answer.request.content[:200],
            answer.text[:300],
        )
        if answer.status_code != 200 and "text/event-stream" not in answer.headers["content-type"]:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "\n" not in answer.json()["error"]["message"]
    assert sum(answer.status_code == 400 for answer in answers) > 50
    assert after.status_code == 200


# ---------------------------------------------------------------- a process


def get(url, body=None):
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def metrics(url) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return answer.read().decode()


def test_a_process_serves_and_drains(folder):
    """SIGTERM while a request runs: it is finished, new ones find no server, and the process ends with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "dlm", "serve", "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        line = json.loads(process.stderr.readline())
        assert line["event"] == "ready" and line["url"] == f"{url}/"
        assert get(f"{url}/health") == {"status": "ready"}
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = json.dumps({"prompt": "Once", "max_tokens": 110, "stop_at_eos": False}).encode()
            lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
            client.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
            while not any(word in metrics(url) for word in ("dlm_requests_running 1", "dlm_requests_total{")):
                time.sleep(0.01)  # until the engine has the request
            process.send_signal(signal.SIGTERM)
            received = b""
            while part := client.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 200"), received[:300]
        assert json.loads(received.split(b"\r\n\r\n", 1)[1])["usage"]["completion_tokens"] > 0
        assert process.wait(30) == 0
        with pytest.raises(urllib.error.URLError):
            get(f"{url}/health")
        lines = [json.loads(line) for line in process.stderr]
        assert [line["event"] for line in lines] == ["stopping", "request"] or [line["event"] for line in lines] == [
            "request",
            "stopping",
        ]
        assert not any("Once" in json.dumps(line) for line in lines)
    finally:
        process.kill()
        process.stderr.close()


def test_too_many_texts_are_refused_before_they_take_memory(engine, monkeypatch):
    """A body of 1 MB asked for 5.6 million texts, each of which was tokenized and laid out first."""
    monkeypatch.setattr("dlm.tokenizer.encode_prompt", None)  # nothing is tokenized
    body = {"prompt": [""] * 300_000, "n": 16}
    answer = asyncio.run(client_of(engine).post("/v1/completions", content=json.dumps(body, separators=(",", ":")),
                                                headers={"content-type": "application/json"}))  # fmt: skip
    assert answer.status_code == 400
    assert "4800000 texts were asked for at once" in answer.json()["error"]["message"]


def test_a_pattern_that_takes_long_holds_no_other_request(engine, monkeypatch):
    """Its automaton was built under the lock of the tokenizer, which the engine needs for every text."""
    held = []

    def take():
        held.append(not engine.text_lock.acquire(timeout=0.2))
        if not held[-1]:
            engine.text_lock.release()

    def built(*_):  # another thread asks for the lock: the one that has it may take it again
        other = threading.Thread(target=take)
        other.start()
        other.join()

    monkeypatch.setattr("dlm.serving.waiting.constraint_of", built)
    body = {"prompt": "a", "max_tokens": 2, "regex": "[a-z]{2}"}
    assert asyncio.run(client_of(engine).post("/v1/completions", json=body)).status_code == 200
    assert held == [False]

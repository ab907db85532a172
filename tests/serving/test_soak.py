"""A thousand requests, a fifth of the clients vanish at random: none is lost, none mixed up, memory stays flat.

DLM_SOAK_SECONDS=900 python -m pytest tests/serving/test_soak.py -s        # goes on for a quarter of an hour
"""

import asyncio
import json
import os
import random
import socket
import threading
import time

import psutil
import pytest
import torch

from dlm.checkpoints.pretrained import Pretrained, load_pretrained
from dlm.kernels.linear import rows_made
from tests.helpers.commandline import checkpoint, tokenizer  # noqa: F401

pytest.importorskip("fastapi", reason="dlm's extra serve is not installed")
pytestmark = pytest.mark.slow

REQUESTS, AT_A_TIME, VANISHING = 1000, 24, 0.2
SLOTS = 64  # of a request here, at most
PROMPTS = ("the cat", "She walked along the beach", "a fox by the sea", "", "shells and a mat " * 4)


def requests_of(draw):
    """40 different requests: methods, lengths, seeds, streams, infilling."""
    found = []
    for number in range(40):
        body = {"prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(1, 24), "seed": number, "temperature": 1.0}
        body |= {"method": draw.choice(("none", "prefix", "dual")), "block_length": draw.choice((4, 8))}
        if draw.random() < 0.3:
            body |= {"suffix": " and then it slept."}
        if draw.random() < 0.2:
            body |= {"cfg_scale": 0.5}
        found.append(body)
    return found


async def ask(port, body, vanish=None):
    """The text of a completion; None where the client vanished after `vanish` seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = ("POST /v1/completions HTTP/1.0", "Host: 127.0.0.1", "Content-Type: application/json")
    writer.write("\r\n".join((*head, f"Content-Length: {len(payload)}", "", "")).encode() + payload)
    if vanish is not None:
        await writer.drain()
        await asyncio.sleep(vanish)
        writer.transport.abort()
        return None
    status, _, rest = (await reader.read()).partition(b"\r\n")
    writer.close()
    assert b" 200 " in status, rest[-400:]
    content = rest.partition(b"\r\n\r\n")[2].decode()
    if not body.get("stream"):
        return json.loads(content)["choices"][0]["text"]
    events = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def soak(port, wanted, draw, seconds, note):
    """Sends requests until all are sent and the time is over; returns (sent, vanished, wrong)."""
    places, counts, began = asyncio.Semaphore(AT_A_TIME), {"sent": 0, "vanished": 0, "wrong": []}, time.monotonic()

    async def one(body, text, vanish):
        try:
            found = await ask(port, body, vanish)
            counts["vanished"] += found is None
            if found is not None and found != text:
                counts["wrong"].append((body, text, found))
        finally:
            places.release()

    async with asyncio.TaskGroup() as group:
        while counts["sent"] < REQUESTS or time.monotonic() - began < seconds:
            await places.acquire()
            body, text = draw.choice(wanted)
            vanish = draw.uniform(0, 0.3) if draw.random() < VANISHING else None
            group.create_task(one(body | {"stream": draw.random() < 0.5}, text, vanish))
            counts["sent"] += 1
            if counts["sent"] % 100 == 0:
                note()
    return counts


def warm(opened):
    """Makes oneDNN's program of every product for every number of rows that the requests here can have.

    oneDNN keeps a thousand programs, and ideep beside it a thousand of each thread, of 0.3 to 0.6 MB (`rows_made`).
    Without this they were taken for a leak: 800 requests made a server grow by 350 MB, 0.43 MB for each new number of
    rows of a layer, while tensors, objects and what the caches of `dlm` hold stayed as they were.
    """
    for rows in sorted({rows_made(rows) for rows in range(1, 8 * SLOTS + 1)}):
        tokens = torch.zeros(rows, dtype=torch.int64).view(1 if rows <= 2 * SLOTS else 8, -1)
        opened.predictor(tokens, logits_to_keep=torch.arange(tokens.shape[1]).repeat(len(tokens), 1))


def test_a_thousand_requests_and_a_fifth_of_the_clients_vanish(checkpoint, monkeypatch):  # noqa: F811
    import uvicorn

    from dlm.serving.engine import Engine, EngineSettings
    from dlm.serving.server import ServerSettings, build_app

    ready = Pretrained.ready
    monkeypatch.setattr(Pretrained, "ready", lambda opened: (ready(opened), warm(opened)))  # in the engine's thread
    engine = Engine(load_pretrained(checkpoint), EngineSettings(max_rows=8, max_waiting=64))
    engine.wait_until_loaded(300)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(engine, ServerSettings()), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    port, draw, process, memory = listening.getsockname()[1], random.Random(0), psutil.Process(), []
    try:
        alone = [(body, asyncio.run(ask(port, body))) for body in requests_of(draw)]  # nothing else runs meanwhile
        before = engine.stats.outcomes.total()
        seconds = float(os.environ.get("DLM_SOAK_SECONDS", 0))
        began = time.monotonic()
        counts = asyncio.run(soak(port, alone, draw, seconds, lambda: memory.append(process.memory_info().rss / 1e6)))
        took, until = time.monotonic() - began, time.monotonic() + 20
        while (engine.running or engine.waiting) and time.monotonic() < until:
            time.sleep(0.02)
        outcomes = engine.stats.outcomes
        line = f"{counts['sent']} requests, {counts['vanished']} clients vanished, {took:.0f} s, {dict(outcomes)}; "
        half = memory[len(memory) // 2]  # until then the allocator fills
        print(line + f"MB: {half:.0f} in the middle, {memory[-1]:.0f} at the end")
        assert counts["wrong"] == [] and counts["sent"] >= REQUESTS
        assert 0.1 * counts["sent"] < counts["vanished"] < 0.3 * counts["sent"]
        assert (engine.running, engine.waiting, engine.kv_used) == (0, 0, 0)
        ended = outcomes.total() - before  # a client that was very quick to go may have asked for nothing
        assert counts["sent"] - counts["vanished"] <= ended <= counts["sent"]
        assert set(outcomes) <= {"stop", "length", "cancelled"} and outcomes["cancelled"] > 0
        assert memory[-1] - half < 20, memory
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()

"""A tiny random checkpoint that answers chats, an engine for it, and clients that talk to its app in this process."""

import time

import httpx
import openai
import pytest
import torch

import dlm
from dlm.serving.engine import Engine, EngineSettings
from dlm.serving.server import ServerSettings, build_app
from dlm.tokenizer import train_tokenizer
from tests.helpers.commandline import STORY, make_checkpoint

BASE = "http://localhost"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A block-causal checkpoint with a chat template."""
    changes = {"block_length": 4, "objective": "block_diffusion"}
    tokenizer = train_tokenizer([STORY] * 4, 340)
    return make_checkpoint(tmp_path_factory.mktemp("serving") / "tiny-fox", tokenizer, **changes)


@pytest.fixture(scope="session")
def opened(folder):
    return dlm.load_pretrained(folder)


@pytest.fixture(scope="session")
def engine(opened):
    """An engine that all tests share which change nothing in it."""
    engine = Engine(opened, EngineSettings(max_rows=8, max_waiting=400, timeout=None))
    engine.wait_until_loaded(60)
    yield engine
    engine.close()


@pytest.fixture
def make_engine(opened):
    """make_engine(**settings): an engine of the test's own, closed after it."""
    made = []

    def make(**settings):
        made.append(Engine(opened, EngineSettings(**settings)))
        made[-1].wait_until_loaded(60)
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def app(engine):
    return build_app(engine, ServerSettings(allowed_hosts=("localhost",)))


@pytest.fixture
def http(app):
    """An HTTP client of the app."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=BASE)


@pytest.fixture
def client(app):
    """OpenAI's own client of the app."""
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False))
    return openai.AsyncOpenAI(base_url=f"{BASE}/v1", api_key="none", http_client=transport, max_retries=0)


class Slow:
    """A predictor whose passes take time, and go wrong for rows that hold a token."""

    def __init__(self, predictor, seconds=0.0, bad=None):
        self.predictor, self.seconds, self.bad, self.config = predictor, seconds, bad, predictor.config
        self.device, self.kernels, self.calls = predictor.device, predictor.kernels, 0

    def __call__(self, tokens, *args, **options):
        time.sleep(self.seconds)
        self.calls += 1
        logits = self.predictor(tokens, *args, **options)
        if self.bad is not None:
            logits[(tokens == self.bad).any(dim=1)] = torch.nan
        return logits


@pytest.fixture
def slow(opened, make_engine):
    """slow(seconds, bad, **settings): an engine of such a predictor."""

    def make(seconds=0.0, bad=None, **settings):
        engine = make_engine(**settings)
        engine._new_batch = lambda make=engine._new_batch: replaced(make(), opened.predictor, seconds, bad)
        return engine

    def replaced(batch, predictor, seconds, bad):
        batch.predictor = Slow(predictor, seconds, bad)
        return batch

    return make

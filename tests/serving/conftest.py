"""A tiny random checkpoint that answers chats, an engine for it, and clients that talk to its app in this process."""

import httpx
import openai
import pytest

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
    engine = Engine(opened, EngineSettings(max_rows=8, max_waiting=400))
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

"""The HTTP server: OpenAI's routes over an engine, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

import dlm
from dlm.serving import asking, logs
from dlm.serving.engine import Engine
from dlm.serving.failures import ERRORS, RETRY_SECONDS, add_errors, as_api_error
from dlm.serving.guards import LOCAL, BodyLimit, HostCheck, KeyCheck
from dlm.serving.metrics import CONTENT_TYPE, exposition
from dlm.serving.protocol import INVALID, ApiError, ChatBody, CompletionBody, error_body
from dlm.serving.requests import Cancelled, Handle, Result

__all__ = ["ServerSettings", "build_app"]

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class ServerSettings:
    """name: what /v1/models lists, None for the checkpoint's own name. api_key: what every request but /health and the
    page's must carry. allowed_hosts: names in a Host header, empty for any. cors_origins: pages of other servers that
    may ask. max_body: bytes. log_texts: whether prompts and answers are logged."""

    name: str | None = None
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = LOCAL
    cors_origins: tuple[str, ...] = ()
    max_body: int = 2**20
    log_texts: bool = False

    def __post_init__(self):
        if self.max_body < 1:
            raise ValueError(f"max_body is {self.max_body}: give bytes, 1 or more")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty: give one, or none")


def build_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application. The engine is the caller's to close."""
    settings = settings or ServerSettings()
    name = settings.name or engine.pretrained.name
    app = FastAPI(title="dlm", version=dlm.__version__, description="Masked diffusion language models.")
    served = _Served(engine, settings, name, int(time.time()))
    add_errors(app)
    errors = {code: {"description": text, "content": {"application/json": {}}} for code, text in ERRORS.items()}

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 once requests are taken; 503 while the model is loaded, and after that when the server shuts down."""
        ready = engine.state == "ready"
        return JSONResponse({"status": engine.state}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(exposition(engine), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [served.model_card()]}

    @app.get("/v1/models/{model:path}", responses={404: errors[404]})
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        served.check_model(model)
        return served.model_card()

    @app.post("/v1/completions", responses=errors)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Text behind a prompt, or with `suffix` between two texts."""
        return await served.answer(body, request, _Completions(body))

    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The answer to a conversation."""
        return await served.answer(body, request, _Chat(body))

    page = {"/": PAGE / "index.html"} | {f"/{file.name}": file for file in PAGE.iterdir() if file.is_file()}
    for path, file in page.items():
        app.add_route(path, _file(file), methods=["GET"], include_in_schema=False)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, key=settings.api_key, open_paths=(*page, "/health"))
    app.add_middleware(HostCheck, hosts=settings.allowed_hosts)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        headers, methods = ["Authorization", "Content-Type"], ["GET", "POST"]
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_headers=headers, allow_methods=methods
        )
    return app


def _file(path: Path) -> Callable:
    async def answer(request: Request) -> Response:
        return FileResponse(path)

    return answer


# ---------------------------------------------------------------- the two kinds of answer


class _Completions:
    """How /v1/completions asks and answers."""

    prefix, whole, part, ask = "cmpl", "text_completion", "text_completion", staticmethod(asking.ask_completion)

    def __init__(self, body: CompletionBody):
        self.body = body

    def choice(self, index: int, result: Result, echoed: str) -> dict[str, Any]:
        return asking.completion_choice(index, result, echoed, self.body.likely)

    def first(self, index: int, echoed: str) -> dict[str, Any] | None:
        return self.delta(index, echoed) if echoed else None

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def last(self, index: int, result: Result) -> dict[str, Any]:
        logprobs = None if self.body.likely is None else asking.completion_logprobs(result.places)
        return {"index": index, "text": "", "logprobs": logprobs, "finish_reason": result.finish_reason}


class _Chat:
    """How /v1/chat/completions asks and answers."""

    prefix, whole, part, ask = "chatcmpl", "chat.completion", "chat.completion.chunk", staticmethod(asking.ask_chat)

    def __init__(self, body: ChatBody):
        self.body = body

    def choice(self, index: int, result: Result, echoed: str) -> dict[str, Any]:
        return asking.chat_choice(index, result, self.body.likely)

    def first(self, index: int, echoed: str) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def last(self, index: int, result: Result) -> dict[str, Any]:
        logprobs = None if self.body.likely is None else asking.chat_logprobs(result.places)
        return {"index": index, "delta": {}, "logprobs": logprobs, "finish_reason": result.finish_reason}


# ---------------------------------------------------------------- one request


class _Served:
    """The engine and the settings, as the routes use them."""

    def __init__(self, engine: Engine, settings: ServerSettings, name: str, created: int):
        self.engine, self.settings, self.name, self.created = engine, settings, name, created

    def model_card(self) -> dict[str, Any]:
        opened = self.engine.pretrained
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dlm",
            "max_model_len": self.engine.settings.max_slots or opened.max_length,
            "block_length": opened.block_length,
            "chat": opened.chat_template is not None and opened.defaults.get("chat") is not False,
            "defaults": {name: value for name, value in opened.defaults.items() if name != "chat"},
        }

    def check_model(self, model: str | None) -> None:
        if model not in (None, "", self.name):
            raise ApiError(
                404, f"no model {model[:80]!r}: this server has {self.name!r}", INVALID, "model", "model_not_found"
            )

    async def answer(self, body: CompletionBody | ChatBody, request: Request, kind: _Completions | _Chat) -> Response:
        number, began = f"{kind.prefix}-{secrets.token_hex(12)}", time.monotonic()
        entry = logs.Entry(number, request.url.path, began)
        try:
            if self.engine.state == "loading":
                message = "the model is being loaded: try again"
                raise ApiError(503, message, "server_error", None, "loading", RETRY_SECONDS)
            self.check_model(body.model)
            ask, handles = await run_in_threadpool(self._submit, kind, body)
        except Exception as error:
            problem = as_api_error(error)
            logs.write(entry, problem.status, error=problem.code or problem.kind)
            raise problem from (error if problem.status == 500 else None)
        entry.note(ask, self.settings.log_texts, self.engine)
        head = {"id": number, "created": int(time.time()), "model": self.name}
        if body.stream:
            return _Streamed(self._stream(kind, ask, handles, head, entry), handles)
        try:
            results = await self._whole(request, handles)
        except Exception as error:
            problem = as_api_error(error)
            status = 499 if isinstance(error, Cancelled) else problem.status
            logs.write(entry, status, error=problem.code or problem.kind)
            raise problem from (error if problem.status == 500 else None)
        logs.write(entry, 200, results, self.settings.log_texts)
        choices = [kind.choice(i, result, ask.echoed[i]) for i, result in enumerate(results)]
        usage = asking.usage_of(ask.given, results)
        return JSONResponse({**head, "object": kind.whole, "choices": choices, "usage": usage})

    def _submit(self, kind, body) -> tuple[asking.Ask, list[Handle]]:
        ask = kind.ask(self.engine, body)
        return ask, self.engine.submit_all(ask.requests)

    async def _whole(self, request: Request, handles: list[Handle]) -> list[Result]:
        """The results. Raises the first error; when the client goes, the rows leave."""
        gone = asyncio.ensure_future(_gone(request.receive))
        results = asyncio.ensure_future(_all(handles))
        try:
            await asyncio.wait([gone, results], return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise Cancelled("the client is gone")
            return results.result()
        finally:
            for handle in handles:
                handle.cancel()
            for task in (gone, results):
                task.cancel()
            await asyncio.gather(gone, results, return_exceptions=True)

    async def _stream(self, kind, ask, handles: list[Handle], head: dict[str, Any], entry) -> AsyncIterator[str]:
        """Server-sent events of all choices, as they come."""
        body, chunk = kind.body, {**head, "object": kind.part}
        extra = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
        results: list[Result | None] = [None] * len(handles)
        status, problem = 499, "cancelled"
        try:
            for i, echoed in enumerate(ask.echoed):
                if (choice := kind.first(i, echoed)) is not None:
                    yield _event({**chunk, "choices": [choice], **extra})
            async for i, event in _merged(handles):
                if isinstance(event, Result):
                    results[i] = event
                    yield _event({**chunk, "choices": [kind.last(i, event)], **extra})
                elif event.canvas is not None:
                    seen = event.canvas
                    canvas = {"pass": event.number, "pieces": seen.pieces, "confidence": seen.confidence,
                              "committed": seen.committed}  # fmt: skip
                    yield _event({**chunk, "choices": [kind.delta(i, event.text)], **extra, "canvas": canvas})
                elif event.text:
                    yield _event({**chunk, "choices": [kind.delta(i, event.text)], **extra})
            if extra:
                yield _event({**chunk, "choices": [], "usage": asking.usage_of(ask.given, results)})
            yield "data: [DONE]\n\n"
            status, problem = 200, None
        except Exception as error:
            wrong = as_api_error(error)
            status, problem = wrong.status, wrong.code or wrong.kind
            yield _event(error_body(wrong.message, wrong.kind, wrong.param, wrong.code))
            yield "data: [DONE]\n\n"
        finally:  # also where the client has gone
            for handle in handles:
                handle.cancel()
            done = [result for result in results if result is not None]
            logs.write(entry, status, done, self.settings.log_texts, error=problem)


class _Streamed(StreamingResponse):
    """Server-sent events whose rows leave when the client does, also one that goes before the first event: then the
    generator of the events never begins, and nothing of it runs."""

    def __init__(self, events: AsyncIterator[str], handles: list[Handle]):
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.handles = handles

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for handle in self.handles:
                handle.cancel()


STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must not gather the events


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(receive: Callable) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all(handles: list[Handle]) -> list[Result]:
    """The results of all; the first error ends it."""
    return await asyncio.gather(*(handle.wait() for handle in handles))


async def _merged(handles: list[Handle]) -> AsyncIterator[tuple[int, Any]]:
    """(number of the handle, event) as they come, and each handle's result after its events. Raises its error."""
    queue: asyncio.Queue = asyncio.Queue()

    async def follow(i: int, handle: Handle) -> None:
        try:
            async for event in handle:
                queue.put_nowait((i, event))
            queue.put_nowait((i, await handle.wait()))
        except Exception as error:
            queue.put_nowait((i, error))

    tasks = [asyncio.ensure_future(follow(i, handle)) for i, handle in enumerate(handles)]
    try:
        left = len(handles)
        while left:
            i, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Result)
            yield i, event
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)

"""What stands in front of the routes: the Host header, the API key, the size of a body.

ASGI middleware without buffering, so that a stream is a stream and a client's going is seen.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection

from starlette.exceptions import HTTPException

from dlm.serving.protocol import error_body

__all__ = ["BodyLimit", "HostCheck", "KeyCheck"]

LOCAL = ("localhost", "127.0.0.1", "::1")


async def _refuse(send, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
    content = json.dumps(body).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(content))} | (headers or {})
    raw = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def _header(scope, name: bytes) -> bytes | None:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].split("]")[0]
    return header.rsplit(":", 1)[0] if header.count(":") == 1 else header


class HostCheck:
    """Refuses a Host header that names another machine: a page of a stranger, whose name was made to point here, could
    else read what the server answers (DNS rebinding). hosts: the names that may stand there; empty for any."""

    def __init__(self, app, hosts: Collection[str]):
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and self.hosts:
            header = (_header(scope, b"host") or b"").decode("latin-1")
            if host_of(header) not in self.hosts:
                message = f"the Host header names {header[:80]!r}, not this server: start it with --allowed-host"
                await _refuse(send, 421, error_body(message, "invalid_request_error", None, "host_not_allowed"))
                return
        await self.app(scope, receive, send)


class KeyCheck:
    """Asks for the API key everywhere but on the open paths; the comparison takes the same time for every wrong one."""

    def __init__(self, app, key: str, open_paths: Collection[str]):
        self.app, self.key, self.open_paths = app, key.encode(), frozenset(open_paths)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self.key):
                message = "no valid API key: send the header Authorization: Bearer KEY"
                body = error_body(message, "invalid_request_error", None, "invalid_api_key")
                await _refuse(send, 401, body, {"www-authenticate": "Bearer"})
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body of more than `limit` bytes, before it is read where its length is said."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = _header(scope, b"content-length") or b"0"
        if length.isdigit() and len(length) < 20 and int(length) > self.limit:
            await _refuse(send, 413, error_body(self._message(), "invalid_request_error", None, "body_too_large"))
            return
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, self._message())
            return message

        await self.app(scope, counted, send)

    def _message(self) -> str:
        return f"the body is above {self.limit} bytes: send less, or start the server with a larger --max-body"

"""Runs the server in this process: load, listen, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time

import uvicorn

from dlm.checkpoints.pretrained import load_pretrained
from dlm.serving.engine import Engine, EngineSettings
from dlm.serving.guards import LOCAL
from dlm.serving.logs import JsonLines
from dlm.serving.ranks import Lead, follow, rank
from dlm.serving.server import ServerSettings, build_app

__all__ = ["serve"]

log = logging.getLogger("dlm.serving")
PROGRAMS = 512  # of products that oneDNN and ideep keep, 0.8 MB in both of each number of rows: 0.4 GB, not 0.8
PLACING = ("dtype", "device", "attn_implementation", "cuda_graphs", "compile", "tensor_parallel")


def serve(args) -> int:
    """Serves until a signal ends it; 0 where all that was accepted is done. Raises ValueError, OSError."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(name, str(PROGRAMS))
    options = {name: getattr(args, name) for name in PLACING}
    opened = load_pretrained(args.model, revision=args.revision, **options)
    if args.max_length is not None and opened.max_length is not None and args.max_length > opened.max_length:
        raise ValueError(f"--max-length is {args.max_length}: this model reads {opened.max_length} tokens at most")
    limits = EngineSettings(
        max_rows=args.max_rows,
        max_waiting=args.max_waiting,
        max_slots=args.max_length,
        kv_bytes=int(args.kv_memory * 1e9),
        prefix_bytes=0 if args.tensor_parallel else int(args.prefix_memory * 1e9),
        timeout=args.timeout or None,
    )
    settings = ServerSettings(
        name=args.served_model_name,
        api_key=args.api_key,
        allowed_hosts=_hosts(args.host, args.allowed_host),
        cors_origins=tuple(args.cors_origin or ()),
        max_body=args.max_body,
        log_texts=args.log_texts,
    )
    _start_logs()
    if args.tensor_parallel and rank() > 0:
        return follow(opened)
    bound = _bind(args.host, args.port)
    engine = Engine(opened, limits, Lead() if args.tensor_parallel else None)
    try:
        _listen(engine, settings, bound, args.host)
    finally:
        engine.close()
    if engine.failure is not None:
        raise ValueError(engine.failure)
    return 0


def _listen(engine: Engine, settings: ServerSettings, bound: socket.socket, host: str) -> None:
    """Answers until a signal comes, or the model cannot be loaded."""
    app = build_app(engine, settings)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False)
    server = _Server(config, engine)
    threading.Thread(target=_announce, args=(engine, server, bound, host), daemon=True).start()
    server.run(sockets=[bound])


def _hosts(host: str, more: list[str] | None) -> tuple[str, ...]:
    """The names that a Host header may have: on loopback those of this machine, elsewhere any unless they are given."""
    if host in LOCAL or host.startswith("127."):
        return (*LOCAL, host, *(more or ()))
    return tuple(more or ())


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise ValueError(f"cannot listen at {host} port {port} ({reason}): give another --host or --port") from None
    return bound


def _start_logs() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("dlm.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _announce(engine: Engine, server: uvicorn.Server, bound: socket.socket, host: str) -> None:
    """Says where the server listens once it is ready; ends it where the model cannot be loaded, or the engine ends."""
    port, shown = bound.getsockname()[1], f"[{host}]" if ":" in host else host
    began = time.monotonic()
    engine.loaded.wait()
    if engine.failure is not None:
        server.should_exit = True
        return
    while not server.started and not server.should_exit:
        time.sleep(0.005)
    fields = {"url": f"http://{shown}:{port}/", "model": engine.pretrained.name}
    log.info("ready", extra={"fields": fields | {"loading_seconds": round(time.monotonic() - began, 3)}})
    engine.ended.wait()
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, which on the first signal takes no new requests and finishes those that are there, and on the second
    stops at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine, self.signals = engine, 0

    def handle_exit(self, sig: int, frame) -> None:
        self.signals += 1
        if self.signals > 1:
            self.force_exit = True
            self.engine._abandon = True
        log.info("stopping", extra={"fields": {"signal": signal.Signals(sig).name, "at_once": self.signals > 1}})
        self.should_exit = True

    async def shutdown(self, sockets=None) -> None:
        drained = asyncio.get_running_loop().run_in_executor(None, self.engine.drain)
        await super().shutdown(sockets)
        if self.force_exit:
            self.engine._abandon = True
        await drained

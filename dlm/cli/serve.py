"""`dlm serve`: an OpenAI-compatible server for a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from dlm.cli.parser import Parser, check_least


def serve(argv: Sequence[str]) -> int:
    """`dlm serve`: serve a checkpoint until SIGTERM or Ctrl-C."""
    args = _parsed(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"dlm serve needs {error.name}: pip install 'dlm[serve]'") from None
    from dlm.serving.main import serve as run

    return run(args)


def _parsed(argv: Sequence[str]):
    parser = Parser("serve", "[options]", "Serve a checkpoint over HTTP in OpenAI's protocol, with a page at /.")
    parser.add_model()
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port, 0 for a free one (8000)")
    group.add_argument("--api-key", metavar="KEY", help="what clients must send (default: $DLM_API_KEY, else none)")
    group.add_argument("--allowed-host", action="append", metavar="NAME", help="name in a Host header; repeatable")
    group.add_argument("--cors-origin", action="append", metavar="URL", help="page of another server; repeatable")
    group.add_argument("--served-model-name", metavar="NAME", help="what /v1/models lists (default: the checkpoint's)")
    group.add_argument("--log-texts", action="store_true", help="log prompts and answers too")
    group.add_argument(
        "--tensor-parallel", action="store_true", help="share layers out over torchrun's processes, a GPU each"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-rows", type=int, default=16, metavar="N", help="texts denoised together (16)")
    limits.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="requests that may wait, then 429 (64)"
    )
    limits.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer (the model's limit)")
    limits.add_argument("--kv-memory", type=float, default=1.0, metavar="GB", help="for keys and values (1)")
    limits.add_argument(
        "--prefix-memory", type=float, default=0.064, metavar="GB", help="for blocks of prompts (0.064)"
    )
    limits.add_argument("--max-body", type=int, default=2**20, metavar="BYTES", help="of a request (1048576)")
    limits.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for a request, 0: none (600)")
    args = parser.parse(argv)
    check_least(args, 1, "max_rows", "max_body", "max_length")
    check_least(args, 0, "max_waiting", "timeout", "port", "prefix_memory")
    if args.port > 65535:
        raise ValueError(f"--port is {args.port}: give 65535 or less")
    if not 0 < args.kv_memory < math.inf:
        raise ValueError(f"--kv-memory is {args.kv_memory}: give gigabytes, above 0")
    if not math.isfinite(args.timeout):
        raise ValueError(f"--timeout is {args.timeout}: give seconds, or 0 for none")
    if args.api_key is None:
        args.api_key = os.environ.get("DLM_API_KEY") or None
    return args

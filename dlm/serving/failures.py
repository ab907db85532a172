"""What went wrong -> an answer in the shape of OpenAI's errors: status, message, type, param, code."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dlm.serving.protocol import INVALID, ApiError, error_body, message_of
from dlm.serving.requests import Closing, Expired, QueueFull, RowFailed

__all__ = ["ERRORS", "RETRY_SECONDS", "add_errors", "as_api_error"]

RETRY_SECONDS = 1
ERRORS = {
    400: "What was asked does not work",
    401: "No valid API key",
    404: "No such model",
    413: "The body is too large",
    421: "The Host header names another machine",
    429: "Too many requests wait",
    500: "The model failed on this request",
    503: "The model is being loaded, or the server shuts down",
    504: "The request's time was over",
}


def _error(status: int, message: str, kind: str, param=None, code=None, headers=None) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def add_errors(app: FastAPI) -> None:
    """Answers every error of the routes in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return _error(error.status, error.message, error.kind, error.param, error.code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        message, param = message_of(list(error.errors()))
        return _error(400, message, INVALID, param)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException):
        texts = {
            404: f"no {request.url.path[:80]} here: see /docs",
            405: f"{request.method[:20]} is not for {request.url.path[:80]}: see /docs",
        }
        message = texts.get(error.status_code, str(error.detail))
        return _error(error.status_code, message, INVALID, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return _error(500, "the server failed on this request; its log says why", "server_error")


def as_api_error(error: Exception) -> ApiError:
    """What the engine raised, as an answer."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), "rate_limit_error", None, "queue_full", RETRY_SECONDS)
        case Closing():
            return ApiError(503, str(error), "server_error", None, "shutting_down", RETRY_SECONDS)
        case Expired():
            return ApiError(504, f"{error}: ask for fewer tokens", "timeout_error", None, "timeout")
        case RowFailed():
            return ApiError(500, str(error), "server_error", None, "model_error")
        case ValueError() | ImportError():
            return ApiError(400, str(error), INVALID)
        case _:
            return ApiError(500, "the server failed on this request; its log says why", "server_error")

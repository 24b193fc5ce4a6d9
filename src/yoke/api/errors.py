"""How an error looks over HTTP: one OpenAI-shaped body for every refusal and failure. Knows nothing of endpoints.

The status comes from ``YokeError.http_status``. Whatever is not a deliberate error, or is Yoke's own fault, becomes a 500 that tells only the request's id.
"""

import asyncio
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException

from yoke.core.errors import RequestError, YokeError

# What OpenAI's servers send where they have a word for it, ours where they have none.
_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
}
_TYPES = {403: "permission_error", 429: "rate_limit_error"}
_HEADERS: dict[int, tuple[tuple[bytes, bytes], ...]] = {
    401: ((b"www-authenticate", b"Bearer"),),
    # The rest of the body is still on its way: the connection cannot carry another request.
    408: ((b"connection", b"close"),),
    413: ((b"connection", b"close"),),
}


class ClientGoneError(YokeError):
    """The client closed its connection before the answer was complete: there is nobody to tell."""

    http_status = 499


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error in the words of the API. ``param`` is the body's field at fault, ``headers`` are to be sent along."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        """The JSON body ``{"error": {...}}``."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})


def refusal_of(error: BaseException, request_id: str) -> Refusal:
    """What the client is told about ``error``; nothing of our insides when the fault is ours."""
    match error:
        case RequestError():
            status, message, param = error.http_status, str(error), error.field
        case YokeError() if error.http_status != 500:
            status, message, param = error.http_status, str(error), None
        case HTTPException():
            status, message, param = error.status_code, _routing_message(error), None
        case asyncio.CancelledError():
            status, message, param = 503, "the server is shutting down; ask again when it is back", None
        case _:
            status, message, param = 500, f"the server failed; its log has the cause under request {request_id}", None
    code = "model_not_found" if (status, param) == (404, "model") else _CODES.get(status)
    headers = _HEADERS.get(status, ())
    if isinstance(error, HTTPException) and error.headers:
        headers += tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items())
    return Refusal(status=status, message=message, param=param, code=code, headers=headers)


def _routing_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "nothing is served at this path; the API's paths begin with /v1/"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"this path does not take this method; use {allowed}"
    return error.detail

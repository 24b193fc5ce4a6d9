"""What every request passes, outside of all endpoints: its id, the key, the last word on errors, and one line in the log.

Endpoints just raise. Before the answer has begun, an error becomes an HTTP status; in the middle of a stream, an event; the request's log line is the same.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yoke.api.errors import ClientGoneError, refusal_of
from yoke.core.clock import Clock
from yoke.core.errors import RequestError, SettingError

log = logging.getLogger("yoke.api")

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key, so that a load balancer can ask."""

# A refused body is read on and thrown away for this long, so that a client which sends before it listens still gets the answer instead of a reset connection.
LINGER_S = 5.0
LINGER_BYTES = 256 * 2**20


@dataclass(slots=True, kw_only=True)
class Visit:
    """One HTTP request on its way: what the log will say about it. ``facts`` are the endpoint's own."""

    id: str
    status: int = 0
    started: bool = False
    complete: bool = False
    outcome: str = "done"
    facts: dict[str, object] = field(default_factory=dict)


def visit_of(scope: Scope) -> Visit:
    """The visit that `Gate` put into ``scope``."""
    visit: Visit = scope["yoke.visit"]
    return visit


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, can be nothing but this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Gate:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : the application inside.
    key : what clients must send as ``Authorization: Bearer KEY``; None lets everybody in who comes from this machine and not from a foreign web page.
    clock : for the durations in the log.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, clock: Clock) -> None:
        if key is not None and not key.strip():
            raise SettingError("the API key is empty; expected some characters, or no key at all")
        self._app = app
        self._key = None if key is None else key.encode()
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's event."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            # Nothing here speaks another protocol, and none may slip past the key.
            await send({"type": "websocket.close"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = Visit(id=secrets.token_hex(12))
        scope["yoke.visit"] = visit
        begun_s = self._clock.monotonic()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.started, visit.status = True, message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", visit.id.encode())]
            elif not message.get("more_body", False):
                visit.complete = True
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, receive, answer)
        except ClientGoneError:
            visit.outcome = "client gone"
        except asyncio.CancelledError as error:
            await self._fail(visit, error, receive, answer)
            raise
        except Exception as error:  # noqa: BLE001 - the edge: whatever happens inside, the client gets an answer and the server lives on
            await self._fail(visit, error, receive, answer)
        finally:
            self._log(scope, visit, self._clock.monotonic() - begun_s)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._key is None:
            _refuse_foreign_pages(headers)
        elif scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Bytes, because compare_digest takes no str beyond ASCII; latin-1, because that is how headers were decoded.
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                raise RequestError("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", status=401)

    async def _fail(self, visit: Visit, error: BaseException, receive: Receive, answer: Send) -> None:
        refusal = refusal_of(error, visit.id)
        visit.outcome = type(error).__name__
        if refusal.status == 500:
            log.error("request %s failed", visit.id, exc_info=error)
        if visit.complete:
            return
        if visit.started:
            # Only streams send their body in several messages, so this is the middle of one.
            await answer({"type": "http.response.body", "body": b"data: " + refusal.body() + b"\n\n"})
            return
        await send_body(answer, refusal.status, refusal.body(), refusal.headers, more=refusal.status == 413)
        if refusal.status == 413:
            await _linger(receive)
            await answer({"type": "http.response.body", "body": b""})

    def _log(self, scope: Scope, visit: Visit, duration_s: float) -> None:
        facts = {
            "id": visit.id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": visit.status or ClientGoneError.http_status,
            "outcome": visit.outcome,
            "duration_ms": round(duration_s * 1e3, 1),
            **visit.facts,
        }
        # Values that a client chose are quoted: a line break in a path must not begin a line of the log.
        line = " ".join(f"{name}={value!r}" if isinstance(value, str) and not value.isalnum() else f"{name}={value}" for name, value in facts.items())
        log.info("request %s", line, extra={"request": facts})


async def send_body(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), *, more: bool = False) -> None:
    """Send a whole JSON body; with ``more`` an empty last message is still to come."""
    described = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": described})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _linger(receive: Receive) -> None:
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _refuse_foreign_pages(headers: Headers) -> None:
    """Without a key only this machine may ask, but a web page in its browser can send requests too, under its own name or one that it points here."""
    host = headers.get("host", "localhost")
    if not is_loopback(_host_name(host)):
        raise RequestError(f"without an API key only this machine is answered, not requests for host {host[:100]!r}; set a key", status=403)
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise RequestError(f"without an API key the web page {origin[:100]!r} is not answered; set a key", status=403)


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""

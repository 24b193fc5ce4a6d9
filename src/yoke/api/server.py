"""The application put together, and served: uvicorn inside an event loop that is already running. Knows no endpoint's insides."""

import asyncio
import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yoke.api import nodes, openai, status
from yoke.api.gate import Gate, is_loopback
from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import SettingError
from yoke.core.request import Cluster

MAX_BODY_BYTES = 8 * 2**20
"""A prompt of two million tokens fits; more is a mistake or an attack."""

# When the server stops, answers in flight may take this long to end by themselves.
GRACE_S = 2
# An idle connection is kept this long; clients that poll or chat reuse it. Longer than the 60 s after which common proxies give up theirs.
KEEP_ALIVE_S = 75


def create_app(
    cluster: Cluster, *, key: str | None = None, admin_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES, clock: Clock | None = None
) -> Starlette:
    """The HTTP application over ``cluster``.

    Parameters
    ----------
    cluster : the pool, real or fake.
    key : what clients must send as a bearer token; None: no key, and then only requests addressed to this machine by a loopback name are answered.
    admin_key : what changing the cluster takes; None: nobody can.
    max_body_bytes : larger bodies are refused with 413.
    clock : dates and durations.

    Raises
    ------
    SettingError
        if the key is empty.
    """
    clock = clock or SystemClock()
    if key is not None and not key.strip():
        raise SettingError("the API key is empty; expected some characters, or no key at all")
    app = Starlette(
        routes=[*openai.routes(cluster, max_body_bytes=max_body_bytes, clock=clock), *status.routes(cluster), *nodes.routes(cluster, admin_key)],
        middleware=[Middleware(Gate, key=key, clock=clock)],
        exception_handlers={HTTPException: _raise},
    )
    # A path is right or wrong: a redirect would have to carry the body again.
    app.router.redirect_slashes = False
    app.state.has_key = key is not None
    return app


def check_host(host: str, *, has_key: bool) -> None:
    """Refuse to be reachable by other machines without a key.

    Raises
    ------
    SettingError
        if ``host`` is more than this machine and there is no key.
    """
    if not is_loopback(host) and not has_key:
        raise SettingError(f"host {host} can be reached by other machines, and the API has no key; set a key, or bind 127.0.0.1")


async def serve_http(
    app: Starlette, *, host: str = "127.0.0.1", port: int = 0, bound: socket.socket | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Serve ``app`` until cancelled; answers in flight then have `GRACE_S` to end.

    Parameters
    ----------
    app : what `create_app` made.
    host : name or address to bind.
    port : TCP port; 0 takes a free one.
    bound : what `bind_http` gave for host and port, where that was called before; closed at the end.
    ready : called with the base URL, port included, once connections are accepted.

    Raises
    ------
    SettingError
        if ``host`` is more than this machine and the application has no key, or if the address cannot be bound.
    """
    check_host(host, has_key=getattr(app.state, "has_key", False))
    with bound or await bind_http(host, port) as listener:
        url = url_of(host, listener)
        server = _Server(app, (lambda: ready(url)) if ready else (lambda: None))
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve(sockets=[listener]))
            try:
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                server.should_exit = True
                await serving
                await server.last_answers()
                raise


def url_of(host: str, bound: socket.socket) -> str:
    """The base URL of a socket that `bind_http` gave for ``host``."""
    number = bound.getsockname()[1]
    return f"http://[{host.strip('[]')}]:{number}" if ":" in host else f"http://{host}:{number}"


class _Server(uvicorn.Server):
    """Uvicorn without its hold on signals, which belong to the process, and with a word when it is up."""

    def __init__(self, app: Starlette, ready: Callable[[], None]) -> None:
        async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                # Only uvicorn cancels here, at the end of the grace; the gate has told the client, and uvicorn would log a traceback.
                return

        super().__init__(
            uvicorn.Config(
                quiet,
                loop="none",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting, then say so."""
        await super().startup(sockets=sockets)
        self._ready()

    async def last_answers(self) -> None:
        """Wait for the answers that were cut off to end, and their connections to close."""
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=1.0)
        # A transport closes in a later turn of the loop.
        await asyncio.sleep(0)


async def bind_http(host: str, port: int) -> socket.socket:
    """Take an address before there is anything to serve: nobody is let in until `serve_http` has the socket.

    Raises
    ------
    SettingError
        if the address cannot be bound.
    """
    if not 0 <= port <= 65_535:
        # The resolver would take it modulo 65536.
        raise SettingError(f"port is {port}; expected 0 to 65535, where 0 takes a free one")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # elsewhere it would let two programs have one port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address[:2])
        except BaseException:
            bound.close()
            raise
        return bound
    except (OSError, UnicodeError) as error:
        raise SettingError(f"cannot listen on {host} port {port}: {error}; choose another host or port") from None


async def _raise(_: HttpRequest, error: Exception) -> Response:
    # Starlette would answer in plain text; the gate answers in the API's words.
    raise error

"""The OpenAI-compatible endpoints: a body in, one core request to the cluster, its events out, whole or streamed.

Errors are raised and left to `yoke.api.gate`. A client that goes away closes the cluster's iterator, and with it the generation.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import cast

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from yoke.api.answers import CHAT, COMPLETION, Answer, Dialect
from yoke.api.bodies import Call, find_model, parse_chat, parse_completion
from yoke.api.errors import ClientGoneError
from yoke.api.gate import Visit, send_body, visit_of
from yoke.core.clock import Clock
from yoke.core.errors import InvariantError, NodeError, RequestError
from yoke.core.request import Cluster, Event, Finished, ModelCard, Piece, Started

# How long a client may take to send its body. Generous: 8 MiB in 60 s is 1.1 Mbit/s.
BODY_DEADLINE_S = 60.0

Parser = Callable[[bytes, str, Sequence[ModelCard]], Call]


def routes(cluster: Cluster, *, max_body_bytes: int, clock: Clock) -> list[Route]:
    """The API's paths over ``cluster``."""

    def generation(parse: Parser, dialect: Dialect) -> "Generation":
        return Generation(cluster, parse=parse, dialect=dialect, max_body_bytes=max_body_bytes, clock=clock)

    async def models(_: HttpRequest) -> Response:
        """Every model that is loaded."""
        return _json({"object": "list", "data": [_model(card) for card in cluster.models()]})

    async def model(request: HttpRequest) -> Response:
        """One of them."""
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        return _json(_model(find_model(name, cluster.models())))

    async def health(_: HttpRequest) -> Response:
        """Whether a plan is there."""
        status = await cluster.status()
        if status.plan is None:
            raise NodeError("no plan: no model is loaded, or a machine that is needed is missing")
        return _json({"status": "ok", "running": status.running, "queued": status.queued})

    return [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{id:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", generation(parse_chat, CHAT), methods=["POST"]),
        Route("/v1/completions", generation(parse_completion, COMPLETION), methods=["POST"]),
    ]


class Generation:
    """One endpoint that generates text: an ASGI application that speaks raw messages, because a streamed token should cost no more than it must.

    Parameters
    ----------
    cluster : answers the requests.
    parse : turns a body into a call.
    dialect : how answers are written.
    max_body_bytes : larger bodies are refused while they come in.
    clock : for the answers' dates.
    """

    def __init__(self, cluster: Cluster, *, parse: Parser, dialect: Dialect, max_body_bytes: int, clock: Clock) -> None:
        self._cluster = cluster
        self._parse = parse
        self._dialect = dialect
        self._max_body_bytes = max_body_bytes
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        body = await read_body(Headers(scope=scope), receive, self._max_body_bytes)
        visit = visit_of(scope)
        call = self._parse(body, visit.id, self._cluster.models())
        visit.facts.update(model=call.request.model, stream=call.stream)
        del body
        try:
            async with asyncio.TaskGroup() as group:
                answering = group.create_task(self._answer(call, visit, send))
                # ASGI says "disconnect" when the client is gone and when the answer is complete: either way there is no more to do.
                await _until_disconnect(receive)
                if not visit.complete and answering.cancel():
                    visit.outcome = "client gone"
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer(self, call: Call, visit: Visit, send: Send) -> None:
        answer = Answer(
            dialect=self._dialect,
            request_id=visit.id,
            model=call.request.model,
            created=int(self._clock.epoch()),
            include_usage=call.include_usage,
            timings=call.timings,
        )
        # The cluster's contract: closing the iterator cancels the request. So it has a close, though its type does not say so.
        events = cast("AsyncGenerator[Event, None]", self._cluster.generate(call.request))
        async with aclosing(events):
            # The first event says that the prompt was accepted; until it is here, an error can still be an HTTP status.
            started = await anext(events, None)
            if not isinstance(started, Started):
                raise InvariantError(f"an answer began with {started!r}; expected Started")
            finished = await (_stream(events, answer, send) if call.stream else _whole(events, answer, send))
        visit.facts.update(prompt_tokens=finished.prompt_tokens, completion_tokens=finished.completion_tokens, reason=finished.reason.value)


async def _stream(events: AsyncGenerator[Event, None], answer: Answer, send: Send) -> Finished:
    chunks = answer.chunks()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": chunks.opening(), "more_body": True})
    finished = None
    async for event in events:
        if isinstance(event, Piece):
            if event.text:
                await send({"type": "http.response.body", "body": chunks.piece(event), "more_body": True})
        elif isinstance(event, Finished):
            finished = event
    # Sent after the iterator has ended: once an answer is complete, nothing of it is left that a client could cancel.
    if finished is None:
        raise InvariantError("an answer ended without Finished")
    await send({"type": "http.response.body", "body": chunks.closing(finished)})
    return finished


async def _whole(events: AsyncGenerator[Event, None], answer: Answer, send: Send) -> Finished:
    texts: list[str] = []
    finished = None
    async for event in events:
        if isinstance(event, Piece):
            texts.append(event.text)
        elif isinstance(event, Finished):
            finished = event
    if finished is None:
        raise InvariantError("an answer ended without Finished")
    await send_body(send, 200, answer.whole("".join(texts), finished))
    return finished


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The request's whole body, refused as soon as it is known to be larger than ``max_bytes``; never more than that and one network read is held.

    Raises
    ------
    RequestError
        with status 413 if the body is too large, 408 if it does not come within `BODY_DEADLINE_S`.
    ClientGoneError
        if the connection ends first.
    """
    too_large = RequestError(f"the body is larger than {max_bytes} bytes; send less", status=413)
    declared = headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client left while it sent its body")
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_DEADLINE_S:.0f} s", status=408) from None


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _model(card: ModelCard) -> dict[str, object]:
    own = {"context": card.context, "vocabulary": card.vocabulary, "has_chat_template": card.has_chat_template}
    return {"id": card.name, "object": "model", "created": card.created_at, "owned_by": "yoke", "yoke": own}


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")

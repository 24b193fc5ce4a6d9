"""The answers under way, as the one who asked sees them. The tokens are the session: what is kept here is enough to go on with each answer in another engine."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from yoke.core.errors import RemoteProtocolError, RequestError, YokeError
from yoke.core.request import Event, Finished, Piece, Request, Started
from yoke.run.intake import Resume


@dataclass(slots=True)
class Ticket:
    """One answer: what was asked, what its prompt's tokens are once an engine has said so, and what has been drawn."""

    request: Request
    events: "asyncio.Queue[Event | YokeError]" = field(default_factory=asyncio.Queue)
    prompt: tuple[int, ...] = ()
    drawn: list[int] = field(default_factory=list)
    is_started: bool = False

    @property
    def resume(self) -> Resume | None:
        """What another engine needs to go on; None if it shall begin."""
        return Resume(prompt=self.prompt, drawn=tuple(self.drawn)) if self.is_started else None


class Desk:
    """All answers under way, by request id.

    What an engine says of them is held to the model's ``vocabulary`` and to the ``context``, since another engine will be told to go on from there.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}
        self.vocabulary = self.context = sys.maxsize

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(tuple(self._tickets.values()))

    def open(self, request: Request) -> Ticket:
        """A new answer.

        Raises
        ------
        RequestError
            if one of that id is under way.
        """
        if request.id in self._tickets:
            raise RequestError(f"a request with id {request.id!r} is being answered already", field="id")
        ticket = self._tickets[request.id] = Ticket(request)
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any more."""
        self._tickets.pop(ticket.request.id, None)

    def accept(self, request_id: str, prompt: tuple[int, ...]) -> None:
        """The engine has understood a request.

        Raises
        ------
        RemoteProtocolError
            if that is no prompt of this model.
        """
        self._check(prompt, len(prompt) + 1)
        if not prompt:
            raise RemoteProtocolError("an engine has read a prompt without a token")
        if (ticket := self._tickets.get(request_id)) is not None:
            ticket.prompt = prompt

    def tell(self, request_id: str, event: Event | YokeError) -> None:
        """Pass an event on to whoever waits for it; what nobody waits for is dropped.

        Raises
        ------
        RemoteProtocolError
            if it cannot be one of this answer.
        """
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return
        match event:
            case Started():
                if not ticket.prompt:
                    raise RemoteProtocolError("an engine has begun an answer to a prompt that it has not read")
                ticket.is_started = True
            case Piece(tokens=tokens):
                self._check(tokens, len(ticket.prompt) + len(ticket.drawn) + len(tokens))
                ticket.drawn += tokens
            case Finished() | YokeError():
                del self._tickets[request_id]
        ticket.events.put_nowait(event)

    def _check(self, tokens: Sequence[int], n_tokens: int) -> None:
        if n_tokens > self.context or any(not 0 <= token < self.vocabulary for token in tokens):
            raise RemoteProtocolError(
                f"an engine speaks of {n_tokens} tokens from {min(tokens, default=0)} to {max(tokens, default=0)}; expected at most {self.context}, "
                f"each below {self.vocabulary}"
            )

    def tell_all(self, error: YokeError) -> None:
        """End every answer with an error."""
        for request_id in tuple(self._tickets):
            self.tell(request_id, error)

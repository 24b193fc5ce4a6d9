"""``yoke chat``: a conversation in the terminal."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from yoke.cli import options
from yoke.cli.opening import loaded_cluster, run_until_signal
from yoke.cli.render import errors
from yoke.core.errors import RequestError
from yoke.core.request import Message, ModelCard, Piece, Request, Role, Sampling
from yoke.core.settings import Settings
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout

MAX_LINE_BYTES = 1 << 16


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", help="Talk with MODEL. Ctrl-D or /bye ends, Ctrl-C stops an answer.")(chat)


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability together.")] = 0.95,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Write at most this many tokens in an answer.")] = 1024,
    local_nodes: options.LocalNodes = 1,
    context: options.Context = None,
    threads: options.Threads = None,
    device: options.Device = None,
    chat_template: options.ChatTemplate = None,
    state_dir: options.StateDir = None,
) -> None:
    """Talk with a model."""
    settings = options.settings(context=context, threads=threads, device=device, chat_template=chat_template, state_dir=state_dir)
    talk = _Talk(Sampling(temperature=temperature, top_p=top_p), max_tokens, [Message(role=Role.SYSTEM, content=system)] if system else [])
    run_until_signal(_converse(model, settings, Layout(local_nodes=local_nodes), talk))


@dataclass(slots=True)
class _Talk:
    """A conversation: how to draw, how long answers may be, what was said."""

    sampling: Sampling
    max_tokens: int
    turns: list[Message]

    def request(self, card: ModelCard, line: str) -> Request:
        """The next turn's request; a model without a template is given the line alone."""
        self.turns.append(Message(role=Role.USER, content=line))
        return Request(
            id=secrets.token_hex(8),
            model=card.name,
            text=None if card.has_chat_template else line,
            messages=tuple(self.turns) if card.has_chat_template else None,
            max_tokens=self.max_tokens,
            sampling=replace(self.sampling, seed=secrets.randbits(32)),
        )

    def forget(self) -> None:
        """Leave the last thing that was said out of what follows, if it got no answer."""
        if self.turns and self.turns[-1].role is Role.USER:
            self.turns.pop()


async def _converse(path: Path, settings: Settings, layout: Layout, talk: _Talk) -> None:
    async with loaded_cluster(path, settings, layout) as cluster:
        card = cluster.models()[0]
        if not card.has_chat_template:
            errors.print(f"{card.name} has no chat template: it continues your text instead of answering it.", style="yellow")
        lines = _Lines()
        while (line := await lines.read()) is not None:
            try:
                answer = await _say(cluster, talk.request(card, options.checked_text(line)))
            except RequestError as error:  # this turn is impossible; the conversation goes on without it
                errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
                talk.forget()
            else:
                talk.turns.append(Message(role=Role.ASSISTANT, content=answer))


class _Lines:
    """What the person types. Waited for in the event loop where the system can: a thread that reads could not be stopped by Ctrl-C."""

    def __init__(self) -> None:
        self._pending = b""

    async def read(self) -> bytes | None:
        """The next line with something in it; None when the person leaves."""
        while True:
            typer.echo("> ", nl=False)
            line = await self._next()
            if not line:
                typer.echo()
                return None
            if line.strip() == b"/bye":
                return None
            if line.strip():
                return line.rstrip(b"\r\n")

    async def _next(self) -> bytes:
        while b"\n" not in self._pending:
            data = await _read_input()
            if not data:
                line, self._pending = self._pending, b""
                return line
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line + b"\n"


async def _read_input() -> bytes:
    """Bytes from standard input as soon as there are some; none at its end."""
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except NotImplementedError:  # Windows
        return await asyncio.to_thread(sys.stdin.buffer.readline)
    except PermissionError:  # a plain file is always readable
        return os.read(descriptor, MAX_LINE_BYTES)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, MAX_LINE_BYTES)


async def _say(cluster: Coordinator, request: Request) -> str:
    """Stream one answer; Ctrl-C stops it and keeps what came. (On Windows, where loops take no signal handlers, it ends the conversation.)"""
    said: list[str] = []
    answer = asyncio.ensure_future(_stream(cluster, request, said))
    loop, me, before = asyncio.get_running_loop(), asyncio.current_task(), signal.getsignal(signal.SIGINT)
    with contextlib.suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, answer.cancel)
    try:
        await answer
    except asyncio.CancelledError:
        if me is not None and me.cancelling():  # not the answer alone shall end, but all of this
            raise
        errors.print(" [stopped]", markup=False)
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
    typer.echo()
    return "".join(said)


async def _stream(cluster: Coordinator, request: Request, said: list[str]) -> None:
    async with contextlib.aclosing(cluster.generate(request)) as events:
        async for event in events:
            if isinstance(event, Piece):
                said.append(event.text)
                typer.echo(event.text, nl=False)

"""A machine that gives its hardware to somebody else's cluster: knocks, starts a worker, and passes messages on; comes back by itself when the way was cut."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto

from msgspec.structs import replace

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.node import messages as say
from yoke.node.framing import Bodies
from yoke.node.links import WorkerProcess, introduce
from yoke.node.profile import Tell, silent

LEAVE_S = 15.0
"""How long a machine that wants to go waits for the cluster to manage without it."""

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 5.0

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Knock = Callable[[], Awaitable[Stream]]
_RELEASE = say.encode(say.Release())[4:]


class Ending(Enum):
    """How a membership ended."""

    RELEASED = auto()
    COORDINATOR_GONE = auto()
    WORKER_GONE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who is told what is being measured, that this machine has joined, and that it lost the cluster and tries to find it again."""

    measuring: Tell = silent
    joined: Callable[[say.Ready], None] = lambda _ready: None
    lost: Callable[[str], None] = lambda _why: None


async def serve_member(knock: Knock, start: say.Start, tell: Listeners, *, patience_s: float) -> None:
    """Be a member until the cluster releases this machine. Cancelling it hands over first: it waits up to `LEAVE_S` for the others to manage without it.

    Parameters
    ----------
    knock : asks to be let in, and gives the control connection. The first failure is the caller's; later ones are tried again for ``patience_s`` seconds.
    start : what the worker is told; ``host`` is set to the address that this machine has towards the coordinator.

    Raises
    ------
    NodeError
        if the coordinator refuses, or stays away for too long.
    """
    stream = await knock()
    while True:
        ending, why, ready = await _serve_once(stream, start, tell)
        start = replace(start, known=ready.devices, notes=ready.notes)
        if ending is Ending.RELEASED:
            return
        tell.lost(why)
        stream = await _knock_again(knock, patience_s)


async def _knock_again(knock: Knock, patience_s: float) -> Stream:
    """Knock until somebody opens, ever more patiently."""
    pause_s, stop_s = FIRST_RETRY_S, asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            return await knock()
        except NodeGone:
            if asyncio.get_running_loop().time() + pause_s > stop_s:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(LAST_RETRY_S, 2 * pause_s)


async def _serve_once(stream: Stream, start: say.Start, tell: Listeners) -> tuple[Ending, str, say.Ready]:
    """One connection's life, with a worker of its own."""
    reader, writer = stream
    try:
        process = await WorkerProcess.spawn()
        try:
            host = str(writer.get_extra_info("sockname")[0])
            ready = await introduce(process.bodies, process.writer, replace(start, host=host), tell.measuring)
            writer.write(say.encode(ready))
            tell.joined(ready)
            return *await _stay(reader, writer, process), ready
        finally:
            await process.end()
    finally:
        writer.close()


async def _stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: WorkerProcess) -> tuple[Ending, str]:
    """Pass messages on, each way, until one way ends."""
    down = asyncio.create_task(_pass_on(Bodies(reader), process.writer))
    up = asyncio.create_task(_pass_on(process.bodies, writer))
    try:
        try:
            await asyncio.wait([down, up], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            writer.write(say.encode(say.Leaving()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await asyncio.wait([down, up], return_when=asyncio.FIRST_COMPLETED)
            raise
        if not down.done():
            return Ending.WORKER_GONE, f"the worker ended ({up.result()})"
        why = down.result()
        return (Ending.RELEASED, "released") if why is None else (Ending.COORDINATOR_GONE, f"the coordinator is gone ({why})")
    finally:
        for task in (down, up):
            task.cancel()
        await asyncio.gather(down, up, return_exceptions=True)


async def _pass_on(bodies: Bodies, writer: asyncio.StreamWriter) -> str | None:
    """Why messages came to an end; None if the last was the word that this machine may go."""
    while True:
        try:
            body = await bodies.next()
            writer.write(len(body).to_bytes(4, "little") + body)
            await writer.drain()
        except (NodeGone, RemoteProtocolError, OSError) as error:
            return str(error)
        if body == _RELEASE:
            return None

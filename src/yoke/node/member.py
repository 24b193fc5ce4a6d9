"""A machine that gives its hardware to somebody else's cluster: knocks, starts a worker, and passes messages on until one side ends."""

import asyncio
from collections.abc import Callable

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.net.identity import Identity
from yoke.net.invite import Invite
from yoke.node import messages as say
from yoke.node.admission import knock
from yoke.node.links import WorkerProcess, introduce


async def serve_member(invite: Invite, identity: Identity, start: say.Start, on_joined: Callable[[say.Ready], None]) -> None:
    """Join the cluster of ``invite`` and stay until it ends. ``start.host`` is set to the address that this machine has towards the coordinator.

    Raises
    ------
    AdmissionError
        if the coordinator refuses, or is not the one that the invite names.
    NodeGone
        when the coordinator or the worker is gone.
    """
    reader, writer = await knock(invite, identity)
    try:
        process = await WorkerProcess.spawn()
        try:
            host = str(writer.get_extra_info("sockname")[0])
            ready = await introduce(process.bodies, process.writer, _at(start, host))
            writer.write(say.encode(ready))
            on_joined(ready)
            await _relay((say.Bodies(reader), process.writer), (process.bodies, writer))
        finally:
            await process.end()
    finally:
        writer.close()


async def _relay(*ways: tuple[say.Bodies, asyncio.StreamWriter]) -> None:
    """Pass messages on, each way, until one way ends; its error is the reason."""
    tasks = [asyncio.create_task(_pass_on(*way)) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for name, result in zip(("the coordinator", "the worker"), results, strict=True):
        if isinstance(result, NodeGone | RemoteProtocolError):
            raise NodeGone(f"{name} is gone: {result}")


async def _pass_on(bodies: say.Bodies, writer: asyncio.StreamWriter) -> None:
    while True:
        body = await bodies.next()
        try:
            writer.write(len(body).to_bytes(4, "little") + body)
            await writer.drain()
        except OSError as error:
            raise NodeGone(str(error)) from error


def _at(start: say.Start, host: str) -> say.Start:
    return say.Start(**{name: getattr(start, name) for name in start.__struct_fields__} | {"host": host})

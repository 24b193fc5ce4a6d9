"""The coordinator's hold on one worker: a stream of messages, whether it leads to a child process or through TLS to another machine."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from yoke.core.errors import NodeGone, YokeError
from yoke.core.node import NodeId
from yoke.node import messages as say
from yoke.node.framing import Bodies
from yoke.node.notes import noted_error
from yoke.node.profile import Tell, silent

PIPE_BYTES = 1 << 20
END_S = 2.0
SILENCE_S = 30.0
"""How long a worker that introduces itself may say nothing. One that measures says how far it is."""


class WorkerProcess:
    """A worker in a child process. When its control stream closes, it ends by itself."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise NodeGone("the worker was started without pipes")
        self.process = process
        self.bodies, self.writer = Bodies(process.stdout), process.stdin

    @classmethod
    async def spawn(cls) -> "WorkerProcess":
        """Start a worker with this interpreter."""
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # a debugger's dump helps nobody who runs a model
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "yoke.node.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=PIPE_BYTES,
            env=environment,
        )
        return cls(process)

    def kill(self) -> None:
        """End it at once: a stopped process does not see that its stream has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> None:
        """Close the stream, and kill what does not end by itself."""
        self.writer.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_S):
                    await self.process.wait()
        finally:  # also when there is no time to wait
            self.kill()
            await self.process.wait()


@dataclass(slots=True)
class WorkerLink:
    """One worker as the coordinator sees it. ``host`` is where the others reach its data plane; ``cut`` ends the connection at once, whatever state it is in."""

    id: NodeId
    name: str
    host: str
    bodies: Bodies
    writer: asyncio.StreamWriter
    ready: say.Ready
    cut: Callable[[], None]

    def post(self, message: say.ToWorker) -> None:
        """Say something without waiting: what a slow or silent node has not taken is kept until it has, or is dropped with the connection."""
        if not self.writer.is_closing():
            self.writer.write(say.encode(message))

    @property
    def peer(self) -> say.Peer:
        """What other workers need to meet this one."""
        return say.Peer(id=self.id, name=self.name, certificate=self.ready.certificate, host=self.host, port=self.ready.port)

    async def receive(self) -> say.FromWorker:
        """The next message.

        Raises
        ------
        NodeGone
            if the stream ended.
        RemoteProtocolError
            if what came is no message.
        """
        return say.decode_from_worker(await self.bodies.next())


async def introduce(bodies: Bodies, writer: asyncio.StreamWriter, start: say.Start | None, tell: Tell = silent) -> say.Ready:
    """Start a worker's conversation: send ``start``, unless its own node process has done so, and wait for its introduction.

    Raises
    ------
    YokeError
        what the worker says, if it cannot start.
    NodeGone
        if it ends instead, or says something else.
    TimeoutError
        if it says nothing for `SILENCE_S`.
    """
    if start is not None:
        writer.write(say.encode(start))
        await writer.drain()
    while True:
        async with asyncio.timeout(SILENCE_S):
            body = await bodies.next()
        match say.decode_from_worker(body):
            case say.Measuring(what=what, share=share):
                tell(what, share)
            case say.Ready() as ready:
                return ready
            case say.Failed(error=note):
                failure: YokeError = noted_error(note)
                raise failure
            case other:
                raise NodeGone(f"a worker's first word was {type(other).__name__}; expected Ready")

"""How a step goes round the stages: the engine's end of it, and the loop of every other worker."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yoke.backends.ops import Floats
from yoke.core.errors import RemoteProtocolError
from yoke.core.frame import Drawn, Frame
from yoke.net.channel import Channel, receive_message, send_message
from yoke.net.codec import HELLO_LIMITS, Limits
from yoke.run.scheduler import Step
from yoke.run.stage import StageRunner

Embed = Callable[[Sequence[int]], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """The engine's channels: to the other ranks of its stage, which must compute each step too; to every rank of the next stage; from the last stage's head.

    ``following`` is empty and ``result`` is None if there is one stage. ``limits`` hold what the last stage may send.
    """

    mates: Sequence[Channel] = ()
    following: Sequence[Channel] = ()
    result: Channel | None = None
    limits: Limits = HELLO_LIMITS


class Pipeline:
    """The first stage's head. Steps go out through `start`; drawn tokens come back through ``deliver``, from `start` itself or from `wait`.

    Parameters
    ----------
    embed : token ids to the residual stream [T, D], float32.
    ways : the channels to the other workers.
    """

    def __init__(self, runner: StageRunner, plan_version: int, embed: Embed, ways: Ways) -> None:
        self._runner, self._plan_version, self._embed = runner, plan_version, embed
        self._ways = ways
        self._nudged = threading.Event()

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        """Compute this stage's part of a step and pass it on.

        Raises
        ------
        NodeError
            if a neighbour is gone or the device failed.
        """
        frame = Frame(plan_version=self._plan_version, step=step.number, batch=step.batch, hidden=self._embed(step.batch.tokens).data.cast("B"))
        _send(self._runner, self._ways.mates, frame)
        match self._runner.step(frame):
            case Drawn() as drawn:
                deliver(drawn)
            case Frame() as onward:
                _send(self._runner, self._ways.following, onward)

    def wait(self, deliver: Callable[[Drawn], None]) -> None:
        """Wait for the next drawn tokens, or until `nudge` was called.

        Raises
        ------
        NodeError
            if the last stage is gone, or sent something else.
        """
        result = self._ways.result
        if result is None:
            self._nudged.wait()
            self._nudged.clear()
        elif result.await_bytes():
            message = receive_message(result, self._ways.limits)
            if not isinstance(message, Drawn):
                raise RemoteProtocolError(f"the last stage sent a {type(message).__name__}; expected drawn tokens")
            if message.plan_version == self._plan_version:
                deliver(message)
            else:
                self._runner.clocks.late += 1

    def nudge(self) -> None:
        """Let `wait` return, now or at its next call. From any thread."""
        if self._ways.result is None:
            self._nudged.set()
        else:
            self._ways.result.nudge()

    def close(self) -> None:
        """End the channels and free the shard."""
        for channel in (*self._ways.mates, *self._ways.following):
            channel.close()
        self._runner.close()


def serve_stage(runner: StageRunner, inlet: Channel, outlets: Sequence[Channel], limits: Limits, plan_version: int) -> None:
    """The life of a worker without the engine: frame in, frame or drawn tokens out, until a neighbour is gone.

    Parameters
    ----------
    outlets : every rank of the next stage, or the engine alone if this stage is the last; empty for ranks other than 0.

    Raises
    ------
    NodeGone
        when a neighbour's connection ends.
    RemoteProtocolError
        if what arrives is not a frame.
    """
    while True:
        started = time.perf_counter()
        message = receive_message(inlet, limits)
        runner.clocks.waiting_s += time.perf_counter() - started
        if not isinstance(message, Frame):
            raise RemoteProtocolError(f"{inlet.peer[:8]} sent a {type(message).__name__}; expected a Frame")
        if message.plan_version != plan_version:
            runner.clocks.late += 1
            continue
        _send(runner, outlets, runner.step(message))


def _send(runner: StageRunner, channels: Sequence[Channel], message: Frame | Drawn) -> None:
    started = time.perf_counter()
    for channel in channels:
        send_message(channel, message)
    runner.clocks.wire_s += time.perf_counter() - started

"""How a step goes round the stages: the engine's end of it, and the loop of every other worker."""

import time
from collections.abc import Callable, Sequence

from yoke.backends.ops import Floats
from yoke.core.errors import RemoteProtocolError
from yoke.core.frame import Drawn, Frame
from yoke.net.channel import Channel, receive_message, send_message
from yoke.net.codec import Limits
from yoke.run.scheduler import Step
from yoke.run.stage import StageRunner

Embed = Callable[[Sequence[int]], Floats]


class Pipeline:
    """The first stage's head. Steps go out through `start`; drawn tokens come back through ``deliver``, from this thread or from the result channel's reader.

    Parameters
    ----------
    embed : token ids to the residual stream [T, D], float32.
    mates : channels to the other ranks of this stage, which must compute each step too.
    following : channels to every rank of the next stage; empty if this stage is the last.
    """

    def __init__(self, runner: StageRunner, plan_version: int, embed: Embed, mates: Sequence[Channel], following: Sequence[Channel]) -> None:
        self._runner, self._plan_version, self._embed = runner, plan_version, embed
        self._mates, self._following = mates, following

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        """Compute this stage's part of a step and pass it on.

        Raises
        ------
        NodeError
            if a neighbour is gone or the device failed.
        """
        frame = Frame(plan_version=self._plan_version, step=step.number, batch=step.batch, hidden=self._embed(step.batch.tokens).data.cast("B"))
        _send(self._runner, self._mates, frame)
        match self._runner.step(frame):
            case Drawn() as drawn:
                deliver(drawn)
            case Frame() as onward:
                _send(self._runner, self._following, onward)

    def close(self) -> None:
        """End the channels and free the shard."""
        for channel in (*self._mates, *self._following):
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
            continue  # a late frame of an older plan
        _send(runner, outlets, runner.step(message))


def _send(runner: StageRunner, channels: Sequence[Channel], message: Frame | Drawn) -> None:
    started = time.perf_counter()
    for channel in channels:
        send_message(channel, message)
    runner.clocks.wire_s += time.perf_counter() - started

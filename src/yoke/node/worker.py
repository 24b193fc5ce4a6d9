"""The process that holds one shard. Its main thread computes and does nothing else; a reader thread takes orders from the control stream (standard input).

When the stream ends, the process ends at once, whatever it is doing: a node process that dies leaves no worker behind.
"""

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

import yoke
from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend, Floats
from yoke.backends.reference import ReferenceBackend
from yoke.core.clock import SystemClock
from yoke.core.errors import BackendError, InvariantError, NodeGone, RemoteProtocolError, SettingError, YokeError
from yoke.core.node import Device
from yoke.core.request import StageTimes
from yoke.net.codec import Limits
from yoke.net.group import ChannelGroup, Group, SoloGroup
from yoke.net.identity import Identity
from yoke.net.tcp import Listener
from yoke.node import messages as say
from yoke.node.holding import Holding, Shape, unless
from yoke.node.loading import CoordinatorSource
from yoke.node.porter import Porter
from yoke.node.wiring import Wires, wire
from yoke.run.chat import ChatTemplate
from yoke.run.engine import Cancel, Engine, Stop
from yoke.run.intake import Intake
from yoke.run.pipeline import Pipeline, Ways, serve_stage
from yoke.run.scheduler import Limits as SchedulerLimits
from yoke.run.scheduler import Scheduler
from yoke.run.stage import StageRunner
from yoke.weights.gguf import GgufFile
from yoke.weights.tokenizer import Tokenizer

PROGRESS_S = 0.1
SWITCH_INTERVAL_S = 1e-4
"""How long another Python thread may keep the token loop waiting; 5 ms is Python's default, longer than a small model's step (measured)."""


class ControlStream:
    """The worker's end of the control plane. Sending is safe from any thread."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._sending = threading.Lock()

    def send(self, message: say.FromWorker) -> None:
        """Say something to the node process. If it is gone, so are we."""
        data = say.encode(message)
        with self._sending:
            try:
                self._outgoing.write(data)
                self._outgoing.flush()
            except OSError:
                os._exit(0)

    def receive(self) -> say.ToWorker:
        """The next order. At the stream's end the process ends."""
        body = say.read_body(self._incoming)
        if body is None:
            os._exit(0)
        return say.decode_to_worker(body)


class Duty:
    """One plan's work: the order, and what has to end when the worker is stood down."""

    def __init__(self, load: say.Load) -> None:
        self.load = load
        self.stopped = threading.Event()
        self.wires = Wires()
        self.engine: Engine | None = None
        self.intake: Intake | None = None
        self.runner: StageRunner | None = None

    def stop(self) -> None:
        """End the work, from any thread: channels close, so that whoever waits in one is told; an engine that waits for requests is told too."""
        self.stopped.set()
        self.wires.close()
        if self.engine is not None:
            self.engine.post(Stop())


class Worker:
    """One node's work: introduced, then plan after plan, until the control stream ends."""

    def __init__(self, control: ControlStream, start: say.Start) -> None:
        self._control, self._start = control, start
        self._backend = open_backend(start.backend, start.library, start.threads)
        devices = self._backend.devices()
        self._device = choose_device(devices, start.device)
        self._identity = Identity.load_or_create(Path(start.state_dir))
        self._listener = Listener(start.host, 0, self._identity, [], spin_s=start.spin_s)
        self._porter = Porter(self._listener, {})
        self._parts: queue.SimpleQueue[say.Part | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[say.Load] = queue.SimpleQueue()
        self._duty: Duty | None = None
        self._stood_down = 0
        self._holding: Holding | None = None
        self._tokenizers: dict[str, Tokenizer] = {}
        self._clock = SystemClock()
        self._control.send(self._introduction(devices))

    def run(self) -> None:
        """Carry out one plan after the other."""
        threading.Thread(target=self._read_orders, name="yoke-orders", daemon=True).start()
        while True:
            duty = Duty(self._orders.get())
            self._duty = duty
            if duty.load.plan.version > self._stood_down:
                self._carry_out(duty)
            self._duty = None

    def _carry_out(self, duty: Duty) -> None:
        """Load, then serve until a neighbour is gone or somebody stops it; the coordinator hears how it ended, unless it was the one who stopped it."""
        version, is_serving = duty.load.plan.version, False
        try:
            self._load(duty)
            if not duty.load.is_standby:
                self._connect(duty)
                is_serving = True
                self._serve(duty)
            else:
                self._control.send(say.Loaded(version=version))
        except InvariantError:
            raise
        except YokeError as error:
            if isinstance(error, BackendError):
                self._let_go()
            if not duty.stopped.is_set():
                ending = say.Broken if is_serving else say.LoadFailed
                self._control.send(ending(version=version, error=say.error_note(error)))
        finally:
            duty.wires.close()

    def _load(self, duty: Duty) -> None:
        """Have the place's shard on the device: the one that is there, if it is the same."""
        load = duty.load
        if self._holding is not None and self._holding.shape == Shape.of(load):
            self._holding.executor.clear()
            return
        self._let_go()
        total = load.plan.shard_bytes(load.stage, load.rank)
        report = _every(PROGRESS_S, lambda done: self._control.send(say.Progress(done_bytes=done, total_bytes=total)))
        remote = partial(CoordinatorSource, self._control.send, self._parts)
        self._holding = Holding.load(load, self._backend, self._start.threads, remote, unless(duty.stopped, report))
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _let_go(self) -> None:
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    def _connect(self, duty: Duty) -> None:
        """Wire the place's channels, and let the executor sum over them."""
        load, holding = duty.load, self._held()
        self._listener.set_members([peer.certificate for peer in load.peers])
        if len(load.peers) > 1:
            duty.wires = wire(load, self._porter, self._identity, self._start.spin_s, duty.stopped)
            if duty.stopped.is_set():  # between the last channel and now
                raise NodeGone("stood down while connecting")
        group: Group = ChannelGroup(load.rank, duty.wires.group, load.wire_type) if duty.wires.group else SoloGroup()
        holding.reducer.all_reduce = group.all_reduce
        duty.runner = StageRunner(load.plan, load.stage, load.rank, holding.executor, group)

    def _serve(self, duty: Duty) -> None:
        load, runner, wires = duty.load, duty.runner, duty.wires
        if runner is None:
            raise InvariantError("a plan is served before its channels stand")
        width = load.plan.spec.width
        limits = Limits(max_tokens=load.chunk, width=width, max_outputs=load.chunk, max_body_bytes=load.chunk * (4 * width + 128) + 65536)
        if (load.stage, load.rank) == (0, 0):
            pipeline = Pipeline(runner, load.plan.version, self._embed, Ways(mates=wires.mates, following=wires.following, result=wires.result, limits=limits))
            self._serve_engine(duty, pipeline)
            return
        if wires.inlet is None:
            raise InvariantError(f"stage {load.stage}, rank {load.rank} was wired without an inlet")
        self._control.send(say.Loaded(version=load.plan.version))
        outlets = [wires.result] if wires.result is not None else wires.following
        serve_stage(runner, wires.inlet, outlets, limits, load.plan.version)

    def _serve_engine(self, duty: Duty, pipeline: Pipeline) -> None:
        """The engine's worker: sessions and token loop."""
        load, path = duty.load, duty.load.model_path or ""
        tokenizer = self._tokenizers.get(path) or self._tokenizers.setdefault(path, Tokenizer.load(Path(path)))
        template = chat_template(self._model_file(), tokenizer, load.chat_template)
        duty.intake = Intake(load.plan.spec, tokenizer, template, load.context)
        depth = len(load.plan.stages)
        scheduler = Scheduler(SchedulerLimits(n_cells=load.n_cells, chunk=load.chunk, max_sessions=load.max_sessions, depth=depth))
        duty.engine = Engine(scheduler, pipeline, tokenizer, lambda request_id, event: self._control.send(say.event_answer(request_id, event)), self._clock)
        if duty.stopped.is_set():
            return
        self._control.send(say.Loaded(version=load.plan.version, has_chat_template=template is not None))
        duty.engine.run()

    def _held(self) -> Holding:
        if self._holding is None:
            raise InvariantError("a plan is served before its shard is loaded")
        return self._holding

    def _model_file(self) -> GgufFile:
        file = self._held().file
        if file is None:
            raise InvariantError("the engine's worker has no model file")
        return file

    def _embed(self, tokens: Sequence[int]) -> Floats:
        """The residual stream's beginning [T, D], from rows of the file."""
        return self._backend.dequantize(self._model_file().stored_rows("token_embd.weight", tokens))

    def _introduction(self, devices: tuple[Device, ...]) -> say.Ready:
        return say.Ready(
            id=self._identity.id,
            name=self._start.name,
            certificate=self._identity.certificate_der,
            port=self._listener.address[1],
            device=_offered(self._device, self._start.memory_share),
            devices=devices,
            backend_version=getattr(self._backend, "version", np.__version__),
            yoke_version=yoke.__version__,
        )

    def _read_orders(self) -> None:
        """The reader thread. Tokenising happens here, beside the token loop."""
        while True:
            try:
                self._obey(self._control.receive())
            except RemoteProtocolError as error:
                self._control.send(say.Failed(error=say.error_note(error)))
                os._exit(1)

    def _obey(self, order: say.ToWorker) -> None:
        duty = self._duty
        match order:
            case say.Ping():
                self._control.send(self._pong(duty))
            case say.Submit():
                self._submit(duty, order)
            case say.CancelRequest(id=request_id):
                if duty is not None and duty.engine is not None:
                    duty.engine.post(Cancel(request_id))
            case say.Load():
                self._orders.put(order)
            case say.StandDown(version=version):
                self._stood_down = max(self._stood_down, version)
                if duty is not None and duty.load.plan.version <= version:
                    duty.stop()
            case say.Part():
                self._parts.put(order)
            case say.AskStatus():
                self._control.send(self._status(duty))
            case say.Release():
                os._exit(0)
            case say.Start() | say.Refused():
                raise RemoteProtocolError(f"an unexpected {type(order).__name__}")

    def _submit(self, duty: Duty | None, order: say.Submit) -> None:
        """Prepare a request and hand it to the engine. Without one it is dropped: the coordinator asks again when the next plan serves."""
        if duty is None or duty.intake is None or duty.engine is None or duty.stopped.is_set():
            return
        try:
            submission = duty.intake.prepare(order.request, self._clock.monotonic(), order.resume)
        except YokeError as error:
            self._control.send(say.event_answer(order.request.id, error))
            return
        self._control.send(say.Accepted(id=order.request.id, prompt=submission.tokens))
        duty.engine.post(submission)

    def _pong(self, duty: Duty | None) -> say.Pong:
        if duty is None or duty.runner is None:
            return say.Pong()
        clocks = duty.runner.clocks
        return say.Pong(version=duty.load.plan.version, single_steps=clocks.single_steps, single_s=clocks.single_s)

    def _status(self, duty: Duty | None) -> say.Status:
        if duty is None or duty.runner is None:
            return say.Status()
        runner, clocks = duty.runner, duty.runner.clocks
        times = StageTimes(
            stage=runner.stage_index,
            rank=runner.rank,
            node=self._start.name,
            steps=clocks.steps,
            tokens=clocks.tokens,
            compute_s=clocks.compute_s,
            collective_s=runner.group.collective_s,
            wire_s=clocks.wire_s,
            waiting_s=clocks.waiting_s,
            late=clocks.late,
        )
        if duty.engine is None:
            return say.Status(times=times)
        scheduler = duty.engine.scheduler
        return say.Status(times=times, running=scheduler.n_running, queued=scheduler.n_queued, free_cells=scheduler.n_free_cells)


def open_backend(name: str, library: str, threads: int) -> Backend:
    """A backend by its name.

    Raises
    ------
    SettingError
        if there is none of that name.
    BackendError
        if its library is missing or too old.
    """
    match name:
        case "ggml":
            return GgmlBackend(library, threads)
        case "reference":
            return ReferenceBackend()
    raise SettingError(f"backend {name!r} is unknown; known are ggml and reference")


def choose_device(devices: tuple[Device, ...], wanted: str) -> Device:
    """The device of that name, or the fastest.

    Raises
    ------
    BackendError
        if there is none of that name.
    """
    if not wanted:
        return max(devices, key=lambda device: device.matvec_bytes_per_s)
    for device in devices:
        if device.name == wanted:
            return device
    raise BackendError(f"device {wanted!r} is not there; this build offers {', '.join(device.name for device in devices)}")


def chat_template(file: GgufFile, tokenizer: Tokenizer, override: str | None) -> ChatTemplate | None:
    """The model's own template, or the one that the user gave instead."""
    source = override if override is not None else file.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    bos, eos = (tokenizer.piece(token).decode(errors="replace") if token is not None else "" for token in (tokenizer.bos, tokenizer.eos))
    return ChatTemplate(source, bos=bos, eos=eos)


def _offered(device: Device, share: float) -> Device:
    return Device(
        name=device.name,
        description=device.description,
        backend=device.backend,
        free_bytes=int(device.free_bytes * share),
        matvec_bytes_per_s=device.matvec_bytes_per_s,
        threads=device.threads,
    )


def _every(seconds: float, report: Callable[[int], None]) -> Callable[[int], None]:
    """Pass on at most one report in ``seconds``."""
    last = 0.0

    def limited(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(done)

    return limited


def main() -> None:
    """The worker's process."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal reaches all; the node process decides what ends when
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not land among the messages
    control = ControlStream(sys.stdin.buffer, outgoing)
    try:
        start = control.receive()
        if not isinstance(start, say.Start):
            raise RemoteProtocolError(f"the first order is a {type(start).__name__}; expected Start")
        Worker(control, start).run()
    except YokeError as error:
        control.send(say.Failed(error=say.error_note(error)))
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()

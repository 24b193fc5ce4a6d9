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
from pathlib import Path
from typing import BinaryIO

import numpy as np

import yoke
from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend, Floats, Program, ShardShape
from yoke.backends.reference import ReferenceBackend
from yoke.core.clock import SystemClock
from yoke.core.errors import BackendError, InvariantError, RemoteProtocolError, SettingError, YokeError
from yoke.core.node import Device
from yoke.core.request import StageTimes
from yoke.models.decoder import decoder
from yoke.models.shards import shard_cuts
from yoke.net.codec import Limits
from yoke.net.group import ChannelGroup, Group, SoloGroup
from yoke.net.identity import Identity
from yoke.net.tcp import Listener
from yoke.node import messages as say
from yoke.node.loading import CoordinatorSource, FileSource, Source, stream_weights
from yoke.node.wiring import Wires, wire
from yoke.run.chat import ChatTemplate
from yoke.run.engine import Cancel, Engine
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


class Worker:
    """One shard's life: introduced, loaded, serving, gone."""

    def __init__(self, control: ControlStream, start: say.Start) -> None:
        self._control, self._start = control, start
        self._backend = open_backend(start.backend, start.library, start.threads)
        devices = self._backend.devices()
        self._device = choose_device(devices, start.device)
        self._identity = Identity.load_or_create(Path(start.state_dir))
        self._listener = Listener(start.host, 0, self._identity, [], spin_s=start.spin_s)
        self._parts: queue.SimpleQueue[say.Part | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[say.Load] = queue.SimpleQueue()
        self._runner: StageRunner | None = None
        self._engine: Engine | None = None
        self._intake: Intake | None = None
        self._clock = SystemClock()
        self._control.send(self._introduction(devices))

    def run(self) -> None:
        """Load what is ordered, then serve until a neighbour is gone or the control stream ends."""
        threading.Thread(target=self._read_orders, name="yoke-orders", daemon=True).start()
        load = self._orders.get()
        runner = self._load(load)
        wires = wire(load, self._listener, self._identity, self._start.spin_s) if len(load.peers) > 1 else Wires()
        self._listener.close()
        runner.group = self._join_group(load, wires)
        self._runner = runner
        gc.collect()
        gc.freeze()
        limits = Limits(
            max_tokens=load.chunk, width=load.plan.spec.width, max_outputs=load.chunk, max_body_bytes=load.chunk * (4 * load.plan.spec.width + 128) + 65536
        )
        if (load.stage, load.rank) == (0, 0):
            self._serve_engine(load, runner, wires, limits)
        else:
            self._control.send(say.Loaded())
            if wires.inlet is None:
                raise InvariantError(f"stage {load.stage}, rank {load.rank} was wired without an inlet")
            outlets = [wires.result] if wires.result is not None else wires.following
            serve_stage(runner, wires.inlet, outlets, limits, load.plan.version)

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

    def _load(self, load: say.Load) -> StageRunner:
        """Read this place's slices into the device."""
        plan, stage = load.plan, load.plan.stages[load.stage]
        shard = stage.shards[load.rank]
        if load.model_path is not None:
            self._file = GgufFile.open(Path(load.model_path))
            source: Source = FileSource(self._file)
        else:
            source = CoordinatorSource(self._control.send, self._parts)
        shape = ShardShape(
            width=plan.spec.width,
            n_blocks=len(stage.blocks),
            n_kv_heads=len(plan.kv_heads(shard)),
            head_dim=plan.spec.head_dim,
            n_cells=load.n_cells,
            is_last=load.stage == len(plan.stages) - 1,
            cache_type=load.cache_type,
        )
        total = plan.shard_bytes(load.stage, load.rank)
        weights = stream_weights(source, shard_cuts(plan, load.stage, load.rank), _every(PROGRESS_S, self._report(total)))
        late = _LateGroup(len(stage.shards))
        program = Program(text=decoder(plan, load.stage, load.rank), shape=shape, weights=weights, reducer=late)
        executor = self._backend.open(program, device=shard.device, threads=self._start.threads)
        runner = StageRunner(plan, load.stage, load.rank, executor, SoloGroup())
        self._late = late
        return runner

    def _join_group(self, load: say.Load, wires: Wires) -> Group:
        group: Group = ChannelGroup(load.rank, wires.group, load.wire_type) if wires.group else SoloGroup()
        self._late.all_reduce = group.all_reduce
        return group

    def _serve_engine(self, load: say.Load, runner: StageRunner, wires: Wires, limits: Limits) -> None:
        """The engine's worker: sessions, token loop, and the reader of drawn tokens."""
        spec = load.plan.spec
        tokenizer = Tokenizer.load(Path(load.model_path or ""))
        template = chat_template(self._file, tokenizer, load.chat_template)
        self._intake = Intake(spec, tokenizer, template, load.context)
        depth = len(load.plan.stages)
        scheduler = Scheduler(SchedulerLimits(n_cells=load.n_cells, chunk=load.chunk, max_sessions=load.max_sessions, depth=depth))
        ways = Ways(mates=wires.mates, following=wires.following, result=wires.result, limits=limits)
        pipeline = Pipeline(runner, load.plan.version, self._embed, ways)
        engine = Engine(scheduler, pipeline, tokenizer, lambda request_id, event: self._control.send(say.event_answer(request_id, event)), self._clock)
        self._engine = engine
        self._control.send(say.Loaded(has_chat_template=template is not None))
        engine.run()

    def _embed(self, tokens: Sequence[int]) -> Floats:
        """The residual stream's beginning [T, D], from rows of the file."""
        return self._backend.dequantize(self._file.stored_rows("token_embd.weight", tokens))

    def _report(self, total: int) -> Callable[[int], None]:
        return lambda done: self._control.send(say.Progress(done_bytes=done, total_bytes=total))

    def _read_orders(self) -> None:
        """The reader thread. Tokenising happens here, beside the token loop."""
        while True:
            try:
                self._obey(self._control.receive())
            except RemoteProtocolError as error:
                self._control.send(say.Failed(error=say.error_note(error)))
                os._exit(1)

    def _obey(self, order: say.ToWorker) -> None:
        match order:
            case say.Load():
                self._orders.put(order)
            case say.Part():
                self._parts.put(order)
            case say.Submit(request=request):
                if self._intake is None or self._engine is None:
                    raise RemoteProtocolError("a request came to a worker without the engine")
                try:
                    self._engine.post(self._intake.prepare(request, self._clock.monotonic()))
                except YokeError as error:
                    self._control.send(say.event_answer(request.id, error))
            case say.CancelRequest(id=request_id):
                if self._engine is not None:
                    self._engine.post(Cancel(request_id))
            case say.PeerGone(message=message):
                raise RemoteProtocolError(message)
            case say.AskStatus():
                self._control.send(self._status())
            case say.Start() | say.Refused():
                raise RemoteProtocolError(f"an unexpected {type(order).__name__}")

    def _status(self) -> say.Status:
        runner, engine = self._runner, self._engine
        if runner is None:
            return say.Status()
        clocks = runner.clocks
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
        )
        if engine is None:
            return say.Status(times=times)
        scheduler = engine.scheduler
        return say.Status(times=times, running=scheduler.n_running, queued=scheduler.n_queued, free_cells=scheduler.n_free_cells)


class _LateGroup:
    """The reducer that an executor is opened with, before the channels of its group stand."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.all_reduce: Callable[[Floats], None] = SoloGroup().all_reduce


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

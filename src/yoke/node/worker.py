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
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

import yoke
from yoke.core.clock import SystemClock
from yoke.core.errors import BackendError, InvariantError, NodeError, RemoteProtocolError, YokeError
from yoke.core.node import NodeId
from yoke.net.channel import Channel, send_message
from yoke.net.codec import Hello, Purpose
from yoke.net.identity import Identity
from yoke.net.measuring import answer, measure
from yoke.net.tcp import Listener, connect
from yoke.node import messages as say
from yoke.node.devices import choose_device, look_at_devices, offered, open_backend
from yoke.node.duty import Duty, Post
from yoke.node.fetching import StoreSource, Supplier
from yoke.node.framing import read_body
from yoke.node.holding import Holding, Shape, unless
from yoke.node.loading import FileSource, Source
from yoke.node.notes import error_note
from yoke.node.porter import Porter
from yoke.node.preface import Preface, StorePreface
from yoke.node.supplies import Supplies
from yoke.run.engine import Cancel
from yoke.weights.gguf import GgufFile

PROGRESS_S = 0.1
CONNECT_S = 10.0
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
        body = read_body(self._incoming)
        if body is None:
            os._exit(0)
        return say.decode_to_worker(body)


class Worker:
    """One node's work: introduced, then plan after plan, until the control stream ends."""

    def __init__(self, control: ControlStream, start: say.Start) -> None:
        self._control, self._start = control, start
        self._backend = open_backend(start.backend, start.library, start.threads)
        self._identity = Identity.load_or_create(Path(start.state_dir))
        self._listener = Listener(start.host, 0, self._identity, [], spin_s=start.spin_s)
        self._supplies = Supplies(Path(start.state_dir), start.store_bytes)
        porter = Porter(self._listener, {Purpose.WEIGHTS: self._supplies.serve, Purpose.PROBE: answer})
        self._post = Post(
            identity=self._identity, backend=self._backend, porter=porter, spin_s=start.spin_s, send=control.send, clock=SystemClock(), tokenizers={}
        )
        self._peers: dict[NodeId, say.Peer] = {}
        self._orders: queue.SimpleQueue[say.Load] = queue.SimpleQueue()
        self._duty: Duty | None = None
        self._stood_down = 0
        self._holding: Holding | None = None
        self._introduce(start)

    def run(self) -> None:
        """Carry out one plan after the other."""
        threading.Thread(target=self._read_orders, name="yoke-orders", daemon=True).start()
        while True:
            duty = Duty(self._orders.get(), self._post)
            self._duty = duty
            if duty.load.plan.version > self._stood_down or duty.load.use is say.Use.STANDBY:
                self._carry_out(duty)
            self._duty = None

    def _carry_out(self, duty: Duty) -> None:
        """Load, then serve until a neighbour is gone or somebody stops it; the coordinator hears how it ended, unless it was the one who stopped it."""
        version, is_serving = duty.load.plan.version, False
        try:
            holding = self._hold(duty)
            if duty.load.use is say.Use.STANDBY:
                self._control.send(say.Loaded(version=version))
            else:
                duty.connect(holding)
                is_serving = True
                duty.serve(holding)
        except InvariantError:
            raise
        except YokeError as error:
            if isinstance(error, BackendError):
                self._let_go()
            if not duty.stopped.is_set():
                ending = say.Broken if is_serving else say.LoadFailed
                self._control.send(ending(version=version, error=error_note(error)))
        finally:
            duty.close()

    def _hold(self, duty: Duty) -> Holding:
        """Have the place's shard on the device: the one that is there, if it is the same."""
        load, held = duty.load, self._holding
        if held is not None and held.shape == Shape.of(load) and (held.preface is not None or not load.is_engine):
            held.executor.clear()
            return held
        self._let_go()
        report = unless(duty.stopped, _every(PROGRESS_S, self._progress(load)))
        source: Source
        preface: Preface | None
        if load.model_path is not None:
            preface = file = GgufFile.open(Path(load.model_path))
            source = FileSource(file)
        else:
            source, preface = self._bring(load, report, duty.stopped)
        self._holding = Holding.load(load, self._backend, self._start.threads, source, report, preface)
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        return self._holding

    def _bring(self, load: say.Load, report: Callable[[int], None], stop: threading.Event) -> tuple[StoreSource, StorePreface | None]:
        """Have what a place needs in the store."""
        suppliers = self._suppliers(load)
        source = self._supplies.bring(load.plan, (load.stage, load.rank), load.manifest, suppliers, report, stop)
        return source, self._supplies.preface(load.manifest, source, suppliers) if load.is_engine else None

    def _let_go(self) -> None:
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    def _prepare(self, load: say.Load) -> None:
        """Have a place's weights in the store, beside whatever else this worker does. In a thread of its own."""
        version = load.plan.version
        try:
            if load.model_path is None:
                _, preface = self._bring(load, _every(PROGRESS_S, self._progress(load)), threading.Event())
                if preface is not None:
                    preface.close()
            self._control.send(say.Prepared(version=version))
        except YokeError as error:
            self._control.send(say.LoadFailed(version=version, error=error_note(error)))

    def _offer(self, order: say.Offer) -> None:
        try:
            self._supplies.offer(Path(order.path), order.head_dim)
            self._control.send(say.Offered())
        except YokeError as error:
            self._control.send(say.Failed(error=error_note(error)))

    def _suppliers(self, load: say.Load) -> tuple[Supplier, ...]:
        return tuple(
            Supplier(name=self._peers[node].name, open=self._opener(self._peers[node]), is_last_resort=node == load.suppliers[-1])
            for node in load.suppliers
            if node in self._peers and node != self._identity.id
        )

    def _opener(self, peer: say.Peer) -> Callable[[], Channel]:
        return lambda: connect((peer.host, peer.port), peer.id, self._identity, [peer.certificate], deadline_s=CONNECT_S)

    def _probe(self, node: NodeId) -> None:
        """Measure the link to another node. In a thread of its own."""
        found = say.Probed(id=node)
        if (peer := self._peers.get(node)) is not None:
            with contextlib.suppress(NodeError), contextlib.closing(self._opener(peer)()) as channel:
                send_message(channel, Hello(plan_version=0, purpose=Purpose.PROBE, stage=0, rank=0))
                link = measure(channel)
                found = say.Probed(id=node, rtt_s=link.rtt_s, send_bytes_per_s=link.send_bytes_per_s, receive_bytes_per_s=link.receive_bytes_per_s)
        self._control.send(found)

    def _progress(self, load: say.Load) -> Callable[[int], None]:
        total = load.plan.shard_bytes(load.stage, load.rank)
        return lambda done: self._control.send(say.Progress(done_bytes=done, total_bytes=total))

    def _introduce(self, start: say.Start) -> None:
        """Look at the chips, and say who this is and what it offers."""
        devices, notes = look_at_devices(self._backend, start, lambda what, share: self._control.send(say.Measuring(what=what, share=share)))
        ready = say.Ready(
            id=self._identity.id,
            name=self._start.name,
            certificate=self._identity.certificate_der,
            port=self._listener.address[1],
            device=offered(choose_device(devices, start.device), start.memory_share),
            devices=devices,
            notes=notes,
            backend_version=self._backend.version,
            yoke_version=yoke.__version__,
        )
        self._control.send(ready)

    def _read_orders(self) -> None:
        """The reader thread. Tokenising happens here, beside the token loop."""
        while True:
            try:
                self._obey(self._control.receive())
            except RemoteProtocolError as error:
                self._control.send(say.Failed(error=error_note(error)))
                os._exit(1)

    def _obey(self, order: say.ToWorker) -> None:
        duty = self._duty
        match order:
            case say.Ping():
                self._control.send(_pong(duty))
            case say.Submit():
                self._submit(duty, order)
            case say.CancelRequest(id=request_id):
                if duty is not None and duty.engine is not None:
                    duty.engine.post(Cancel(request_id))
            case say.AskStatus():
                self._control.send(_status(duty, self._start.name))
            case say.Probe(id=node):
                threading.Thread(target=self._probe, args=(node,), name="yoke-probe", daemon=True).start()
            case say.Measure(weight_type=weight_type):
                self._introduce(replace(self._start, weight_type=weight_type, is_thorough=False, known=()))
            case say.Release():
                os._exit(0)
            case say.Start() | say.Refused():
                raise RemoteProtocolError(f"an unexpected {type(order).__name__}")
            case _:
                self._follow(order, duty)

    def _follow(self, order: say.Members | say.Forget | say.Offer | say.Load | say.StandDown, duty: Duty | None) -> None:
        """The orders that are about plans and those who carry them out."""
        match order:
            case say.Members(peers=peers):
                self._peers |= {peer.id: peer for peer in peers}
                self._listener.set_members([peer.certificate for peer in self._peers.values()])
            case say.Forget(id=node):
                if self._peers.pop(node, None) is not None:
                    self._listener.set_members([peer.certificate for peer in self._peers.values()])
            case say.Offer():
                self._offer(order)
            case say.Load(use=say.Use.PREPARE):
                threading.Thread(target=self._prepare, args=(order,), name="yoke-prepare", daemon=True).start()
            case say.Load():
                self._orders.put(order)
            case say.StandDown(version=version):
                self._stood_down = max(self._stood_down, version)
                if duty is not None and duty.load.plan.version <= version:
                    duty.stop()

    def _submit(self, duty: Duty | None, order: say.Submit) -> None:
        """Prepare a request and hand it to the engine. Without one it is dropped: the coordinator asks again when the next plan serves."""
        if duty is None or duty.intake is None or duty.engine is None or duty.stopped.is_set():
            return
        try:
            submission = duty.intake.prepare(order.request, self._post.clock.monotonic(), order.resume)
        except YokeError as error:
            self._control.send(say.event_answer(order.request.id, error))
            return
        self._control.send(say.Accepted(id=order.request.id, prompt=submission.tokens))
        duty.engine.post(submission)


def _pong(duty: Duty | None) -> say.Pong:
    if duty is None or duty.runner is None:
        return say.Pong()
    clocks = duty.runner.clocks
    return say.Pong(version=duty.load.plan.version, single_steps=clocks.single_steps, single_s=clocks.single_s)


def _status(duty: Duty | None, name: str) -> say.Status:
    if duty is None:
        return say.Status()
    if duty.engine is None:
        return say.Status(times=duty.times(name))
    scheduler = duty.engine.scheduler
    return say.Status(times=duty.times(name), running=scheduler.n_running, queued=scheduler.n_queued, free_cells=scheduler.n_free_cells)


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
        control.send(say.Failed(error=error_note(error)))
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()

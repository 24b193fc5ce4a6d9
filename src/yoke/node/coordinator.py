"""The real cluster: admits members, plans, has the shards loaded, and passes requests to the engine. It holds no tensor and computes nothing."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from yoke.backends.ops import CacheType
from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import AdmissionError, NodeError, NodeGone, RemoteProtocolError, RequestError, SettingError, YokeError
from yoke.core.node import Node, NodeId
from yoke.core.request import ClusterStatus, Event, Finished, ModelCard, Request, StageTimes
from yoke.net.group import WireType
from yoke.net.identity import Identity, admission_server_context
from yoke.net.invite import SECRET_BYTES, Invite
from yoke.node import messages as say
from yoke.node.admission import MAX_STREAM_BYTES, admit
from yoke.node.links import WorkerLink, WorkerProcess, introduce
from yoke.node.model import Model
from yoke.planner import Outlook, Wish, make_plan

MAX_KNOCKS = 16
"""Strangers that may be introducing themselves at once."""

BLAME_S = 1.0
"""When a node goes, its neighbours notice as well, and may be heard first. So long their word waits for news of the node that is really gone."""

LOAD_S = 1800.0
STATUS_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a plan is to run: cache cells in all, tokens in a step, sessions at once, tokens in a session, types of cache and wire, chat template."""

    n_cells: int
    chunk: int
    max_sessions: int
    context: int
    cache_type: CacheType = "f16"
    wire_type: WireType = WireType.FLOAT32
    chat_template: str | None = None


@dataclass(slots=True)
class _Worker:
    """A worker and what it has said last."""

    link: WorkerLink
    loaded: "asyncio.Future[say.Loaded]"
    status: "asyncio.Future[say.Status] | None" = None
    progress: say.Progress | None = None
    last_words: YokeError | None = None
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)


class Coordinator:
    """A cluster of this machine and those that join it. Use it as an async context manager: at its end all workers end.

    Parameters
    ----------
    identity : this node's key.
    start : what this machine's own worker is told first; ``host`` in it is the address that members reach this machine at.
    port : where members knock; None if nobody may join.
    """

    def __init__(self, identity: Identity, start: say.Start, *, port: int | None = None, clock: Clock | None = None) -> None:
        self._identity, self._start, self._port = identity, start, port
        self._clock = clock or SystemClock()
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._workers: dict[NodeId, _Worker] = {}
        self._joined = asyncio.Condition()
        self._answers: dict[str, asyncio.Queue[Event | YokeError]] = {}
        self._model: Model | None = None
        self._outlook: Outlook | None = None
        self._failure: NodeError | None = None
        self._failed = asyncio.Event()
        self._names: dict[NodeId, str] = {}
        self._has_template = False
        self._stack = contextlib.AsyncExitStack()
        self._knocks = asyncio.Semaphore(MAX_KNOCKS)
        self.on_progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None
        self.on_join: Callable[[Node], None] = lambda _node: None

    async def __aenter__(self) -> Self:
        """Start this machine's worker, and listen if members may come."""
        self._tasks = await self._stack.enter_async_context(_Tasks())
        process = await WorkerProcess.spawn()
        self._stack.push_async_callback(process.end)
        try:
            ready = await introduce(process.bodies, process.writer, self._start)
            self._add(WorkerLink(ready.id, ready.name, self._start.host, process.bodies, process.writer, ready))
            if self._port is not None:
                context = admission_server_context(self._identity)
                try:
                    server = await asyncio.start_server(self._welcome, self._start.host, self._port, ssl=context, limit=MAX_STREAM_BYTES)
                except OSError as error:
                    raise SettingError(f"cannot listen for joining machines on {self._start.host} port {self._port}: {error}; choose another") from error
                self._port = server.sockets[0].getsockname()[1]
                self._stack.callback(server.close)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers.values():
            worker.link.writer.close()
        await self._stack.aclose()

    @property
    def invite(self) -> Invite:
        """What another machine needs to join."""
        return Invite(node_id=self._identity.id, host=self._start.host, port=self._port or 0, secret=self._secret)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Who is there, this machine first."""
        now = self._clock.epoch()
        return tuple(Node(id=w.link.id, name=w.link.name, device=w.link.ready.device, measured_at=now) for w in self._workers.values())

    @property
    def outlook(self) -> Outlook | None:
        """The plan and what was predicted of it."""
        return self._outlook

    async def wait_for(self, n_nodes: int) -> None:
        """Until so many nodes are there, this one counted."""
        async with self._joined:
            await self._joined.wait_for(lambda: len(self._workers) >= n_nodes)

    async def load(self, model: Model, wish: Wish, settings: LoadSettings) -> Outlook:
        """Plan a model over the nodes that are there and have every shard loaded.

        Raises
        ------
        PlacementError
            if it fits nowhere.
        YokeError
            what a worker says, if it cannot load its shard.
        """
        outlook = make_plan(model.spec, self.nodes, (), wish)  # links are not measured; the planner takes them for wired ones
        self._model, self._outlook = model, outlook
        places = list(outlook.plan.places())
        members = [shard.node for _, _, shard in places]
        peers = tuple(self._peer(self._workers[node].link) for node in members)
        nonce = secrets.token_bytes(16)
        for stage, rank, shard in places:
            worker = self._workers[shard.node]
            is_own = shard.node == self._identity.id
            order = say.Load(
                plan=outlook.plan,
                stage=stage,
                rank=rank,
                nonce=nonce,
                peers=peers,
                n_cells=settings.n_cells,
                chunk=settings.chunk,
                max_sessions=settings.max_sessions,
                context=settings.context,
                cache_type=settings.cache_type,
                wire_type=settings.wire_type,
                model_path=str(model.path) if is_own else None,
                chat_template=settings.chat_template,
            )
            await worker.link.send(order)
        async with asyncio.timeout(LOAD_S):
            loaded = await asyncio.gather(*(self._workers[node].loaded for node in members))
        self._has_template = loaded[0].has_chat_template
        self._context = settings.context
        return outlook

    def models(self) -> tuple[ModelCard, ...]:
        """The one model that is loaded."""
        if self._model is None or self._outlook is None:
            return ()
        card = ModelCard(
            name=self._model.spec.name,
            context=self._context,
            vocabulary=self._model.spec.vocabulary,
            has_chat_template=self._has_template,
            created_at=self._model.created_at,
        )
        return (card,)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer a request; closing the iterator cancels it."""
        if self._failure is not None:
            raise self._failure
        if self._model is None or request.model != self._model.spec.name:
            raise RequestError(f"model {request.model!r} is not loaded; loaded are {[card.name for card in self.models()]}", field="model", status=404)
        if request.id in self._answers:
            raise RequestError(f"a request with id {request.id!r} is being answered already", field="id")
        events: asyncio.Queue[Event | YokeError] = asyncio.Queue()
        self._answers[request.id] = events
        engine = self._workers[self._identity.id].link
        is_over = False
        try:
            await engine.send(say.Submit(request=request))
            while not is_over:
                event = await events.get()
                is_over = isinstance(event, Finished | YokeError)
                if isinstance(event, YokeError):
                    raise event
                yield event
        finally:
            del self._answers[request.id]
            if not is_over:
                with contextlib.suppress(NodeGone):
                    await engine.send(say.CancelRequest(id=request.id))

    async def status(self) -> ClusterStatus:
        """Ask every worker how it is; those that do not answer in time are left out."""
        own, *others = await asyncio.gather(*(self._ask_status(worker) for worker in list(self._workers.values())))
        times: list[StageTimes] = [status.times for status in (own, *others) if status is not None and status.times is not None]
        return ClusterStatus(
            nodes=self.nodes,
            plan=self._outlook.plan if self._outlook is not None and self._failure is None else None,
            running=own.running if own else 0,
            queued=own.queued if own else 0,
            stages=tuple(sorted(times, key=lambda t: (t.stage, t.rank))),
        )

    async def _ask_status(self, worker: _Worker) -> say.Status | None:
        if worker.status is None:
            worker.status = asyncio.get_running_loop().create_future()
        try:
            await worker.link.send(say.AskStatus())
            async with asyncio.timeout(STATUS_S):
                return await asyncio.shield(worker.status)
        except (TimeoutError, NodeGone):
            return None

    def _add(self, link: WorkerLink) -> _Worker:
        loop = asyncio.get_running_loop()
        worker = _Worker(link, loop.create_future())
        worker.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())  # an error nobody waits for is not news
        self._workers[link.id] = worker
        self._names[link.id] = link.name
        self._tasks.start(self._listen(worker))
        return worker

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One knock at the door."""
        if self._knocks.locked():
            writer.close()
            return
        async with self._knocks:
            try:
                newcomer, certificate = await admit(reader, writer, self._identity.id, self._secret, self._workers)
                bodies = say.Bodies(reader)
                ready = await introduce(bodies, writer, None)
                if ready.id != newcomer or ready.certificate != certificate or newcomer in self._workers:
                    raise AdmissionError("the newcomer is a member already, or its worker has another key")
            except YokeError:
                writer.close()
                return
        host = str(writer.get_extra_info("peername")[0])
        worker = self._add(WorkerLink(newcomer, ready.name, host, bodies, writer, ready))
        self.on_join(Node(id=newcomer, name=ready.name, device=ready.device, measured_at=self._clock.epoch()))
        async with self._joined:
            self._joined.notify_all()
        await asyncio.wait([worker.loaded])

    async def _listen(self, worker: _Worker) -> None:
        """Hear one worker out, until its stream ends."""
        error: YokeError
        try:
            while True:
                await self._hear(worker, await worker.link.receive())
        except YokeError as heard:
            error = heard
        worker.link.writer.close()
        if worker.link.id != self._identity.id:
            self._workers.pop(worker.link.id, None)
        if not worker.loaded.done():
            worker.loaded.set_exception(worker.last_words or NodeGone(f"{worker.link.name} is gone ({error}) before its part of the model was loaded"))
        elif self._is_used(worker.link.id):
            if worker.last_words is None:
                await self._fail(NodeGone(f"{worker.link.name} is gone ({error}); the model needs all its nodes: start again"))
            else:
                await self._fail_late(worker.last_words)

    async def _hear(self, worker: _Worker, message: say.FromWorker) -> None:
        match message:
            case say.Answer() if worker.link.id != self._identity.id:
                raise RemoteProtocolError(f"{worker.link.name} answers requests, but the engine is not there")
            case say.Answer(id=request_id):
                if message.error is not None and isinstance(failure := say.noted_error(message.error), NodeError):
                    self._tasks.start(self._fail_late(failure))
                elif request_id in self._answers:
                    event = message.started or message.piece or message.finished
                    self._answers[request_id].put_nowait(event if event is not None else _answer_error(message))
            case say.Status():
                if worker.status is not None and not worker.status.done():
                    worker.status.set_result(message)
                worker.status = None
            case say.Progress(done_bytes=done, total_bytes=total):
                self.on_progress(worker.link.name, done, total)
            case say.Loaded():
                if not worker.loaded.done():
                    worker.loaded.set_result(message)
            case say.Fetch():
                await self._serve(worker, message)
            case say.Failed(error=note):
                worker.last_words = say.noted_error(
                    note if worker.link.id == self._identity.id else replace(note, message=f"{worker.link.name}: {note.message}")
                )
                raise worker.last_words
            case say.Ready():
                raise RemoteProtocolError(f"{worker.link.name} introduced itself twice")

    async def _serve(self, worker: _Worker, fetch: say.Fetch) -> None:
        """Send a slice of the model's weights, in parts."""
        if self._model is None:
            raise RemoteProtocolError(f"{worker.link.name} asked for weights before there was a model")
        async for part in self._model.parts(fetch):
            await worker.link.send(part)

    async def _fail_late(self, error: YokeError) -> None:
        """Somebody lost a neighbour, or the engine gave up. If a node is gone, that is the cause, and it will be known at once; else this is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLAME_S):
                await self._failed.wait()
        text = str(error)
        for node, name in self._names.items():
            text = text.replace(f"node {node[:12]}", name)
        await self._fail(NodeGone(f"the model needs all its nodes, and one failed ({text}); start again"))

    async def _fail(self, error: NodeError) -> None:
        """End every answer, now and later, with the first cause."""
        if self._failure is not None:
            return
        self._failure = error
        self._failed.set()
        with contextlib.suppress(NodeGone):
            await self._workers[self._identity.id].link.send(say.PeerGone(message=str(error)))
        for events in self._answers.values():
            events.put_nowait(error)

    def _is_used(self, node: NodeId) -> bool:
        return self._outlook is not None and any(shard.node == node for _, _, shard in self._outlook.plan.places())

    def _peer(self, link: WorkerLink) -> say.Peer:
        return say.Peer(id=link.id, certificate=link.ready.certificate, host=link.host, port=link.ready.port)


class _Tasks:
    """Background tasks with an owner: at its end they are cancelled and waited for."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        running = tuple(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _answer_error(message: say.Answer) -> YokeError:
    return say.noted_error(message.error) if message.error is not None else RemoteProtocolError("an answer without an event")

"""The real cluster: lets members in, hears what their workers say, and passes requests to the engine. It holds no tensor and computes nothing."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from yoke.cluster import messages as to_do
from yoke.cluster.state import Policy, State
from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import AdmissionError, NodeError, RemoteProtocolError, RequestError, YokeError
from yoke.core.node import Node, NodeId
from yoke.core.request import ClusterStatus, Event, Finished, ModelCard, Request, StageTimes
from yoke.net.identity import Identity
from yoke.node import messages as say
from yoke.node.clusterfile import ClusterFile
from yoke.node.conduct import Conduct, Hands, LoadSettings
from yoke.node.desk import Desk
from yoke.node.door import Door, Guest
from yoke.node.framing import Bodies
from yoke.node.linkbook import LinkBook
from yoke.node.links import WorkerLink, WorkerProcess, introduce
from yoke.node.membership import Membership
from yoke.node.model import Model
from yoke.node.notes import noted_error
from yoke.node.profile import Tell, silent
from yoke.node.surveyor import Surveyor
from yoke.node.tasks import Tasks
from yoke.planner import Outlook, Wish

STATUS_S = 2.0
INTRODUCTION_S = 120.0
SURVEY_S = 5.0
"""How long the first plan waits for links to be measured."""

RESTART_S = 1.0
"""How long this machine's worker must have lived for another to be started at once when it dies."""

Note = Callable[[str], None]


@dataclass(slots=True)
class _Member:
    """A worker, and who waits for its word."""

    link: WorkerLink
    joined_s: float
    why_gone: str = ""
    status: "asyncio.Future[say.Status] | None" = None


@dataclass(slots=True)
class Listeners:
    """Who is told what happens: measuring (what, share done), loading's progress (name, bytes done, bytes in all), a newcomer, a sentence for log and terminal."""

    progress: Callable[[str, int, int], None] = field(default=lambda _name, _done, _total: None)
    measuring: Tell = silent
    joined: Callable[[Node], None] = field(default=lambda _node: None)
    note: Note = field(default=lambda _text: None)


class Coordinator:
    """A cluster of this machine and those that join it. Use it as an async context manager: at its end all workers end.

    Parameters
    ----------
    identity : this node's key.
    start : what this machine's own worker is told first; ``host`` in it is the address that members reach this machine at.
    port : where members knock; None if nobody may join.
    policy : when a machine counts as gone, what a change must gain, and how long streams wait.
    """

    def __init__(self, identity: Identity, start: say.Start, *, port: int | None = None, policy: Policy | None = None, clock: Clock | None = None) -> None:
        self._identity, self._start, self._port = identity, start, port
        self._policy = policy or Policy()
        self._clock = clock or SystemClock()
        self._members: dict[NodeId, _Member] = {}
        self._links: dict[NodeId, WorkerLink] = {}
        self._joined = asyncio.Condition()
        self._desk = Desk()
        self._surveyor = Surveyor(self._links, identity.id, lambda: not len(self._desk), LinkBook(Path(start.state_dir), self._clock), self._clock)
        self._news: deque[str] = deque(maxlen=20)
        self._model: Model | None = None
        self._context = 0
        self._conduct: Conduct | None = None
        self._is_ending = False
        self._stack = contextlib.AsyncExitStack()
        self._membership: Membership | None = None
        self._door: Door | None = None
        self.tell = Listeners()

    async def __aenter__(self) -> Self:
        """Start this machine's worker, and listen if members may come."""
        self._tasks = await self._stack.enter_async_context(Tasks())
        try:
            await self._employ()
            self._tasks.start(self._surveyor.run())
            if self._port is not None:
                membership = Membership(Path(self._start.state_dir), self._identity.id, self._start.name, self._clock)
                address = (self._start.host, self._port)
                door = Door(self._identity, membership, address, self._welcome, self._members.__contains__, note=self._note, clock=self._clock)
                self._membership, self._door = membership, await self._stack.enter_async_context(door)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wind_down()
        for member in self._members.values():
            member.link.writer.close()
        await self._stack.aclose()

    def wind_down(self) -> None:
        """Let everybody go: from now on nobody is missed."""
        self._is_ending = True
        for member in self._members.values():
            member.link.post(say.Release())

    @property
    def door(self) -> Door:
        """Where other machines join.

        Raises
        ------
        RequestError
            if nobody may.
        """
        if self._door is None:
            raise RequestError("this cluster is closed: it was started for this machine alone", status=409)
        return self._door

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Who is there, this machine first."""
        own = [self._members[self._identity.id]] if self._identity.id in self._members else []
        others = [member for node, member in self._members.items() if node != self._identity.id]
        return tuple(self._node(member) for member in (*own, *others))

    @property
    def outlook(self) -> Outlook | None:
        """The plan that serves, or served last, and what was predicted of it."""
        return self._conduct.outlook if self._conduct is not None else None

    async def wait_for(self, n_nodes: int, are_right: Callable[[Sequence[Node]], bool] = lambda _: True) -> None:
        """Until so many nodes are there, this one counted, and ``are_right`` says that they are those that were meant."""
        async with self._joined:
            await self._joined.wait_for(lambda: len(self._members) >= n_nodes and are_right(self.nodes))

    async def load(self, model: Model, wish: Wish, settings: LoadSettings, by_hand: ClusterFile | None = None) -> Outlook:
        """Plan a model over the nodes that are there (``by_hand`` as long as its nodes are), have every shard loaded, and keep it served, whoever comes and goes.

        Raises
        ------
        PlacementError
            if it fits nowhere.
        YokeError
            what a worker says, if this first plan cannot be loaded.
        """
        hands = Hands(
            own=self._identity.id, directory=Path(self._start.state_dir), links=self._links, drop=self._drop, start=self._tasks.start, note=self._note
        )
        conduct = Conduct(model, wish, settings, State(self._policy, wish), self._desk, hands, self._clock)
        conduct.by_hand = by_hand
        self._model, self._context, self._conduct = model, settings.context, conduct
        self._desk.vocabulary, self._desk.context = model.spec.vocabulary, settings.context
        settled_s = self._clock.monotonic() - self._policy.settle_s  # who is there now has been waited for
        for member in self._members.values():
            conduct.begin(self._joined_event(member), settled_s)
        conduct.known_links = lambda: self._surveyor.links
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SURVEY_S):
                await self._surveyor.is_done.wait()
        self._tasks.start(conduct.tick())
        return await asyncio.shield(conduct.served)

    def models(self) -> tuple[ModelCard, ...]:
        """The one model that is served."""
        if self._model is None or self._conduct is None or not self._conduct.served.done():
            return ()
        card = ModelCard(
            name=self._model.spec.name,
            context=self._context,
            vocabulary=self._model.spec.vocabulary,
            has_chat_template=self._conduct.has_template,
            created_at=self._model.created_at,
        )
        return (card,)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer a request; closing the iterator cancels it. While machines are lost and found again, the answer pauses."""
        if self._conduct is None or self._model is None:
            raise NodeError("no model is loaded yet: machines are waited for, or measured; ask again when /health says ok")
        if request.model != self._model.spec.name:
            raise RequestError(f"model {request.model!r} is not loaded; loaded are {[card.name for card in self.models()]}", field="model", status=404)
        ticket = self._desk.open(request)
        is_over = False
        try:
            self._conduct.submit(ticket)
            while not is_over:
                event = await ticket.events.get()
                is_over = isinstance(event, Finished | YokeError)
                if isinstance(event, YokeError):
                    raise event
                yield event
        finally:
            self._desk.close(ticket)
            if not is_over:
                self._conduct.cancel(request.id)

    async def status(self) -> ClusterStatus:
        """Ask every worker how it is; those that do not answer in time are left out."""
        members = list(self._members.values())
        answers = await asyncio.gather(*(self._ask_status(member) for member in members))
        conduct = self._conduct
        host = conduct.engine if conduct is not None else self._identity.id
        engine = next((a for m, a in zip(members, answers, strict=True) if m.link.id == host and a is not None), say.Status())
        plan = conduct.outlook.plan if conduct is not None and conduct.outlook is not None and conduct.is_serving else None
        places = {(stage, rank, shard.node) for stage, rank, shard in plan.places()} if plan is not None else set()
        times: list[StageTimes] = [  # without those of a plan that was given up while they came
            replace(answer.times, node=member.link.name)
            for member, answer in zip(members, answers, strict=True)
            if answer is not None and answer.times is not None and (answer.times.stage, answer.times.rank, member.link.id) in places
        ]
        return ClusterStatus(
            nodes=self.nodes,
            plan=plan,
            running=engine.running,
            queued=max(engine.queued, len(self._desk) - engine.running),
            stages=tuple(sorted(times, key=lambda t: (t.stage, t.rank))),
            links=self._surveyor.links,
            phase=conduct.phase if conduct is not None else "starting",
            predicted_tokens_per_s=conduct.outlook.tokens_per_s if conduct is not None and conduct.outlook is not None else None,
            news=tuple(self._news),
        )

    async def invite(self, uses: int, valid_s: float) -> str:
        """A new invite.

        Raises
        ------
        RequestError
            if nobody may join this cluster.
        """
        return self.door.invite(uses, valid_s).encode()

    async def open_code(self) -> str:
        """Six digits for one machine that is on the same network.

        Raises
        ------
        RequestError
            if nobody may join this cluster.
        """
        return str(self.door.open_code())

    async def remove(self, name: str) -> None:
        """Put a machine out at once.

        Raises
        ------
        RequestError
            if there is none of that name, or it is the first one.
        """
        gone = self.door.remove(name).id
        self._drop(gone, f"{name} was removed")
        for member in self._members.values():
            member.link.post(say.Forget(id=gone))

    async def _ask_status(self, member: _Member) -> say.Status | None:
        if member.status is None:
            member.status = asyncio.get_running_loop().create_future()
        member.link.post(say.AskStatus())
        try:
            async with asyncio.timeout(STATUS_S):
                return await asyncio.shield(member.status)
        except TimeoutError:
            return None

    async def _employ(self) -> None:
        """Start this machine's own worker."""
        process = await WorkerProcess.spawn()
        self._stack.push_async_callback(process.end)
        async with asyncio.timeout(INTRODUCTION_S):
            ready = await introduce(process.bodies, process.writer, self._start, self._measuring)
        self._start = msgspec.structs.replace(self._start, known=ready.devices, notes=ready.notes)
        await self._add(WorkerLink(ready.id, ready.name, self._start.host, process.bodies, process.writer, ready, process.kill))

    async def _reemploy(self, died_after_s: float) -> None:
        """Start another worker after the last one died; one that dies at once, again and again, is given more and more rest."""
        await asyncio.sleep(max(0.0, RESTART_S - died_after_s))
        try:
            await self._employ()
        except (YokeError, TimeoutError) as error:
            self.tell.note(f"this machine's worker cannot start again: {error}")
            self._tasks.start(self._reemploy(0.0))

    async def _add(self, link: WorkerLink) -> None:
        member = _Member(link, self._clock.monotonic())
        self._members[link.id] = member
        link.post(say.Members(peers=tuple(other.link.peer for other in self._members.values())))
        for other in self._members.values():
            if other is not member:
                other.link.post(say.Members(peers=(link.peer,)))
        self._links[link.id] = link
        self._surveyor.is_done.clear()  # what lies between it and the others is not known yet
        if self._conduct is not None:
            self._conduct.handle(self._joined_event(member))
        self._tasks.start(self._listen(member))
        async with self._joined:
            self._joined.notify_all()

    async def _welcome(self, guest: Guest) -> None:
        """A machine was let in: hear its worker introduce itself."""
        reader, writer = guest.stream
        bodies = Bodies(reader)
        async with asyncio.timeout(INTRODUCTION_S):
            ready = await introduce(bodies, writer, None)
            wanted = self._start.weight_type
            if wanted and all(rate.weight_type != wanted for rate in ready.device.rates):
                writer.write(say.encode(say.Measure(weight_type=wanted)))
                ready = await introduce(bodies, writer, None)
        if ready.id != guest.id or ready.certificate != guest.certificate or self._membership is None:
            raise AdmissionError("the newcomer's worker has another key than it was let in with")
        name = self._membership.introduce(guest.id, ready.name)
        link = WorkerLink(guest.id, name, guest.host, bodies, writer, ready, writer.transport.abort)
        await self._add(link)
        self.tell.joined(self._node(self._members[guest.id]))

    async def _listen(self, member: _Member) -> None:
        """Hear one worker out, until its stream ends."""
        link, why = member.link, ""
        try:
            while True:
                self._hear(member, await link.receive())
        except YokeError as error:
            why = str(error)
        link.writer.close()
        if member.status is not None and not member.status.done():  # nobody waits for a word of the dead
            member.status.set_result(say.Status())
        if self._members.get(link.id) is member and not self._is_ending:
            del self._members[link.id]
            del self._links[link.id]
            if self._conduct is not None:
                self._conduct.handle(to_do.Lost(id=link.id, why=member.why_gone or f"{link.name} is gone ({why})"))
            if link.id == self._identity.id:
                self._tasks.start(self._reemploy(self._clock.monotonic() - member.joined_s))

    def _hear(self, member: _Member, message: say.FromWorker) -> None:
        link = member.link
        match message:
            case say.Answer() | say.Accepted() if self._conduct is None or not self._conduct.is_engine(link):
                pass
            case say.Answer(id=request_id):
                self._desk.tell(request_id, say.answer_event(message))
            case say.Accepted(id=request_id, prompt=prompt):
                self._desk.accept(request_id, prompt)
            case say.Status():
                if member.status is not None and not member.status.done():
                    member.status.set_result(message)
                member.status = None
            case say.Probed():
                self._surveyor.hear(message)
            case say.Progress(done_bytes=done, total_bytes=total):
                self.tell.progress(link.name, done, total)
            case say.Failed(error=note):
                failure: YokeError = noted_error(note)
                raise failure
            case say.Ready() | say.Measuring():
                raise RemoteProtocolError(f"{link.name} introduced itself twice")
            case _ if self._conduct is not None and not self._is_ending:
                self._conduct.hear(link, message)

    def _drop(self, node: NodeId, why: str) -> None:
        """End a member's connection: it is silent, or not wanted any more."""
        if (member := self._members.get(node)) is not None:
            member.why_gone = why
            member.link.cut()

    def _measuring(self, what: str, share: float) -> None:
        self.tell.measuring(what, share)

    def _note(self, text: str) -> None:
        self._news.append(text)
        self.tell.note(text)

    def _joined_event(self, member: _Member) -> to_do.Joined:
        return to_do.Joined(node=self._node(member), is_coordinator=member.link.id == self._identity.id)

    def _node(self, member: _Member) -> Node:
        return Node(id=member.link.id, name=member.link.name, device=member.link.ready.device, measured_at=self._clock.epoch(), notes=member.link.ready.notes)

"""Carries out what the cluster's state decides: asks the planner, gives the workers their orders, and lets the live answers go on when a plan serves."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yoke.backends.ops import CacheType
from yoke.cluster import messages as to_do
from yoke.cluster.state import State
from yoke.core.clock import Clock
from yoke.core.errors import NodeError, PlacementError, RemoteProtocolError, YokeError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan, Span
from yoke.net.group import WireType
from yoke.node import messages as say
from yoke.node.clusterfile import ClusterFile
from yoke.node.desk import Desk, Ticket
from yoke.node.links import WorkerLink
from yoke.node.model import Model
from yoke.node.notes import noted_error
from yoke.node.supplies import manifests
from yoke.planner import Machine, Outlook, Wish, make_plan, moving_s
from yoke.weights.manifest import Manifest, manifest_of

MAX_SUPPLIERS = 16
"""Nodes that one is told to fetch from, beside the coordinator."""

OFFER_S = 30.0
SPEED_STEPS = 32
"""Steps of one token that a node's speed is taken from."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """What a conduct can do to the world: speak to workers, end a connection, start a task, tell a person.

    ``own`` is the coordinator's node, where the model's file is; ``directory`` is where that node keeps what it has found out.
    """

    own: NodeId
    directory: Path
    links: Mapping[NodeId, WorkerLink]
    drop: Callable[[NodeId, str], None]
    start: Callable[..., None]
    note: Callable[[str], None]


class Conduct:
    """One model's life on a cluster."""

    def __init__(self, model: Model, wish: Wish, settings: LoadSettings, state: State, desk: Desk, hands: Hands, clock: Clock) -> None:
        self._model, self._wish, self._settings = model, wish, settings
        self._own, self._state, self._desk, self._hands, self._clock = hands.own, state, desk, hands, clock
        self._outlooks: dict[int, Outlook] = {}
        self._paces: dict[NodeId, _Pace] = {}
        self.engine, self._engines = self._own, {self._own}
        self._manifest: Manifest | None = None
        self._nonce = b""
        self._offered = asyncio.Event()
        self.by_hand: ClusterFile | None = None
        self.known_links: Callable[[], Sequence[Link]] = tuple
        self.served: asyncio.Future[Outlook] = asyncio.get_running_loop().create_future()
        self.outlook: Outlook | None = None
        self.is_serving = False
        self.failure: YokeError | None = None
        self.has_template = False

    @property
    def phase(self) -> str:
        """What the cluster is doing, in a word."""
        return str(self._state.phase)

    def begin(self, member: to_do.Joined, joined_s: float) -> None:
        """A member that was there before the model was."""
        for command in self._state.handle(member, joined_s):
            self._do(command)

    def handle(self, event: to_do.Event) -> None:
        """Let the state decide, and do what it says."""
        for command in self._state.handle(event, self._clock.monotonic()):
            self._do(command)

    async def tick(self) -> None:
        """Tell the state that time passes, for ever."""
        while True:
            await asyncio.sleep(to_do.TICK_S)
            self.handle(to_do.Tick())

    def submit(self, ticket: Ticket) -> None:
        """Have a request answered now; or, while no plan serves, as soon as one does.

        Raises
        ------
        YokeError
            if the model cannot be served, and has not been for longer than a stream waits.
        """
        if self.failure is not None:
            raise self.failure
        if self.is_serving:
            self._post(self.engine, say.Submit(request=ticket.request, resume=ticket.resume))

    def cancel(self, request_id: str) -> None:
        """Nobody waits for an answer any more."""
        self._post(self.engine, say.CancelRequest(id=request_id))

    def is_engine(self, link: WorkerLink) -> bool:
        """Whether what a node says of answers counts. An engine of an earlier plan may still have something to say; it is too late.

        Raises
        ------
        RemoteProtocolError
            if the node never had the engine.
        """
        if link.id not in self._engines:
            raise RemoteProtocolError(f"{link.name} answers requests, but the engine is not there")
        return link.id == self.engine

    def hear(self, link: WorkerLink, message: say.FromWorker) -> None:
        """What a worker says about plans."""
        match message:
            case say.Offered():
                self._offered.set()
            case say.Prepared(version=version):
                self.handle(to_do.Prepared(version=version, id=link.id))
            case say.Loaded(version=version):
                self.has_template = message.has_chat_template or self.has_template
                self.handle(to_do.Loaded(version=version, id=link.id))
            case say.LoadFailed(version=version, error=note):
                self.handle(to_do.LoadFailed(version=version, id=link.id, error=self._named(link, noted_error(note))))
            case say.Broken(version=version, error=note):
                self.handle(to_do.Broken(version=version, id=link.id, why=str(self._named(link, noted_error(note)))))
            case say.Leaving():
                self.handle(to_do.Leaving(id=link.id))
            case say.Pong():
                self._weigh(link, message)
        self.handle(to_do.Heard(id=link.id))

    def _do(self, command: to_do.Command) -> None:
        match command:
            case to_do.MakePlan(version=version, nodes=nodes, reason=reason):
                self._hands.start(self._plan(version, nodes, reason))
            case to_do.Load(version=version, plan=plan):
                self._load(version, plan)
            case to_do.Standby(plan=plan, stage=stage, rank=rank, id=node):
                self._post(node, self._order(plan, (stage, rank), node, say.Use.STANDBY))
            case to_do.Prepare(plan=plan):
                self._order_all(plan, say.Use.PREPARE)
            case to_do.Serve(version=version):
                self._serve(version)
            case to_do.FailStreams(error=error):
                self._fail(error)
            case _:
                self._speak(command)

    def _speak(self, command: to_do.Command) -> None:
        """The commands that are a word to one node, or to people."""
        match command:
            case to_do.Ping(id=node):
                self._post(node, say.Ping())
            case to_do.StandDown(version=version, ids=nodes):
                self.is_serving = False
                for node in nodes:
                    self._post(node, say.StandDown(version=version))
            case to_do.Drop(id=node, why=why):
                self._hands.drop(node, why)
            case to_do.Release(id=node):
                self._post(node, say.Release())
            case to_do.Note(text=text):
                self._hands.note(text)
            case to_do.Suspect(id=node, silent_s=silent_s):
                self._hands.note(f"{self._name(node)} has been silent for {silent_s:.1f} s")
            case to_do.Trust(id=node):
                self._hands.note(f"{self._name(node)} is heard again")

    async def _plan(self, version: int, nodes: tuple[Node, ...], reason: str) -> None:
        """Ask the planner, in a thread of its own: with many machines it takes its time."""
        served = self.outlook.plan if self.outlook is not None else None
        wish, links = replace(self._wish, version=version, keep=served), tuple(self.known_links())
        try:
            outlook, is_wished = await asyncio.to_thread(_outlook, self._model, nodes, links, wish, self.by_hand, is_first=not self.served.done())
            if outlook.bytes_per_node.keys() != {self._own}:
                await self._offer()
        except YokeError as error:
            if not self.served.done():
                self.served.set_exception(error)
            self.handle(to_do.PlanFailed(version=version, error=error))
            return
        self._outlooks = {version: outlook} | {v: o for v, o in self._outlooks.items() if o is self.outlook}
        moving = moving_s(served, outlook.plan, Machine.of(nodes, links), self._own)
        self.handle(
            to_do.PlanMade(
                version=version,
                plan=outlook.plan,
                seconds_per_token=outlook.seconds_per_token,
                moving_s=moving,
                is_wished=is_wished,
                is_by_hand=self.by_hand is not None,
            )
        )

    async def _offer(self) -> None:
        """Have the manifest, and the own worker ready to give others their part of the file, before anybody is told to fetch it."""
        file, head_dim = self._model.file, self._model.spec.head_dim
        if self._manifest is None:
            self._manifest = await asyncio.to_thread(manifest_of, file, head_dim, manifests(self._hands.directory))
        self._offered.clear()
        self._post(self._own, say.Offer(path=str(self._model.path), head_dim=head_dim))
        with contextlib.suppress(TimeoutError):  # a worker that says nothing is found out by the state
            async with asyncio.timeout(OFFER_S):
                await self._offered.wait()

    def _load(self, version: int, plan: Plan) -> None:
        if version not in self._outlooks:  # a plan that the state made of another one, with a node replaced
            known = [*self._outlooks.values(), *([self.outlook] if self.outlook is not None else [])]
            self._outlooks[version] = replace(next(outlook for outlook in known if _layout(outlook.plan) == _layout(plan)), plan=plan)
        self._nonce = secrets.token_bytes(16)
        self._order_all(plan, say.Use.SERVE)

    def _order_all(self, plan: Plan, use: say.Use) -> None:
        for stage, rank, shard in plan.places():
            self._post(shard.node, self._order(plan, (stage, rank), shard.node, use))

    def _order(self, plan: Plan, place: tuple[int, int], node: NodeId, use: say.Use) -> say.Load:
        """What a node is told about its place. Those of the last plan and of this one have pieces of the model, or soon will; the coordinator has all."""
        settings, manifest, links = self._settings, self._manifest, self._hands.links
        members = [shard.node for _, _, shard in plan.places()]
        served = [shard.node for _, _, shard in self.outlook.plan.places()] if self.outlook is not None else []
        suppliers = [other for other in dict.fromkeys((*served, *members)) if other in links and other not in (node, self._own)][:MAX_SUPPLIERS]
        return say.Load(
            plan=plan,
            model=self._model.digest,
            stage=place[0],
            rank=place[1],
            nonce=self._nonce,
            peers=tuple(links[member].peer for member in members if member in links),
            n_cells=settings.n_cells,
            chunk=settings.chunk,
            max_sessions=settings.max_sessions,
            context=settings.context,
            cache_type=settings.cache_type,
            wire_type=settings.wire_type,
            model_path=str(self._model.path) if node == self._own else None,
            chat_template=settings.chat_template,
            use=use,
            manifest=manifest.digest if manifest is not None else b"",
            suppliers=(*suppliers, self._own),
        )

    def _serve(self, version: int) -> None:
        """The plan stands: all live answers go on."""
        self.outlook = self._outlooks[version]
        self.engine = self.outlook.plan.stages[0].shards[0].node
        self._engines.add(self.engine)
        self.is_serving, self.failure = True, None
        self._paces.clear()
        if not self.served.done():
            self.served.set_result(self.outlook)
        elif len(self._desk):
            self._hands.note(f"{len(self._desk)} answer(s) go on by plan {version}")
        for ticket in self._desk:
            self._post(self.engine, say.Submit(request=ticket.request, resume=ticket.resume))

    def _fail(self, error: YokeError) -> None:
        self.is_serving = False
        self.failure = error if isinstance(error, NodeError) else NodeError(str(error))
        if not self.served.done():
            self.served.set_exception(error)
        self._desk.tell_all(self.failure)

    def _weigh(self, link: WorkerLink, pong: say.Pong) -> None:
        """Notice a node that has become slower, or fast again, since its plan began to serve."""
        member = self._state.members.get(link.id)
        if not self.is_serving or member is None or pong.version != self._state.version:
            return
        pace = self._paces.setdefault(link.id, _Pace(member.node.device.matvec_bytes_per_s))
        if (speed := pace.speed(pong)) is not None:
            self.handle(to_do.Measured(id=link.id, matvec_bytes_per_s=speed))

    def _named(self, link: WorkerLink, error: YokeError) -> YokeError:
        """An error of a worker with the names that people gave instead of keys, and its own in front."""
        text = str(error)
        for other in self._hands.links.values():
            text = text.replace(f"node {other.id[:12]}", other.name)
        text = text if link.id == self._own else f"{link.name}: {text}"
        if isinstance(error, PlacementError):
            return PlacementError(text, missing_bytes=error.missing_bytes)
        return type(error)(text)

    def _name(self, node: NodeId) -> str:
        link = self._hands.links.get(node)
        return link.name if link is not None else node[:12]

    def _post(self, node: NodeId, message: say.ToWorker) -> None:
        if (link := self._hands.links.get(node)) is not None:
            link.post(message)


@dataclass(slots=True)
class _Pace:
    """How long one node's steps take, against how long they took when its plan began; ``planned`` is the speed, in bytes per second, that the plan counts on."""

    planned: float
    steps: int = 0
    seconds: float = 0.0
    usual_s: float | None = None

    def speed(self, pong: say.Pong) -> float | None:
        """The speed now, once there are enough new steps."""
        n = pong.single_steps - self.steps
        if n < SPEED_STEPS:
            return None
        mean_s = (pong.single_s - self.seconds) / n
        self.steps, self.seconds = pong.single_steps, pong.single_s
        if self.usual_s is None:
            self.usual_s = mean_s
            return None
        return self.planned * self.usual_s / mean_s


def _layout(plan: Plan) -> list[tuple[Span, int]]:
    """Where the stages are cut, and into how many ranks."""
    return [(stage.blocks, len(stage.shards)) for stage in plan.stages]


def _outlook(model: Model, nodes: Sequence[Node], links: Sequence[Link], wish: Wish, by_hand: ClusterFile | None, *, is_first: bool) -> tuple[Outlook, bool]:
    """The plan, and whether it has a layout that was wished for. When machines were lost, a layout that they were needed for is given up, not the model."""
    try:
        asked = wish if by_hand is None else replace(wish, layout=by_hand.layout_over(nodes))
        return make_plan(model.spec, nodes, links, asked if is_first else replace(asked, use_all=False)), asked.is_forced
    except PlacementError:
        if is_first or not (wish.is_forced or by_hand is not None):
            raise
        return make_plan(model.spec, nodes, links, replace(wish, stages=None, ranks=None, shares=None, layout=None, use_all=False)), False

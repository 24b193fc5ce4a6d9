"""A whole cluster on virtual time: the real cluster state and the real planner, simulated machines, and answers whose right text is known.

Machines come, die, are stopped and cut off, load slowly or not at all. Every delay is drawn from a seed, so the same seed tells the same story, and the laws of the
state are watched all the while. The story is in ``laws.story()``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from yoke.cluster import messages as m
from yoke.cluster.state import Policy, State
from yoke.core.errors import InvariantError, PlacementError, YokeError
from yoke.core.node import Device, Node, NodeId
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.planner import Outlook, Wish, make_plan
from yoke.testing.boxes import Answer, Box, Boxes, Terms, Timeline, next_token
from yoke.testing.laws import Laws

NOTICED_S = 1.8
"""After a silent cut, a worker that writes to the other side notices (TCP_USER_TIMEOUT of 1.5 s, measured)."""

REJOIN_S = 1.0
"""How long a machine takes to start a worker again and to knock."""

MB = 1_000_000
WORKER_BYTES = 135 * MB
"""What a worker itself takes, by the planner's reckoning, rounded up."""

SPEC = ModelSpec(
    name="small",
    architecture="llama",
    n_blocks=4,
    width=64,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    columns=64,
    vocabulary=256,
    context=1024,
    norm_epsilon=1e-5,
    rope=Rope(style=RopeStyle.HALVES, dims=8),
    embedding_bytes=20 * MB,
    head_bytes=20 * MB,
    attention_bytes=(10 * MB,) * 4,
    feed_forward_bytes=(30 * MB,) * 4,
)
"""A model of 200 MB, of which a token reads 180."""

WISH = Wish(n_cells=64)

Planner = Callable[[Sequence[Node], int], Outlook]


def simulated_node(number: int, *, speed: float = 4e9, room_bytes: int = 400 * MB) -> Node:
    """A machine that streams ``speed`` bytes a second and has room for so many bytes of weights and cache."""
    device = Device(name="CPU", description="simulated", backend="simulated", free_bytes=WORKER_BYTES + room_bytes, matvec_bytes_per_s=speed)
    return Node(id=NodeId(f"{number:064x}"), name=f"node-{number}", device=device, measured_at=0.0)


def right_text(prompt: Sequence[int], n_tokens: int) -> list[int]:
    """What the model says, undisturbed."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def real_plan(nodes: Sequence[Node], version: int) -> Outlook:
    """What the real planner makes of nodes without measured links.

    Raises
    ------
    PlacementError
        if nothing fits.
    """
    found = _planned(tuple(nodes))
    if isinstance(found, PlacementError):
        raise PlacementError(str(found), missing_bytes=found.missing_bytes)
    return replace(found, plan=replace(found.plan, version=version))


@lru_cache(maxsize=4096)
def _planned(nodes: tuple[Node, ...]) -> Outlook | PlacementError:
    """The planner is pure: what it made of the same nodes once, it makes again."""
    try:
        return make_plan(SPEC, nodes, [], WISH)
    except PlacementError as error:
        return error


@dataclass(slots=True, eq=False)
class Session:
    """An answer as the one who asked sees it: its prompt, how many tokens it shall have, what has come of it, and the error that ended it if one did."""

    name: int
    n_wanted: int
    drawn: list[int] = field(default_factory=list)
    error: YokeError | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """What was asked."""
        return (self.name, 7, 11)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.error is not None or len(self.drawn) >= self.n_wanted

    @property
    def is_right(self) -> bool:
        """Whether it ended as it must: in the right text, or in an error with words, after no other text than the beginning of the right one."""
        is_named = self.error is None or bool(str(self.error))
        return self.is_over and is_named and self.drawn == right_text(self.prompt, self.n_wanted)[: len(self.drawn)]


class SimulatedCluster:
    """One cluster. The first of ``nodes`` is the coordinator; it joins at once, the others when `join` is called.

    Attributes
    ----------
    state : the cluster's state; ``commands`` are what it commanded, with the moment, pings left out.
    sessions : all answers that were asked for.
    nodes : all machines that there are, those that have not joined too.
    n_events : how many events the state has handled.
    """

    def __init__(self, nodes: Sequence[Node], *, seed: int = 0, policy: Policy | None = None, terms: Terms | None = None, planner: Planner = real_plan) -> None:
        self.time, self.terms = Timeline(), terms or Terms()
        self.state, self.laws = State(policy, WISH), Laws()
        self.boxes = Boxes(nodes, self.time, self.terms, seed, self._hear, self._take)
        self.sessions: list[Session] = []
        self.commands: list[tuple[float, m.Command]] = []
        self.n_events = 0
        self._failure: YokeError | None = None
        self.nodes, self._planner, self._own = tuple(nodes), planner, nodes[0].id
        self._engine = self._own
        self._connected: dict[NodeId, int] = {}
        self.join(self._own)
        self._tick()

    @property
    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self.time.now

    @property
    def is_serving(self) -> bool:
        """Whether a plan serves."""
        return self.laws.serving is not None

    def run(self, for_s: float, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, so long or until it is enough."""
        self.time.run(self.now + for_s, is_enough)

    def submit(self, n_tokens: int) -> Session:
        """Ask for an answer."""
        session = Session(len(self.sessions), n_tokens, error=self._failure)
        self.sessions.append(session)
        if self.laws.serving is not None and not session.is_over:
            self._start(session)
        return session

    # what can befall machines

    def join(self, node: NodeId) -> None:
        """A machine's worker starts and introduces itself; again and again while it cannot reach the coordinator, or that thinks it is there already."""
        box = self.boxes.by_id[node]
        if box.is_up:
            return
        if box.is_cut or node in self._connected:
            self.time.at(self.now + REJOIN_S, partial(self.join, node))
            return
        box.begin(self.now)
        self._connected[node] = box.life
        self._handle(m.Joined(node=box.node, is_coordinator=node == self._own))

    def kill(self, node: NodeId, rejoin_s: float | None = None) -> None:
        """The worker dies. Its connections end, which the others see unless the machine is cut off. The coordinator always starts its own again."""
        box = self.boxes.by_id[node]
        if not box.is_up:
            return
        self.boxes.sever(box, 0.01)
        box.end()
        if not box.is_cut:
            self._lose(node, "its connection ended", 0.01)
        if rejoin_s is not None or node == self._own:
            self.time.at(self.now + (REJOIN_S if rejoin_s is None else rejoin_s), partial(self.join, node))

    def stop(self, node: NodeId) -> None:
        """The worker is stopped: it answers nothing, and its connections stay."""
        self.boxes.by_id[node].is_stopped = True

    def cut(self, node: NodeId) -> None:
        """Nothing comes from or to a machine any more, silently."""
        box = self.boxes.by_id[node]
        box.is_cut = True
        self.boxes.sever(box, NOTICED_S, lambda: box.is_cut)

    def restore(self, node: NodeId) -> None:
        """A stopped or cut machine is there again. What it missed comes now, unless its connection was given up: then it joins again."""
        box = self.boxes.by_id[node]
        box.is_stopped = box.is_cut = False
        box.there_since_s = self.now
        if box.is_up and self._connected.get(node) != box.life:
            self.kill(node, REJOIN_S)
        self.boxes.catch_up(box)

    def part(self, a: NodeId, b: NodeId) -> None:
        """Two machines cannot reach each other any more; both reach the coordinator's control port."""
        pair = frozenset((a, b))
        self.boxes.parted.add(pair)
        duty = self.boxes.by_id[a].duty
        if duty is not None and b in (shard.node for _, _, shard in duty.plan.places()):
            self.boxes.sever(self.boxes.by_id[a], 0.01, lambda: pair in self.boxes.parted)

    def heal(self) -> None:
        """Undo every `part`."""
        self.boxes.parted.clear()

    def leave(self, node: NodeId) -> None:
        """A machine asks to go."""
        if self.boxes.by_id[node].is_up:
            self.boxes.say(self.boxes.by_id[node], m.Leaving(id=node))

    # the coordinator's side

    def _handle(self, event: m.Event) -> None:
        self.n_events += 1
        self.laws.handling(event, self.now)
        commands = self.state.handle(event, self.now)
        self.laws.carrying_out(commands, self.now)
        for command in commands:
            if not isinstance(command, m.Ping):
                self.commands.append((self.now, command))
            self._carry_out(command)

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.Drop(id=node):
                self._drop(self.boxes.by_id[node])
            case m.MakePlan(version=version, nodes=nodes):
                self.time.at(self.now + self.terms.planning_s, partial(self._handle, self._plan(nodes, version)))
            case m.Serve():
                self._failure = None
                for session in self.sessions:
                    if not session.is_over:
                        self._start(session)
            case m.FailStreams(error=error):
                self._failure = error
                for session in self.sessions:
                    if not session.is_over:
                        session.error = error
            case _:
                self._order(command)

    def _order(self, command: m.Command) -> None:
        """The commands that are orders to workers."""
        boxes = self.boxes
        match command:
            case m.Ping(id=node):
                boxes.send(node, boxes.pong)
            case m.Prepare(plan=plan):
                for stage, rank, shard in plan.places():
                    boxes.send(shard.node, partial(boxes.prepare, plan=plan, seat=(stage, rank)))
            case m.StandDown(version=version, ids=nodes):
                for node in nodes:
                    boxes.send(node, partial(boxes.stand_down, version=version))
            case m.Load(plan=plan):
                for stage, rank, shard in plan.places():
                    boxes.send(shard.node, partial(boxes.load, plan=plan, seat=(stage, rank)))
            case m.Standby(plan=plan, stage=stage, rank=rank, id=node):
                boxes.send(node, partial(boxes.copy, plan=plan, seat=(stage, rank)))
            case m.Release(id=node):
                boxes.send(node, lambda box: self.kill(box.node.id))

    def _plan(self, nodes: Sequence[Node], version: int) -> m.PlanMade | m.PlanFailed:
        try:
            outlook = self._planner(nodes, version)
        except YokeError as error:
            return m.PlanFailed(version=version, error=error)
        plan = outlook.plan
        moving_s = max(self.boxes.load_s(self.boxes.by_id[shard.node], plan, (stage, rank)) for stage, rank, shard in plan.places())
        return m.PlanMade(version=version, plan=plan, seconds_per_token=outlook.seconds_per_token, moving_s=moving_s)

    def _tick(self) -> None:
        self.time.at(self.now + m.TICK_S, self._tick)
        self._handle(m.Tick())

    def _start(self, session: Session) -> None:
        """Ask the engine of the plan that serves; from now on nobody else's tokens count."""
        plan = self.laws.serving
        if plan is None:
            raise InvariantError("an answer is to be given while no plan serves")
        self._engine = plan.stages[0].shards[0].node
        answer = Answer(session.name, (*session.prompt, *session.drawn), session.n_wanted - len(session.drawn))
        self.boxes.send(self._engine, partial(self.boxes.answer, version=plan.version, answer=answer))

    def _hear(self, box: Box, event: m.Event) -> None:
        if self._connected.get(box.node.id) == box.life:
            self._handle(event)
            if not isinstance(event, m.Heard) and self._connected.get(box.node.id) == box.life:
                self._handle(m.Heard(id=box.node.id))

    def _take(self, box: Box, answer: Answer, token: int) -> None:
        session = self.sessions[answer.name]
        if self._connected.get(box.node.id) == box.life and box.node.id == self._engine and not session.is_over:
            session.drawn.append(token)

    def _lose(self, node: NodeId, why: str, after_s: float) -> None:
        life = self._connected.get(node)

        def lose() -> None:
            if self._connected.get(node, life) == life:  # not if another worker of it has come since
                self._connected.pop(node, None)
                self._handle(m.Lost(id=node, why=f"{self.boxes.by_id[node].node.name} is gone ({why})"))

        self.time.at(self.now + after_s, lose)

    def _drop(self, box: Box) -> None:
        """Close a connection; the state is told again later. This machine's own worker is killed if it does not answer."""
        if box.is_reachable and self.now - box.there_since_s > 1.0:
            raise InvariantError(f"{box.node.name} was dropped, but it was there\n{self.laws.story()}")
        self._lose(box.node.id, "dropped", 0.01)
        self._connected.pop(box.node.id, None)
        if box.node.id == self._own:
            self.kill(self._own)

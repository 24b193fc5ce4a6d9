"""Simulated machines: workers that load, wire and draw tokens on virtual time, and the ways between them and the coordinator. Nothing sleeps and nothing is opened.

What a worker has seen of an answer stands in a cache of its own, from which the next token follows. So a token that was drawn by a plan that had been stood down,
drawn twice, or drawn from a cache that was not rebuilt, makes another text.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from yoke.cluster import messages as m
from yoke.cluster.places import Place, Seat
from yoke.core.errors import BackendError, InvariantError, NodeGone
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan
from yoke.planner import Machine, seconds_per_token

LOOK_S = 0.05
"""How often a simulated worker looks whether the others of its plan are ready."""

PREFILL_SHARE = 0.1
"""A token that is only read again costs this part of one that is drawn."""

Deed = Callable[[], None]
Say = Callable[["Box", m.Event], None]
Hand = Callable[["Box", "Answer", int], None]
"""Gives a drawn token to the coordinator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The world in figures.

    Seconds on the way of a message; chance and length of a spike; seconds that planning takes; bytes a second that a machine loads; seconds after which a worker
    gives up on a neighbour that it cannot reach.
    """

    latency_s: float = 0.002
    spike_chance: float = 0.01
    spike_s: float = 0.2
    planning_s: float = 0.05
    load_bytes_per_s: float = 200e6
    wiring_s: float = 5.0


def next_token(tokens: Sequence[int]) -> int:
    """The model: a function of all tokens."""
    mixed = 17
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return mixed % 1000


class Answer:
    """One answer as the engine sees it; ``tokens`` are prompt and drawn ones, ``n_left`` are still to be drawn."""

    def __init__(self, name: int, tokens: Sequence[int], n_left: int) -> None:
        self.name, self.tokens, self.n_left = name, list(tokens), n_left


class Timeline:
    """Virtual time in seconds: deeds at moments, in order; of two at one moment the one that was asked for first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Deed]] = []
        self._count = itertools.count()

    def at(self, when_s: float, deed: Deed) -> None:
        """Have something done at a moment."""
        heapq.heappush(self._heap, (when_s, next(self._count), deed))

    def run(self, until_s: float, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, until a moment or until it is enough."""
        while self._heap and self._heap[0][0] <= until_s and not is_enough():
            self.now, _, deed = heapq.heappop(self._heap)
            deed()


@dataclass(slots=True, eq=False)
class Duty:
    """One version's work in one worker; ``pace_s`` is seconds per token with all machines at full speed."""

    plan: Plan
    pace_s: float
    is_loaded: bool = False
    is_wired: bool = False
    is_over: bool = False
    caches: dict[int, list[int]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Box:
    """A machine with its worker. ``life`` counts workers: what was under way for an earlier one comes to nothing."""

    node: Node
    life: int = 0
    is_up: bool = False
    is_stopped: bool = False
    is_cut: bool = False
    there_since_s: float = 0.0
    speed: float = 1.0
    load_speed: float = 1.0
    n_failing_loads: int = 0
    duty: Duty | None = None
    holds: Place | None = None
    stood_down: int = 0
    held_up: deque[Deed] = field(default_factory=deque)

    @property
    def is_reachable(self) -> bool:
        """Whether messages get through now."""
        return self.is_up and not self.is_stopped and not self.is_cut

    def begin(self, now: float) -> None:
        """A new worker starts."""
        self.life += 1
        self.is_up, self.is_stopped, self.stood_down, self.there_since_s = True, False, 0, now

    def end(self) -> None:
        """The worker dies, with all that it held."""
        self.is_up, self.duty, self.holds = False, None, None
        self.held_up.clear()

    def is_at(self, version: int) -> bool:
        """Whether it works for that version of the plan."""
        return self.duty is not None and self.duty.plan.version == version and not self.duty.is_over


class Boxes:
    """All machines, the ways between them, and what workers do.

    Parameters
    ----------
    say : is given what a worker says, when it arrives at the coordinator.
    hand : is given the tokens that the engine draws, when they arrive.
    """

    def __init__(self, nodes: Sequence[Node], time: Timeline, terms: Terms, seed: int, say: Say, hand: Hand) -> None:
        self.by_id = {node.id: Box(node) for node in nodes}
        self.parted: set[frozenset[NodeId]] = set()
        self._time, self._terms, self._say_there, self._hand = time, terms, say, hand
        self._chance = random.Random(seed)  # noqa: S311 # a story that can be told again, no secret
        self._arrivals: dict[tuple[NodeId, bool], float] = {}

    def of(self, plan: Plan) -> list[Box]:
        """The machines of a plan, in its order."""
        return [self.by_id[shard.node] for _, _, shard in plan.places()]

    def send(self, node: NodeId, deed: Callable[[Box], None]) -> None:
        """Give a worker an order: it arrives late, after those before it, and never at another worker than the one that was there."""
        box = self.by_id[node]
        self._travel(box, partial(deed, box), is_down=True)

    def say(self, box: Box, event: m.Event) -> None:
        """Send something to the coordinator, after what was said before."""
        self._travel(box, partial(self._say_there, box, event), is_down=False)

    def catch_up(self, box: Box) -> None:
        """What had to wait for a machine goes on; what still must waits again."""
        held, box.held_up = box.held_up, deque()
        for deed in held:
            deed()

    def sever(self, gone: Box, after_s: float, is_so: Callable[[], bool] = lambda: True) -> None:
        """The wires between a machine and the others of its plan end: after a while each of them says so, if it is still so."""
        if gone.duty is None or not gone.duty.is_wired:
            return
        for box in self.of(gone.duty.plan):
            if box.duty is not None and box.is_at(gone.duty.plan.version) and box.duty.is_wired:
                self.later(box, after_s, partial(self._lose_wires, box, box.duty, is_so))

    def later(self, box: Box, wait_s: float, deed: Deed) -> None:
        """A worker does something after a while, if it still lives; a stopped one does it when it goes on."""
        life = box.life

        def do() -> None:
            if box.life == life and box.is_up:
                box.held_up.append(do) if box.is_stopped else deed()

        self._time.at(self._time.now + wait_s, do)

    def load_s(self, box: Box, plan: Plan, seat: Seat) -> float:
        """Seconds until a machine holds a place's shard."""
        return 0.0 if box.holds == Place.of(plan, seat) else plan.shard_bytes(*seat) / (self._terms.load_bytes_per_s * box.load_speed)

    # orders

    def pong(self, box: Box) -> None:
        """Give a sign of life, and the speed at work."""
        if box.duty is not None and box.duty.is_wired:
            self.say(box, m.Measured(id=box.node.id, matvec_bytes_per_s=box.speed * box.node.device.matvec_bytes_per_s))
        self.say(box, m.Heard(id=box.node.id))

    def prepare(self, box: Box, plan: Plan, seat: Seat) -> None:
        """Fetch what a place needs into the store."""
        self.later(
            box, self.load_s(box, plan, seat), lambda: self._end_load(box, plan, lambda: self.say(box, m.Prepared(version=plan.version, id=box.node.id)))
        )

    def copy(self, box: Box, plan: Plan, seat: Seat) -> None:
        """Load a copy of a place's shard."""

        def done() -> None:
            if box.stood_down < plan.version:
                box.holds = Place.of(plan, seat)
                self.say(box, m.Loaded(version=plan.version, id=box.node.id))

        self.later(box, self.load_s(box, plan, seat), lambda: self._end_load(box, plan, done))

    def load(self, box: Box, plan: Plan, seat: Seat) -> None:
        """Load a place, and wire it with the others."""
        if plan.version <= box.stood_down:
            return
        if box.duty is not None and not box.duty.is_over:
            raise InvariantError(f"{box.node.name} works for plan {box.duty.plan.version} and shall load {plan.version}")
        duty = box.duty = Duty(plan, seconds_per_token(plan, Machine.of([other.node for other in self.of(plan)], [])))

        def done() -> None:
            box.holds, duty.is_loaded = Place.of(plan, seat), True
            self._wire(box, duty, self._time.now + self._terms.wiring_s)

        self.later(box, self.load_s(box, plan, seat), lambda: None if duty.is_over else self._end_load(box, plan, done))

    def stand_down(self, box: Box, version: int) -> None:
        """Stop the work of that version and older ones."""
        box.stood_down = max(box.stood_down, version)
        if box.duty is not None and box.duty.plan.version <= version:
            box.duty.is_over, box.duty = True, None

    def answer(self, box: Box, version: int, answer: Answer) -> None:
        """Go on with an answer, if the engine still works for that version: what there is of it is read again first."""
        if box.duty is not None and box.is_at(version) and box.duty.is_wired:
            self.later(box, PREFILL_SHARE * len(answer.tokens) * box.duty.pace_s, partial(self._step, box, box.duty, answer))

    # what workers do

    def _travel(self, box: Box, deed: Deed, *, is_down: bool) -> None:
        terms, key, life = self._terms, (box.node.id, is_down), box.life
        delay_s = terms.latency_s * self._chance.uniform(0.5, 1.5) + (terms.spike_s if self._chance.random() < terms.spike_chance else 0.0)
        when_s = self._arrivals[key] = max(self._time.now + delay_s, self._arrivals.get(key, 0.0))

        def arrive() -> None:
            if box.life == life and (box.is_up or not is_down):
                box.held_up.append(arrive) if box.is_cut or (is_down and box.is_stopped) else deed()

        self._time.at(when_s, arrive)

    def _end_load(self, box: Box, plan: Plan, done: Deed) -> None:
        if not box.n_failing_loads:
            done()
            return
        box.n_failing_loads -= 1
        self.say(box, m.LoadFailed(version=plan.version, id=box.node.id, error=BackendError(f"{box.node.name}: the disk is full")))

    def _is_parted(self, boxes: Sequence[Box], box: Box) -> bool:
        return any(frozenset((box.node.id, other.node.id)) in self.parted for other in boxes)

    def _wire(self, box: Box, duty: Duty, deadline_s: float) -> None:
        """Connect with the others of the plan once they have loaded too; after a while give up on one that cannot be reached."""
        if duty.is_over:
            return
        boxes, version = self.of(duty.plan), duty.plan.version
        is_parted = self._is_parted(boxes, box)
        if is_parted and self._time.now >= deadline_s:
            duty.is_over = True
            self.say(box, m.LoadFailed(version=version, id=box.node.id, error=NodeGone(f"{box.node.name}: a neighbour cannot be reached")))
        elif is_parted or not all(other.is_reachable and other.duty is not None and other.is_at(version) and other.duty.is_loaded for other in boxes):
            self.later(box, LOOK_S, partial(self._wire, box, duty, deadline_s))
        else:
            duty.is_wired = True
            self.say(box, m.Loaded(version=version, id=box.node.id))

    def _lose_wires(self, box: Box, duty: Duty, is_so: Callable[[], bool]) -> None:
        if not duty.is_over and is_so():
            duty.is_over = True
            self.say(box, m.Broken(version=duty.plan.version, id=box.node.id, why=f"{box.node.name} has lost a neighbour"))

    def _step(self, box: Box, duty: Duty, answer: Answer) -> None:
        """The engine's loop for one answer: every machine reads what it has not seen, the last one draws, and the token goes to the coordinator."""
        if duty.is_over or not answer.n_left:
            return
        boxes = self.of(duty.plan)
        if not all(other.is_reachable and other.is_at(duty.plan.version) for other in boxes) or any(self._is_parted(boxes, other) for other in boxes):
            self.later(box, LOOK_S, partial(self._step, box, duty, answer))
            return
        cache: list[int] = []
        for other in boxes:
            if other.duty is not None:
                cache = other.duty.caches.setdefault(answer.name, [])
                cache += answer.tokens[len(cache) :]
        answer.tokens.append(next_token(cache))
        answer.n_left -= 1
        token = answer.tokens[-1]
        self._travel(box, lambda: self._hand(box, answer, token), is_down=False)
        self.later(box, duty.pace_s / min(other.speed for other in boxes), partial(self._step, box, duty, answer))

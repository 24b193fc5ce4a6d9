"""What can happen to a cluster, and what can be done about it. Events go into `State.handle`, commands come out; neither knows how it travels.

Times are seconds; ``version`` is a plan's. An event that names a version is about that plan and no other one.
"""

from dataclasses import dataclass

from yoke.core.errors import YokeError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan

TICK_S = 0.1
"""How often the caller sends a `Tick`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A member introduced itself; its worker is empty. May be a rejoin. The coordinator has the model's file: without its worker nothing is planned."""

    node: Node
    is_coordinator: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A member's control connection ended, or the caller dropped it. ``why`` names it and is shown to people."""

    id: NodeId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Any message came from a member, a pong among them."""

    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A member asks to go in peace."""

    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A member's speed as its step times show it, in bytes of weights per second."""

    id: NodeId
    matvec_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade:
    """The answer to `MakePlan`. ``moving_s`` is how long loading is predicted to take: 0 if nothing moves.

    A plan that ``is_wished`` has the layout that a person asked for: it replaces one that has not, whatever it costs. ``is_by_hand``: it has the machines too.
    """

    version: int
    plan: Plan
    seconds_per_token: float
    moving_s: float
    is_wished: bool = False
    is_by_hand: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFailed:
    """The other answer to `MakePlan`: a `PlacementError` if nothing fits."""

    version: int
    error: YokeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A node has in its store all that the plan asks of it."""

    version: int
    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A node's shard is loaded and wired; or, of a node with a `Standby` order, loaded."""

    version: int
    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """A node could not prepare or load: disk full, no memory, source gone. `NodeGone` says that a neighbour was at fault, and not which."""

    version: int
    id: NodeId
    error: YokeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A node that was loaded and wired has lost a neighbour of the plan, or its own device; ``why`` is shown to people."""

    version: int
    id: NodeId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed. The caller sends one every `TICK_S`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Ask a node for a sign of life."""

    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A node has been silent for longer than usual. For status and log only."""

    id: NodeId
    silent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """A suspect has been heard again."""

    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Close a node's connection. It counts as dead already; a `Lost` of it that comes later does no harm."""

    id: NodeId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan:
    """Ask the planner; it may take seconds. ``nodes`` starts with the coordinator. The answer is `PlanMade` or `PlanFailed` with the same version."""

    version: int
    nodes: tuple[Node, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Let the plan's nodes fetch what they lack into their stores, while the old plan goes on serving."""

    version: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StandDown:
    """Stop the work of this version, and of older ones, in these nodes at once. Streams pause. There are no ids if all of its nodes are dead."""

    version: int
    ids: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load and wire a plan on all its nodes."""

    version: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """Let a spare hold a copy of one place's shard, ready loaded. ``plan`` is the one that serves, ``version`` its version."""

    version: int
    plan: Plan
    stage: int
    rank: int
    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Every node of the plan is loaded: replay the live sessions, and go on."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A member that asked to leave may go now."""

    id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class FailStreams:
    """End every stream with this error; later requests get it at once, until the next `Serve`."""

    error: YokeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One plain sentence for log and terminal: why something was done or not, with the figures that decided."""

    text: str


Event = Joined | Lost | Heard | Leaving | Measured | PlanMade | PlanFailed | Prepared | Loaded | LoadFailed | Broken | Tick
Command = Ping | Suspect | Trust | Drop | MakePlan | Prepare | StandDown | Load | Standby | Serve | Release | FailStreams | Note

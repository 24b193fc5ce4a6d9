"""Spares that hold a copy of a place's shard, ready loaded: who shall hold what, and who can take over. Knows members and plans; gives no orders itself."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from yoke.cluster.members import Member
from yoke.cluster.places import ENGINES, Place, Seat, Seating
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.planner import Wish
from yoke.planner.cost import node_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One spare's order: a place, where that is in the plan that serves, the version it was given with, and when it must be loaded (monotonic seconds)."""

    place: Place
    seat: Seat
    version: int
    deadline_s: float
    is_ready: bool = False


class Standbys:
    """The orders given to spares, the oldest first."""

    def __init__(self, copies: int, wish: Wish) -> None:
        self._copies, self._wish = copies, wish
        self._by_id: OrderedDict[NodeId, Standing] = OrderedDict()

    def get(self, node: NodeId) -> Standing | None:
        """The order of a spare."""
        return self._by_id.get(node)

    def discard(self, node: NodeId) -> None:
        """A spare is gone, or has other work."""
        self._by_id.pop(node, None)

    def ready(self, node: NodeId) -> None:
        """A spare has loaded what it was ordered to."""
        self._by_id[node] = replace(self._by_id[node], is_ready=True)

    def overdue(self, now: float) -> list[NodeId]:
        """Spares that should be ready and are not. Looks at all orders: there are at most as many as places times copies."""
        return [node for node, standing in self._by_id.items() if not standing.is_ready and standing.deadline_s <= now]

    def in_the_way(self, plan: Plan) -> dict[NodeId, Standing]:
        """Spares that are still loading a copy, and shall not: they have a place in ``plan``, or theirs is not in it any more. Their orders are forgotten."""
        seated = {shard.node for _, _, shard in plan.places()}
        places = {Place.of(plan, (stage, rank)) for stage, rank, _ in plan.places()} if self._by_id else set()
        busy = {node: s for node, s in self._by_id.items() if not s.is_ready and (node in seated or s.place not in places)}
        for node in (*busy, *(seated & self._by_id.keys())):
            self.discard(node)
        return busy

    def settle(self, served: Seating, spares: Mapping[NodeId, Member], deadline_s: float) -> dict[NodeId, Seat]:
        """Decide who holds what while ``served`` serves; the answer are the spares with a new order, and whose place they shall copy.

        Places whose loss costs most come first: the biggest shards, and of equal ones those of the fastest node. A spare that has a place's shard already keeps
        it; else the fastest one with room for it is chosen. Takes O(places x spares) at most.
        """
        plan = served.plan
        seats = {Place.of(plan, seat): seat for seat in served.seats.values() if seat != ENGINES}
        for node, standing in list(self._by_id.items()):
            if node not in spares or standing.place not in seats:
                del self._by_id[node]
            else:
                self._by_id[node] = replace(standing, seat=seats[standing.place])
        for node, member in spares.items():
            if node not in self._by_id and member.holds in seats:
                self._by_id[node] = Standing(place=member.holds, seat=seats[member.holds], version=plan.version, deadline_s=deadline_s, is_ready=True)
        free = sorted((node for node in spares if node not in self._by_id), key=lambda node: -spares[node].node.device.matvec_bytes_per_s)
        held = Counter(standing.place for standing in self._by_id.values())
        ordered: dict[NodeId, Seat] = {}
        for n_copies in range(1, self._copies + 1):
            for place in sorted(seats, key=lambda place: _loss(served, seats[place])):
                if held[place] >= n_copies:
                    continue
                needed = node_bytes(plan, *seats[place], self._wish)
                chosen = next((node for node in free if spares[node].node.device.free_bytes >= needed), None)
                if chosen is None:
                    continue
                free.remove(chosen)
                held[place] += 1
                self._by_id[chosen] = Standing(place=place, seat=seats[place], version=plan.version, deadline_s=deadline_s)
                ordered[chosen] = seats[place]
        return ordered


def successors(seating: Seating, dead: Iterable[NodeId], spares: Mapping[NodeId, Member]) -> dict[NodeId, NodeId] | None:
    """Who takes over from each of the dead nodes of a plan: the fastest spare that has exactly its place loaded. None if one of them has no such spare."""
    chosen: dict[NodeId, NodeId] = {}
    for node in dead:
        if node not in seating.seats:
            continue
        if seating.seats[node] == ENGINES:
            return None
        place = seating.place(node)
        able = [spare for spare, member in spares.items() if member.holds == place and spare not in chosen.values()]
        if not able:
            return None
        chosen[node] = max(able, key=lambda spare: spares[spare].node.device.matvec_bytes_per_s)
    return chosen


def _loss(served: Seating, seat: Seat) -> tuple[float, float]:
    stage, rank = seat
    node = served.nodes[served.plan.stages[stage].shards[rank].node]
    return -served.plan.shard_bytes(stage, rank), -node.device.matvec_bytes_per_s

"""Every grouping of few nodes: which of them, in which stages, which stage last, in which order. Exact to one part in a million, by bounds.

Unordered groupings are grown stage by stage. One that cannot be continued to anything below the limit is not continued; of one that is whole, the bound decides
whether a plan is made of it. Plans are made in the order of their bounds, until the next bound is not below the best value.
"""

from collections.abc import Iterator

from yoke.planner.bounds import Vessel, slowest_s, summed_s
from yoke.planner.field import Field, Group
from yoke.planner.orders import best_order, shortest_order
from yoke.planner.wish import NEAR, Goal
from yoke.planner.workbench import INFINITE, Workbench

EXACT_NODES = 8
"""Groupings of so many nodes: 189,171 with their orders, 17,007 without."""

TOLERANCE = 1e-6
"""Bounds ignore some bytes of rounding; what differs by less than this is equal."""

MORE_PLANS = 12
"""Plans near the best that are made besides, to choose among and to show."""

Grouping = tuple[Group, ...]


def search(bench: Workbench, best_s: float) -> float:
    """Make every plan that may be the best, given that one of ``best_s`` was found; the best value then."""
    found: list[tuple[float, Grouping, int]] = []
    if bench.wish.goal is Goal.LATENCY:
        found += _Enumeration(bench, None, best_s).run()
    else:
        for n_stages in range(1, min(len(bench.nodes), bench.spec.n_blocks) + 1):
            found += _Enumeration(bench, n_stages, best_s).run()
    found.sort(key=lambda item: item[0])
    n_more = 0
    for bound_s, groups, last in found:
        if bound_s >= best_s * (1 - TOLERANCE) and n_more >= MORE_PLANS:
            break
        in_order_s = bench.bound_s(shortest_order(bench, groups, last))
        if in_order_s >= best_s * (1 - TOLERANCE):
            n_more += 1
            if n_more > MORE_PLANS or in_order_s > best_s * (1 + NEAR):
                continue
        best_s = min([best_s, *(candidate.value_s for candidate in bench.make(best_order(bench, groups, last)))])
    return best_s


class _Enumeration:
    """Groupings with bounds below the limit; those of ``n_stages`` stages, or of any number."""

    def __init__(self, bench: Workbench, n_stages: int | None, best_s: float) -> None:
        self._bench, self._n_stages = bench, n_stages
        self._limit_s = best_s * (1 + NEAR)
        self._bounds, self._field = bench.bounds(n_stages or 1), bench.field(n_stages or 1)
        n_nodes = len(bench.nodes)
        self._groups: list[Group] = [tuple(node for node in range(n_nodes) if mask >> node & 1) for mask in range(1 << n_nodes)]
        self._speeds = [sum(1 / self._field.s_per_byte[node] for node in group) for group in self._groups]
        self._slopes = self._best_slopes()
        self._ways_s: dict[Group, float] = {}
        self._most = min(n_stages or n_nodes, bench.spec.n_blocks)
        self._kinds = _kinds(self._field)
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    def run(self) -> Iterator[tuple[float, Grouping, int]]:
        """Each grouping with its bound, and which group is last."""
        everyone = (1 << len(self._bench.nodes)) - 1
        for mates in _subsets(everyone & ~1):
            first = self._groups[mates | 1]
            if self._bounds.vessel(first, False) is not None:
                costs = self._bench.machine.costs
                path_s = costs.engine_s + costs.draw_s * self._field.rows + self._field.spread_s(0, first)
                yield from self._grown((first,), everyone & ~mates & ~1, everyone & ~1, path_s)

    def _grown(self, groups: Grouping, free: int, later: int, path_s: float) -> Iterator[tuple[float, Grouping, int]]:
        """``groups`` as they are, and with further ones of the ``free`` nodes; groups come in the order of their lowest node, which is one of ``later``."""
        if (self._n_stages is None or len(groups) == self._n_stages) and not (self._bench.wish.use_all and free):
            yield from self._whole(groups, path_s)
        free_later = free & later
        if len(groups) >= self._most or not free_later or (self._bench.wish.use_all and free != free_later) or self._is_hopeless(groups, free_later, path_s):
            return
        for chosen in _subsets(free_later):
            if chosen:
                group = self._groups[chosen]
                if self._bounds.vessel(group, False) is None:
                    continue
                lowest = chosen & -chosen
                yield from self._grown((*groups, group), free & ~chosen, ~((lowest << 1) - 1) & later, path_s + self._way_s(group))

    def _whole(self, groups: Grouping, path_s: float) -> Iterator[tuple[float, Grouping, int]]:
        for last in range(1, len(groups)) if len(groups) > 1 else (0,):
            stages = (*groups[:last], *groups[last + 1 :], groups[last])
            bound_s = self._bench.poured_s(stages, path_s + self._field.end(groups[last], len(groups) == 1)[0])
            if bound_s < self._limit_s and self._is_new(groups, last):
                yield bound_s, groups, last

    def _is_new(self, groups: Grouping, last: int) -> bool:
        """Whether no grouping before was the same but for the names of nodes."""
        kinds = [tuple(sorted(self._kinds[node] for node in group)) for group in groups]
        signature = (kinds[0], *sorted(kinds[index] for index in range(1, len(groups)) if index != last), kinds[last])
        is_new = signature not in self._seen
        self._seen.add(signature)
        return is_new

    def _is_hopeless(self, groups: Grouping, free: int, path_s: float) -> bool:
        """Whether nothing that has more stages than these, made of ``free`` nodes, is below the limit."""
        bench, costs = self._bench, self._bench.machine.costs
        vessels = []
        for group in groups:
            vessel = self._bounds.vessel(group, False)
            if vessel is None:
                return True
            vessels.append(vessel)
        left, fastest = self._bounds.left(len(groups)), max(self._speeds[free], *(sum(1 / self._field.s_per_byte[node] for node in g) for g in groups))
        sea = Vessel(0.0, ((INFINITE, self._slopes[free]),))
        one_s = path_s + 2 * costs.boundary_s + summed_s([*vessels, sea], left) + self._bounds.head_bytes / fastest
        if bench.wish.goal is Goal.LATENCY:
            return one_s >= self._limit_s
        sea = Vessel(0.0, ((1e30, 1 / self._speeds[free]),))
        slowest = slowest_s([*vessels, sea], left, costs.engine_s, 0.0)
        n_batches = min(self._n_stages or 1, bench.wish.streams)
        return max(one_s, n_batches * slowest) / bench.wish.streams >= self._limit_s

    def _way_s(self, group: Group) -> float:
        """The least that it takes to reach a group from any node outside it."""
        found = self._ways_s.get(group)
        if found is None:
            sources = (node for node in range(len(self._bench.nodes)) if node not in group)
            found = self._ways_s[group] = min(self._field.spread_s(node, group) for node in sources) + self._bench.machine.costs.boundary_s
        return found

    def _best_slopes(self) -> list[float]:
        """For every set of nodes, the least seconds for a byte of blocks, exchanges included, of any group within it."""
        slopes = [INFINITE] * len(self._groups)
        for mask in range(1, len(self._groups)):
            own = 1 / self._speeds[mask] + self._bounds.exchange_s_per_byte(self._groups[mask])
            slopes[mask] = min([own, *(slopes[mask & ~(1 << node)] for node in self._groups[mask])])
        return slopes


def _kinds(field: Field) -> list[int]:
    """A number for each node, the same for those that could change places without anything else changing: memory, speed and all links."""
    kinds: list[int] = []
    for node in range(field.n_nodes):
        kinds.append(next((kinds[other] for other in range(1, node) if _are_alike(field, node, other)), node))
    return kinds


def _are_alike(field: Field, a: int, b: int) -> bool:
    if (field.rooms[a], field.s_per_byte[a]) != (field.rooms[b], field.s_per_byte[b]) or field.way(a, b) != field.way(b, a):
        return False
    others = (node for node in range(field.n_nodes) if node not in {a, b})
    return all(field.way(a, node) == field.way(b, node) and field.way(node, a) == field.way(node, b) for node in others)


def _subsets(mask: int) -> Iterator[int]:
    """Every subset of a set of bits, the empty one too."""
    subset = mask
    while True:
        yield subset
        if not subset:
            return
        subset = (subset - 1) & mask

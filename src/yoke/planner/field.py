"""The machines as a search sees them: numbered, number 0 the one with the engine, with seconds for each byte and for each way. Knows a model's sizes, but no plan.

A *group* is the nodes of one stage, as ascending numbers. Within a stage, the node that the next stage is reached from soonest leads (is rank 0); in the first
stage number 0 does; in the last stage the node that collects the logits and reaches number 0 soonest.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from yoke.core.node import Node
from yoke.core.plan import Span
from yoke.core.spec import ModelSpec
from yoke.planner.cost import Machine
from yoke.planner.wish import Wish

Group = tuple[int, ...]


class Field:
    """Nodes by number, for steps of ``rows`` tokens.

    Parameters
    ----------
    nodes : that of the engine first, the others in an order that does not depend on how they were given.
    rows : tokens in a step; a fraction stands for steps of different sizes.

    ``heads`` are cuts of heads by weights that were worked out already.
    """

    def __init__(self, spec: ModelSpec, nodes: Sequence[Node], machine: Machine, wish: Wish, rows: float) -> None:
        self.spec, self.nodes, self.machine, self.wish, self.rows = spec, tuple(nodes), machine, wish, rows
        attention = spec.attention_bytes or (0,) * spec.n_blocks
        feed_forward = spec.feed_forward_bytes or (0 if any(attention) else 1,) * spec.n_blocks  # sizes that nobody knows count one a block
        self.attention, self.feed_forward = (0, *accumulate(attention)), (0, *accumulate(feed_forward))
        self.block_bytes = tuple(a + f for a, f in zip(attention, feed_forward, strict=True))
        self.is_uniform = len(set(zip(attention, feed_forward, strict=True))) == 1
        self.cell_bytes = wish.n_cells * spec.cache_bytes_per_cell(1, wish.cache_element_bytes)
        self.rooms = [machine.room(node.id) for node in nodes]
        self.rooms[0] -= spec.embedding_bytes
        self.s_per_byte = [machine.s_per_byte(node.id, spec, rows) for node in nodes]
        self.hidden = machine.costs.hidden_bytes * spec.width * rows
        self.heads: dict[tuple[float, ...], list[Span]] = {}
        self._ways: dict[int, list[tuple[float, float]]] = {}
        self._exchanges: dict[Group, float] = {}
        self._crossings: dict[tuple[Group, Group], tuple[float, int]] = {}
        self._ends: dict[tuple[Group, bool], tuple[float, int]] = {}

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.nodes)

    def way(self, source: int, target: int) -> tuple[float, float]:
        """Seconds for an empty message, and for each byte."""
        return self._ways_from(source)[target]

    def block_exchange_s(self, group: Group) -> float:
        """Seconds that the two exchanges of one block take."""
        found = self._exchanges.get(group)
        if found is None:
            n_bytes, slowest = self.hidden * (len(group) - 1), 0.0
            for source in group:
                ways = self._ways_from(source)
                for target in group:
                    if target != source:
                        slowest = max(slowest, ways[target][0] + n_bytes * ways[target][1])
            found = self._exchanges[group] = 2 * slowest
        return found

    def spread_s(self, source: int, group: Group) -> float:
        """Seconds until every node of ``group`` but ``source`` has the residual stream from it."""
        ways, slowest = self._ways_from(source), 0.0
        n_bytes = self.hidden * (len(group) - (source in group))
        for node in group:
            if node != source:
                slowest = max(slowest, ways[node][0] + n_bytes * ways[node][1])
        return slowest

    def _ways_from(self, source: int) -> list[tuple[float, float]]:
        row = self._ways.get(source)
        if row is None:
            origin = self.nodes[source].id
            row = self._ways[source] = [self.machine.way(origin, node.id) for node in self.nodes]
        return row

    def crossing(self, group: Group, following: Group) -> tuple[float, int]:
        """Seconds from one stage to the next, and who leads the first of them for it."""
        key = (group, following)
        found = self._crossings.get(key)
        if found is None:
            leaders = group[:1] if group[0] == 0 else group
            found = self._crossings[key] = min((self.spread_s(leader, following) + self.machine.costs.boundary_s, leader) for leader in leaders)
        return found

    def end(self, group: Group, is_only: bool) -> tuple[float, int]:
        """Seconds from the last stage's logits back to the engine, and who leads that stage for it."""
        key = (group, is_only)
        found = self._ends.get(key)
        if found is None:
            leaders = (0,) if is_only else group
            found = self._ends[key] = min((self._gather_s(leader, group) + (0.0 if is_only else self._way_back_s(leader)), leader) for leader in leaders)
        return found

    def path_s(self, stages: Sequence[Group]) -> float:
        """Seconds of a step that are spent neither computing nor in exchanges: engine, drawing, and all ways."""
        costs = self.machine.costs
        ways = sum(self.crossing(a, b)[0] for a, b in pairwise(stages))
        return costs.engine_s + costs.draw_s * self.rows + self.spread_s(0, stages[0]) + ways + self.end(stages[-1], len(stages) == 1)[0]

    def seats(self, stages: Sequence[Group]) -> list[Group]:
        """The stages' nodes in the order of their ranks: who leads, then the others."""
        leaders = [self.crossing(a, b)[1] for a, b in pairwise(stages)]
        leaders.append(self.end(stages[-1], len(stages) == 1)[1])
        return [(leader, *(node for node in group if node != leader)) for leader, group in zip(leaders, stages, strict=True)]

    def _gather_s(self, leader: int, group: Group) -> float:
        n_bytes = self.machine.costs.best_bytes * self.rows
        return max((empty_s + n_bytes * s_per_byte for empty_s, s_per_byte in (self.way(node, leader) for node in group if node != leader)), default=0.0)

    def _way_back_s(self, leader: int) -> float:
        empty_s, s_per_byte = self.way(leader, 0)
        return empty_s + self.machine.costs.token_bytes * self.rows * s_per_byte + self.machine.costs.boundary_s

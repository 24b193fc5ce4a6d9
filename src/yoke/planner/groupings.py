"""Which nodes in which stages: every grouping that is worth a prediction. Knows speeds, memory and links, but no model.

A grouping is a sequence of stages, each a sequence of nodes; the coordinator leads the first. Up to `EXACT_NODES` nodes, every subset with the coordinator in it is
divided in every way, with the stages in every order. With more nodes the search is limited, good but not proven best: nodes are ranked by speed, by memory and
by nearness to the coordinator, and of each ranking the first few, then ever larger numbers, and at last all, are cut into consecutive stages: in every way
for up to `EXACT_NODES` of them, into equal stages for more. Within a stage, the node that is nearest to the stage before leads.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

from yoke.core.node import Node
from yoke.planner.cost import Machine, Wish
from yoke.planner.layout import check_grid

EXACT_NODES = 5

Grouping = tuple[tuple[Node, ...], ...]


def groupings(nodes: Sequence[Node], machine: Machine, use_all: bool) -> Iterator[Grouping]:
    """Every grouping to try, those of few nodes first; ``use_all`` leaves out those of fewer nodes than there are."""
    found = _all_groupings(nodes, use_all) if len(nodes) <= EXACT_NODES else _some_groupings(nodes, machine, use_all)
    for grouping in found:
        yield _led(grouping, machine)


def forced_grouping(nodes: Sequence[Node], wish: Wish) -> Grouping:
    """The wished grid over the first nodes, in their order. What is not said of stages and ranks follows from the number of shares, or of nodes.

    Raises
    ------
    PlacementError
        if there are too few nodes, or shares are not one a rank.
    """
    ranks = wish.ranks if wish.ranks is not None else len(wish.shares) if wish.shares is not None else None
    stages = wish.stages if wish.stages is not None else max(1, len(nodes) // (ranks or 1))
    ranks = ranks if ranks is not None else max(1, len(nodes) // stages)
    check_grid(len(nodes), stages, ranks, wish.shares)
    return tuple(tuple(nodes[stage * ranks : (stage + 1) * ranks]) for stage in range(stages))


def _all_groupings(nodes: Sequence[Node], use_all: bool) -> Iterator[Grouping]:
    for size in range(len(nodes) if use_all else 1, len(nodes) + 1):
        for others in combinations(nodes[1:], size - 1):
            for n_mates in range(size - 1, -1, -1):
                for mates in combinations(others, n_mates):
                    rest = tuple(node for node in others if node not in mates)
                    for later in _ordered_partitions(rest):
                        yield ((nodes[0], *mates), *later)


def _ordered_partitions(nodes: tuple[Node, ...]) -> Iterator[Grouping]:
    """Every way to divide ``nodes`` into stages, in every order of stages."""
    if not nodes:
        yield ()
    for size in range(len(nodes), 0, -1):
        for stage in combinations(nodes, size):
            for later in _ordered_partitions(tuple(node for node in nodes if node not in stage)):
                yield (stage, *later)


def _some_groupings(nodes: Sequence[Node], machine: Machine, use_all: bool) -> Iterator[Grouping]:
    first = nodes[0]
    rankings = (
        sorted(nodes[1:], key=lambda node: -node.device.matvec_bytes_per_s),
        sorted(nodes[1:], key=lambda node: -node.device.free_bytes),
        sorted(nodes[1:], key=lambda node: machine.transfer_s(first.id, node.id, 0)),
    )
    for size in [len(nodes)] if use_all else _sizes(len(nodes)):
        for ranking in rankings:
            chosen = (first, *ranking[: size - 1])
            for parts in _compositions(size) if size <= EXACT_NODES else _equal_parts(size):
                yield _cut(chosen, parts)


def _sizes(n_nodes: int) -> list[int]:
    sizes, size = [], 1
    while size < n_nodes:
        sizes.append(size)
        size = max(size + 1, size * 5 // 4)
    return [*sizes, n_nodes]


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as an ordered sum."""
    if total == 0:
        yield ()
    for head in range(total, 0, -1):
        for rest in _compositions(total - head):
            yield (head, *rest)


def _equal_parts(total: int) -> Iterator[tuple[int, ...]]:
    for ranks in sorted({1, 2, 3, 4, 6, 8, total}):
        if ranks <= total:
            yield (*[ranks] * (total // ranks), *([total % ranks] if total % ranks else []))


def _cut(nodes: Sequence[Node], parts: Sequence[int]) -> Grouping:
    stages, start = [], 0
    for part in parts:
        stages.append(tuple(nodes[start : start + part]))
        start += part
    return tuple(stages)


def _led(grouping: Grouping, machine: Machine) -> Grouping:
    """The same grouping with each later stage led by the node that its predecessor's leader reaches first, then in order of speed."""
    stages = [grouping[0]]
    for stage in grouping[1:]:
        before = stages[-1][0].id
        ordered = sorted(stage, key=lambda node: -node.device.matvec_bytes_per_s)
        leader = min(ordered, key=lambda node: machine.transfer_s(before, node.id, 0))
        stages.append((leader, *(node for node in ordered if node is not leader)))
    return tuple(stages)

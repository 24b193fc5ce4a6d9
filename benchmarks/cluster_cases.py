"""Which clusters are measured: plans by hand for the prediction, clusters by chance for the plans that are chosen, and unequal ones. Speeds in GB/s."""

import random
from collections.abc import Sequence

from cluster_bench import CABLES, Case, Machine

SPEEDS = (2.0, 1.0, 0.5, 0.25)
"""Slow ones, since the machines share two processors with the switch: an exchange of three ranks takes 0.6 ms more than on machines of their own (measured)."""

MOST_MACHINES = 4
LINKS = (*CABLES, "each its own")


def machines_of(text: str) -> tuple[Machine, ...]:
    """``8 4:wifi`` is a machine of 8 GB/s on a cable and one of 4 GB/s on Wi-Fi."""
    return tuple(Machine(float(speed), cable or "wired") for speed, _, cable in (word.partition(":") for word in text.split()))


def _plans(rows: Sequence[tuple[str, int, int, str | None]]) -> tuple[Case, ...]:
    return tuple(Case(machines=machines_of(text), stages=stages, ranks=ranks, shares=shares) for text, stages, ranks, shares in rows)


PLANS = _plans(
    [
        ("8", 1, 1, None),
        ("2", 1, 1, None),
        ("4 2", 1, 2, None),
        ("8 4", 1, 2, None),
        ("8 4", 2, 1, None),
        ("2 8", 2, 1, None),
        ("4 4", 1, 2, "3:1"),
        ("2 2", 1, 2, None),
        ("4:wifi 4:wifi", 2, 1, None),
        ("4 2:wifi", 1, 2, None),
        ("4:slow 4:slow", 1, 2, None),
        ("8 2:slow", 2, 1, None),
        ("8 4 2", 3, 1, None),
        ("2 1 0.5", 1, 3, None),
        ("4 4:wifi 4", 3, 1, None),
        ("2 2 2 2", 2, 2, None),
        ("1 0.5 0.5 0.5", 1, 4, None),
        ("8 4:wifi 2 2 2:slow", 5, 1, None),
    ]
)
"""Constants are fitted to every second one, from the first, and held to the others."""

UNEQUAL = tuple(
    Case(machines=machines_of(text), stages=1, ranks=3, shares=shares, wire_type=wire_type)
    for text in ("2 1 0.5", "8 4 2")
    for wire_type in ("float32", "float16")
    for shares in (None, "4:2:1", "1:1:1")
)


def by_chance(seed: int, index: int) -> Case:
    """A cluster of two to four machines, the coordinator any of them."""
    chance = random.Random(f"{seed}-{index}")
    speeds = [chance.choice(SPEEDS) for _ in range(chance.randint(2, MOST_MACHINES))]
    kind = chance.choice(LINKS)
    return Case(machines=tuple(Machine(speed, kind if kind in CABLES else chance.choice(tuple(CABLES))) for speed in speeds))

"""Uneven cuts: dividing a row of indivisible things among ranks, as near to their weights as the allowed cuts let. A rank of weight 0 gets nothing."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from yoke.core.errors import PlacementError
from yoke.core.plan import Span, is_head_share
from yoke.core.spec import ModelSpec

ROW_MULTIPLE = 32
"""Kernels take weights in groups of 8 rows (ggml's repacked layouts); whole quantisation blocks of 32 satisfy them all."""


def cut_heads(spec: ModelSpec, weights: Sequence[float]) -> list[Span]:
    """Query heads for each rank: the cut whose slowest rank is fastest, among those that the model allows; of equals, one near to proportion.

    An exact dynamic programme over (ranks placed, heads given away).

    Raises
    ------
    PlacementError
        if every weight is 0.
    """
    whole = _sum_of(weights)
    stops = _allowed_stops(spec)
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), (0,))}
    for weight in weights:
        ideal = spec.n_heads * weight / whole
        reached: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for start, ((slowest, distance), edges) in best.items():
            for stop in stops[start] if weight > 0 else (start,):
                time = (stop - start) / weight if weight > 0 else 0.0
                cost = (max(slowest, time), distance + (stop - start - ideal) ** 2)
                if stop not in reached or cost < reached[stop][0]:
                    reached[stop] = (cost, (*edges, stop))
        best = reached
    edges = best[spec.n_heads][1]  # always there: one rank of a positive weight may hold all heads
    return [Span(start, stop) for start, stop in pairwise(edges)]


def cut_columns(total: int, block: int, weights: Sequence[float]) -> list[Span]:
    """Feed-forward columns for each rank, in whole blocks, and in multiples of `ROW_MULTIPLE` where there are enough of them."""
    step = math.lcm(block, ROW_MULTIPLE)
    if total % step or total // step < len(weights):
        step = block
    return cut_evenly(total, step, weights)


def cut_rows(total: int, weights: Sequence[float]) -> list[Span]:
    """Rows of a matrix for each rank, in multiples of `ROW_MULTIPLE` where there are enough of them."""
    return cut_evenly(total, ROW_MULTIPLE if total >= ROW_MULTIPLE * len(weights) else 1, weights)


def cut_evenly(total: int, step: int, weights: Sequence[float]) -> list[Span]:
    """``total`` in units of ``step``, so that the slowest rank is as fast as can be; what is no whole unit goes to the last rank that works.

    Every rank first gets the whole units that it would have in exact proportion, then each unit left goes to the rank that is done with it first: this is optimal.

    Raises
    ------
    PlacementError
        if every weight is 0.
    """
    whole = _sum_of(weights)
    n_units = total // step
    units = [min(n_units, int(n_units * (weight / whole))) for weight in weights]
    working = [rank for rank, weight in enumerate(weights) if weight > 0]
    while sum(units) > n_units:  # rounding upwards in the division, by one unit at most
        units[max(working, key=lambda rank: units[rank] / weights[rank])] -= 1
    while sum(units) < n_units:
        units[min(working, key=lambda rank: ((units[rank] + 1) / weights[rank], rank))] += 1
    sizes = [n * step for n in units]
    sizes[working[-1]] += total % step
    spans, start = [], 0
    for size in sizes:
        spans.append(Span(start, start + size))
        start += size
    return spans


def _sum_of(weights: Sequence[float]) -> float:
    whole = sum(weights)
    if not 0 < whole < math.inf or min(weights) < 0:
        raise PlacementError(f"the shares of a stage are {list(weights)}; expected numbers of at least 0, and one above 0")
    return whole


@lru_cache(maxsize=16)
def _allowed_stops(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """For each head where a share may start, the heads where it may stop."""
    cuts = [head for head in range(spec.n_heads + 1) if spec.is_head_cut(head)]
    stops: list[tuple[int, ...]] = [()] * (spec.n_heads + 1)
    for start in cuts:
        stops[start] = tuple(stop for stop in cuts if stop >= start and is_head_share(spec, start, stop))
    return tuple(stops)

"""Uneven cuts: dividing a row of indivisible things among ranks, as near to their speeds as the allowed cuts let."""

from collections.abc import Callable, Sequence

from yoke.core.errors import PlacementError
from yoke.core.plan import Span, is_head_share
from yoke.core.spec import ModelSpec

ROW_MULTIPLE = 32
"""Kernels take weights in groups of 8 rows (ggml's repacked layouts); whole quantisation blocks of 32 satisfy them all."""


def cut_heads(spec: ModelSpec, speeds: Sequence[float]) -> list[Span]:
    """Query heads for each rank: the cut whose slowest rank is fastest, among those that the model allows."""
    cuts = [head for head in range(spec.n_heads + 1) if spec.is_head_cut(head)]
    return cut_exactly(cuts, speeds, lambda start, stop: is_head_share(spec, start, stop))


def cut_columns(total: int, block: int, speeds: Sequence[float]) -> list[Span]:
    """Feed-forward columns for each rank, in whole blocks, and in multiples of `ROW_MULTIPLE` where there are enough of them."""
    step = block
    if block < ROW_MULTIPLE and total % ROW_MULTIPLE == 0 and total // ROW_MULTIPLE >= len(speeds):
        step = ROW_MULTIPLE * block // _common_divisor(ROW_MULTIPLE, block)
    return cut_evenly(total, step, speeds)


def cut_evenly(total: int, step: int, speeds: Sequence[float]) -> list[Span]:
    """``total`` in proportion to ``speeds``, each cut at the multiple of ``step`` nearest to the exact one."""
    whole = sum(speeds)
    spans, start, reached = [], 0, 0.0
    for index, speed in enumerate(speeds):
        reached += speed
        stop = total if index == len(speeds) - 1 else min(total, max(start, round(total * reached / whole / step) * step))
        spans.append(Span(start, stop))
        start = stop
    if len(spans) > 1 and speeds[-1] == 0 and spans[-1]:  # rounding must not give work to a rank that asked for none
        last = max(i for i, speed in enumerate(speeds) if speed > 0)
        spans[last] = Span(spans[last].start, total)
        spans[last + 1 :] = [Span(total, total)] * (len(spans) - last - 1)
    return spans


def cut_exactly(cuts: Sequence[int], speeds: Sequence[float], allowed: Callable[[int, int], bool]) -> list[Span]:
    """The cut whose slowest rank is fastest, by dynamic programming over ``cuts`` (the first and last among them); of equals, the one nearest to proportion.

    Raises
    ------
    PlacementError
        if no allowed cut exists.
    """
    whole, total = sum(speeds), cuts[-1]
    best: dict[int, tuple[tuple[float, float], list[Span]]] = {cuts[0]: ((0.0, 0.0), [])}
    for speed in speeds:
        ideal = total * speed / whole
        reached: dict[int, tuple[tuple[float, float], list[Span]]] = {}
        for start, ((slowest, distance), spans) in best.items():
            for stop in cuts:
                if stop < start or not allowed(start, stop) or (speed == 0 and stop > start):
                    continue
                time = (stop - start) / speed if speed else 0.0
                cost = (max(slowest, time), distance + (stop - start - ideal) ** 2)
                if stop not in reached or cost < reached[stop][0]:
                    reached[stop] = (cost, [*spans, Span(start, stop)])
        best = reached
    if total not in best:
        raise PlacementError(f"{total} heads cannot be cut among ranks of speeds {list(speeds)}")
    return best[total][1]


def _common_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a

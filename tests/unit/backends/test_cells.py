"""The cache's table of owners, held to a slow definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.backends.cells import CellTable
from yoke.core.errors import BackendError
from yoke.core.frame import Batch


def batch(slots: list[int], positions: list[int], cells: list[int], freed: tuple[int, ...] = ()) -> Batch:
    return Batch(tokens=(1,) * len(slots), slots=tuple(slots), positions=tuple(positions), cells=tuple(cells), freed_slots=freed)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    cells = draw(st.lists(st.integers(0, 11), unique=True, min_size=1, max_size=6))
    slots = [draw(st.integers(0, 3)) for _ in cells]
    return batch(slots, [draw(st.integers(0, 9)) for _ in cells], cells, tuple(draw(st.sets(st.integers(0, 3), max_size=2))))


@given(story=st.lists(batches(), min_size=1, max_size=6), window=st.none() | st.integers(1, 5))
def test_a_token_sees_the_cells_of_its_session_at_its_own_and_earlier_positions(story: list[Batch], window: int | None) -> None:
    table, owners = CellTable(12), {}
    for step in story:
        table.apply(step)
        owners = {cell: owner for cell, owner in owners.items() if owner[0] not in step.freed_slots}
        owners |= {cell: owner for cell, *owner in zip(step.cells, step.slots, step.positions, strict=True)}
    last = story[-1]
    seen = table.visible(last, 12, window)
    for row, (slot, position) in enumerate(zip(last.slots, last.positions, strict=True)):
        expected = {c for c, (s, p) in owners.items() if s == slot and p <= position and (window is None or p > position - window)}
        assert set(np.flatnonzero(seen[row])) == expected
    for multiple in (1, 5, 32):
        assert table.n_used(multiple) == min(12, -(-(max(owners) + 1) // multiple) * multiple)
        assert np.array_equal(table.visible(last, table.n_used(multiple), window), seen[:, : table.n_used(multiple)])


def test_freed_slot_may_be_used_again_in_the_same_step() -> None:
    table = CellTable(4)
    table.apply(batch([0, 0], [0, 1], [0, 1]))
    again = batch([0], [0], [2], (0,))
    table.apply(again)
    assert table.visible(again, 4, None).tolist() == [[False, False, True, False]]


def test_cell_beyond_the_cache_is_refused_before_anything_changes() -> None:
    table = CellTable(4)
    first = batch([0], [0], [0])
    table.apply(first)
    with pytest.raises(BackendError, match="cell 4, but this cache has 4"):
        table.apply(batch([1], [0], [4], (0,)))
    assert table.visible(first, 4, None).tolist() == [[True, False, False, False]]

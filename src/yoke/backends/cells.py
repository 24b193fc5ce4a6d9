"""Which session's token lies in which cell of the cache. The engine decides it and every shard repeats it from the frame, so no shard decides anything."""

import numpy as np
from numpy.typing import NDArray

from yoke.core.errors import BackendError
from yoke.core.frame import Batch

NOBODY = -1


class CellTable:
    """The owner (session slot) and position of each of ``n_cells`` cells.

    Raises
    ------
    BackendError
        from `apply`, if a batch names a cell that is not there.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self._slot: NDArray[np.int32] = np.full(n_cells, NOBODY, dtype=np.int32)
        self._position: NDArray[np.int32] = np.zeros(n_cells, dtype=np.int32)

    def clear(self) -> None:
        """Every cell is free."""
        self._slot.fill(NOBODY)

    def apply(self, batch: Batch) -> None:
        """Free the cells of the slots that the batch frees, then take those that it fills."""
        if max(batch.cells) >= self.n_cells:
            raise BackendError(f"the batch fills cell {max(batch.cells)}, but this cache has {self.n_cells}")
        for slot in batch.freed_slots:
            self._slot[self._slot == slot] = NOBODY
        cells = list(batch.cells)
        self._slot[cells] = batch.slots
        self._position[cells] = batch.positions

    def n_used(self, multiple: int) -> int:
        """Cells up to the last one in use, rounded up to ``multiple`` and at most all."""
        used = np.flatnonzero(self._slot != NOBODY)
        last = int(used[-1]) + 1 if used.size else 1
        return min(self.n_cells, -(-last // multiple) * multiple)

    def visible(self, batch: Batch, n_cells: int, window: int | None) -> NDArray[np.bool_]:
        """Which of the first ``n_cells`` cells each token of the batch attends to: [T, n_cells]."""
        slots = np.asarray(batch.slots, dtype=np.int32)[:, None]
        positions = np.asarray(batch.positions, dtype=np.int32)[:, None]
        seen: NDArray[np.bool_] = (self._slot[:n_cells] == slots) & (self._position[:n_cells] <= positions)
        if window is not None:
            seen &= self._position[:n_cells] > positions - window
        return seen

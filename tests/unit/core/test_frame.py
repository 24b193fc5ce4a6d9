"""A batch that names no row, cell or slot twice, or outside of what there is."""

from typing import Any

import pytest

from yoke.core.errors import InvariantError
from yoke.core.frame import MAX_BATCH_TOKENS, MAX_CELLS, MAX_SLOTS, Batch, Output
from yoke.core.request import Sampling

GOOD: dict[str, Any] = {"tokens": (5, 6), "slots": (0, 0), "positions": (0, 1), "cells": (8, 9)}


def test_good_batch_is_built() -> None:
    batch = Batch(**GOOD, outputs=(Output(row=1, sampling=Sampling()),), freed_slots=(MAX_SLOTS - 1,))
    assert batch.outputs[0].row == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "a batch of 0 tokens"),
        ({"tokens": (0,) * (MAX_BATCH_TOKENS + 1)}, f"a batch of {MAX_BATCH_TOKENS + 1} tokens"),
        ({"slots": (0,)}, "has 1 slots, 2 positions, 2 cells"),
        ({"positions": (0, 1, 2)}, "has 2 slots, 3 positions, 2 cells"),
        ({"cells": ()}, "has 2 slots, 2 positions, 0 cells"),
        ({"tokens": (5, -1)}, "negative"),
        ({"positions": (-1, 0)}, "negative"),
        ({"slots": (0, MAX_SLOTS)}, "slot is outside"),
        ({"slots": (-1, 0)}, "slot is outside"),
        ({"freed_slots": (MAX_SLOTS,)}, "slot is outside"),
        ({"freed_slots": (-1,)}, "slot is outside"),
        ({"cells": (8, 8)}, "distinct"),
        ({"cells": (8, MAX_CELLS)}, "within"),
        ({"cells": (-1, 8)}, "within"),
        ({"outputs": (Output(row=2, sampling=Sampling()),)}, "output row is outside"),
        ({"outputs": (Output(row=-1, sampling=Sampling()),)}, "output row is outside"),
    ],
)
def test_wrong_batches_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        Batch(**{**GOOD, **changes})

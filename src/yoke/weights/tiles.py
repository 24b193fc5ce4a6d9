"""How a model's weights are cut into tiles: the pieces that travel between nodes, are held against a hash, and lie in a store. Pure: numbers and names, no bytes.

A tile is a rectangle of one tensor. Where ranks are given rows, it is some rows; where they are given columns, a stripe of columns through all rows, so that
its file bytes are not contiguous, but its own are: row by row. The edges stand where a plan may cut (between heads, quantisation blocks, 32 rows), so that a
shard is made of whole tiles. The same tensors always give the same tiles, whose ids count over the whole model.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorInfo

LEAST_TILE_BYTES = 4 << 10
"""A hash, an index entry and a header take 48 bytes together: about 1 % of such a tile. Only models narrower than about 2000 have tiles below 32 KiB."""

MOST_TILE_BYTES = 512 << 10
"""No tile is larger: a source that sends a wrong one has wasted no more than this, and a receiver needs no more room."""

MAX_TILES = 1 << 22
"""A model of 600 GB in tiles of 147 KiB (Q4_0, width 8192)."""

MAX_TENSORS = 1 << 14
MAX_HEAD_DIM = 1 << 12

ROW_UNIT = 32
"""Where nothing else says so, plans cut in multiples of 32 rows or columns (`yoke.planner.shares.ROW_MULTIPLE`)."""

_CUT_BY_COLUMNS = frozenset({"attn_output.weight", "ffn_down.weight"})
_CUT_BY_HEADS = frozenset({"attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"})

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One tile: half-open ranges of rows (counted over all dims but the last) and columns of tensor ``name``."""

    id: int
    name: str
    rows: Range
    columns: Range
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The tiles of one tensor: bands of ``rows`` rows by stripes of ``columns`` columns, the last of each maybe smaller. ``first`` is the first tile's id."""

    info: TensorInfo
    first: int
    rows: int
    columns: int

    @property
    def n_rows(self) -> int:
        """Rows of the tensor: its dims but the last, multiplied."""
        return math.prod(self.info.shape[:-1])

    @property
    def n_bands(self) -> int:
        """Tiles along the rows."""
        return -(-self.n_rows // self.rows)

    @property
    def n_stripes(self) -> int:
        """Tiles along the columns."""
        return -(-self.info.shape[-1] // self.columns)

    @property
    def n_tiles(self) -> int:
        """All of them."""
        return self.n_bands * self.n_stripes

    def tile(self, tile_id: int) -> Tile:
        """The tile of this id, which must be one of this tensor's."""
        stripe, band = divmod(tile_id - self.first, self.n_bands)
        rows = (band * self.rows, min((band + 1) * self.rows, self.n_rows))
        columns = (stripe * self.columns, min((stripe + 1) * self.columns, self.info.shape[-1]))
        n_bytes = (rows[1] - rows[0]) * self.info.type.row_bytes(columns[1] - columns[0])
        return Tile(id=tile_id, name=self.info.name, rows=rows, columns=columns, n_bytes=n_bytes)

    def sizes(self) -> list[int]:
        """The bytes of every tile, in the order of ids: much faster than asking for each."""
        kind, width, n_bands = self.info.type, self.info.shape[-1], self.n_bands
        last_rows = self.n_rows - (n_bands - 1) * self.rows
        last_columns = width - (self.n_stripes - 1) * self.columns
        stripes = [kind.row_bytes(self.columns)] * (self.n_stripes - 1) + [kind.row_bytes(last_columns)]
        return [rows * row_bytes for row_bytes in stripes for rows in [self.rows] * (n_bands - 1) + [last_rows]]

    def area(self, rows: Range | None, columns: Range | None) -> tuple[Range, Range]:
        """A cut's ranges as ranges of the tensor's rows (over all dims but the last) and columns.

        Parameters
        ----------
        rows : half-open range along the first dim; None is all of it.
        columns : half-open range along the last dim; None is all of it. A tensor of one dim takes either, which mean the same.

        Raises
        ------
        ModelError
            if a range is empty, out of bounds, or cuts a quantisation block.
        """
        info = self.info
        if len(info.shape) == 1:
            if rows is not None and columns is not None:
                raise ModelError(f"tensor {info.name!r} has one dim; give rows or columns, not both")
            rows, columns = None, rows or columns
        n_first = info.shape[0] if len(info.shape) > 1 else 1
        start, stop = rows or (0, n_first)
        left, right = columns or (0, info.shape[-1])
        if not (0 <= start < stop <= n_first and 0 <= left < right <= info.shape[-1]):
            raise ModelError(f"rows {start}..{stop} and columns {left}..{right} of tensor {info.name!r} are wanted; it has the shape {info.shape}")
        if left % info.type.block or right % info.type.block:
            raise ModelError(f"columns {left}..{right} of tensor {info.name!r} cut a {info.type.name} block; expected multiples of {info.type.block}")
        depth = self.n_rows // n_first
        return (start * depth, stop * depth), (left, right)

    def cover(self, rows: Range | None, columns: Range | None) -> list[int]:
        """The ids of the tiles that hold a cut, ascending; see :meth:`area`."""
        (start, stop), (left, right) = self.area(rows, columns)
        bands = range(start // self.rows, (stop - 1) // self.rows + 1)
        stripes = range(left // self.columns, (right - 1) // self.columns + 1)
        return [self.first + stripe * self.n_bands + band for stripe in stripes for band in bands]


class Layout:
    """The tiles of a whole model, in the order of its tensors.

    Parameters
    ----------
    tensors : of the file, in its order.
    head_dim : elements of one attention head: plans cut attention between heads.

    Raises
    ------
    ModelError
        if a name is there twice, the tensors make more than `MAX_TILES` tiles, or ``head_dim`` is no head's.
    """

    def __init__(self, tensors: Iterable[TensorInfo], head_dim: int) -> None:
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ModelError(f"attention heads of {head_dim} elements; expected 1 to {MAX_HEAD_DIM}")
        grids: dict[str, Grid] = {}
        first = n_bytes = 0
        for info in tensors:
            if info.name in grids:
                raise ModelError(f"tensor {info.name!r} is listed twice; expected every name once")
            grid = _grid(info, head_dim, first)
            grids[info.name] = grid
            first += grid.n_tiles
            n_bytes += info.n_bytes
            if first > MAX_TILES or len(grids) > MAX_TENSORS:
                raise ModelError(f"a model of more than {MAX_TILES} tiles or {MAX_TENSORS} tensors; Yoke cannot hand out one so large")
        self.grids: Mapping[str, Grid] = grids
        self.n_tiles = first
        self.n_bytes = n_bytes
        self._rows = list(grids.values())
        self._firsts = [grid.first for grid in self._rows]

    def grid(self, name: str) -> Grid:
        """The tiles of one tensor.

        Raises
        ------
        ModelError
            if there is no such tensor.
        """
        grid = self.grids.get(name)
        if grid is None:
            raise ModelError(f"there is no tensor {name!r} in this model; is it of another architecture?")
        return grid

    def grid_of(self, tile_id: int) -> Grid:
        """The tiles of the tensor that a tile belongs to.

        Raises
        ------
        ModelError
            if there is no such tile.
        """
        if not 0 <= tile_id < self.n_tiles:
            raise ModelError(f"there is no tile {tile_id}; this model has {self.n_tiles}")
        return self._rows[bisect_right(self._firsts, tile_id) - 1]

    def tile(self, tile_id: int) -> Tile:
        """One tile.

        Raises
        ------
        ModelError
            if there is no such tile.
        """
        return self.grid_of(tile_id).tile(tile_id)


def _grid(info: TensorInfo, head_dim: int, first: int) -> Grid:
    kind = ".".join(info.name.split(".")[-2:])
    unit = head_dim if kind in _CUT_BY_HEADS else ROW_UNIT
    n_rows, width, block = math.prod(info.shape[:-1]), info.shape[-1], info.type.block
    is_by_columns = kind in _CUT_BY_COLUMNS and len(info.shape) > 1
    columns = math.lcm(unit, block) if is_by_columns else width
    if is_by_columns:
        columns *= _times(n_rows * info.type.row_bytes(columns))
    columns = min(columns, width, MOST_TILE_BYTES // info.type.block_bytes * block)
    row_bytes = info.type.row_bytes(columns)
    most_rows = MOST_TILE_BYTES // row_bytes
    if is_by_columns:  # nobody cuts its rows: bands as even as can be
        rows = -(-n_rows // -(-n_rows // most_rows))
    else:
        rows = unit * _times(unit * row_bytes)
        if rows > most_rows:  # a part of the unit, so that edges stay where plans cut
            rows = max(part for part in range(1, most_rows + 1) if rows % part == 0)
    return Grid(info=info, first=first, rows=min(rows, n_rows), columns=columns)


def _times(n_bytes: int) -> int:
    """How many units together make a tile that is worth its overhead."""
    return max(1, -(-LEAST_TILE_BYTES // n_bytes))

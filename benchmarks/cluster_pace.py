"""Makes a chip slower, from inside the worker's process: after each graph it sleeps until a chip that reads weights at the wanted rate would have been done.

Why not leave it to the system: a quota of processor time is kept only as finely as the system's clock ticks, and gives back as computing what a node has waited
for others, which no slow chip does (`cluster_quota`); and what a processor does in its time depends on what others do with the same memory: on a shared machine,
the same node is a sixth faster or slower from minute to minute. A chip with a pace has the same speed in each round, as long as this machine keeps up with it.

What is slowed is products with weights, which are 95 % of a step. Sockets, encryption and Python run at full speed.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yoke.backends.ggml.library import Library

VARIABLE = "CLUSTERS_BYTES_PER_S"
ROW_COST = 0.45
"""What each further row of a product costs, against the first: a core reads prompts at 68 tokens/s where it writes 29 (docs/benchmarks.md)."""

MAX_LATE_S = 1e-3
"""How much oversleeping is made good at the next graph."""

AWAKE_S = 2e-5
"""The end of a graph is awaited without sleeping: a processor that has slept is slow to wake, and one that has computed is awake."""

_PR_SET_TIMERSLACK = 29
_ROWS_OFFSET = 24  # of ne[1] in `struct ggml_tensor` (ggml.h)


def environment(bytes_per_s: float, directory: Path) -> Mapping[str, str]:
    """What a node's process needs so that its worker reads so many bytes of weights a second. ``directory`` takes the file that says so."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "sitecustomize.py").write_text("import cluster_pace\n\ncluster_pace.begin()\n")  # Python imports a module of this name at its start
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([str(directory), here, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return {VARIABLE: repr(bytes_per_s), "PYTHONPATH": path}


def begin() -> None:
    """Slow this process down, if it is a worker that shall be slow."""
    if VARIABLE in os.environ and "yoke.node.worker" in sys.orig_argv:
        from yoke.backends.ggml import library

        bytes_per_s = float(os.environ[VARIABLE])
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # else sleep may last 50 us longer
        load = library.Library.__init__

        def slowed(self: library.Library, directory: Path) -> None:
            load(self, directory)
            Pace(self, bytes_per_s)

        library.Library.__init__ = slowed  # type: ignore[method-assign]


class Pace:
    """Takes the place of three functions of ``library``, so that graphs take as long as their weights need at ``bytes_per_s``."""

    def __init__(self, library: "Library", bytes_per_s: float) -> None:
        self._library, self._bytes_per_s = library, bytes_per_s
        self._mul_mat, self._free, self._compute = library.mul_mat, library.free, library.backend_graph_compute
        self._products: dict[int, dict[int, float]] = {}  # seconds of each product, by its context and its node
        self._graphs: dict[int, float] = {}  # and of each graph
        self._late_s = 0.0
        new: dict[str, Callable[..., Any]] = {"mul_mat": self.mul_mat, "free": self.free, "backend_graph_compute": self.backend_graph_compute}
        for name, function in new.items():
            setattr(library, name, function)

    def mul_mat(self, context: int, weights: int, x: int) -> int:
        """Record a product, and how long it takes."""
        node = int(self._mul_mat(context, weights, x))
        rows = ctypes.c_int64.from_address(node + _ROWS_OFFSET).value
        seconds = self._library.nbytes(weights) / self._bytes_per_s * (1 + ROW_COST * (rows - 1))
        self._products.setdefault(context, {})[node] = seconds
        return node

    def free(self, context: int) -> None:
        """Free what was recorded: its addresses may come again."""
        self._products.pop(context, None)
        self._graphs.clear()
        self._free(context)

    def backend_graph_compute(self, backend: int, graph: int) -> int:
        """Compute, and return when the slower chip would have."""
        begun = time.perf_counter()
        status = int(self._compute(backend, graph))
        end = begun + self._seconds(graph) - self._late_s
        left_s = end - time.perf_counter() - AWAKE_S
        if left_s > 0:
            time.sleep(left_s)
        while time.perf_counter() < end:
            pass
        self._late_s = min(MAX_LATE_S, max(0.0, time.perf_counter() - end))
        return status

    def _seconds(self, graph: int) -> float:
        if graph not in self._graphs:
            nodes = [self._library.graph_node(graph, index) for index in range(self._library.graph_n_nodes(graph))]
            self._graphs[graph] = sum(products.get(node, 0.0) for products in self._products.values() for node in nodes)
        return self._graphs[graph]

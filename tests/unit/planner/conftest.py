"""Models, machines and links of round sizes, for all tests of the planner."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from yoke.core.node import Device, Link, Node, NodeId, Rate
from yoke.core.spec import ModelSpec, Rope, RopeStyle

MB = 1_000_000


def spec_of(**changes: Any) -> ModelSpec:
    """About a model of 8 billion weights in 4 bits."""
    n_blocks = changes.get("n_blocks", 32)
    sizes = {"attention_bytes": (24 * MB,) * n_blocks, "feed_forward_bytes": (100 * MB,) * n_blocks}
    return ModelSpec(**{
        "name": "m", "architecture": "llama", "n_blocks": 32, "width": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "columns": 14336,
        "vocabulary": 128256, "context": 8192, "norm_epsilon": 1e-5, "rope": Rope(style=RopeStyle.HALVES, dims=changes.get("head_dim", 128)), "head_block": 32,
        "column_block": 32, "embedding_bytes": 300 * MB, "head_bytes": 300 * MB, **sizes, **changes,
    })  # fmt: skip


def node_of(number: int, speed: float = 20e9, free_bytes: int = 100_000 * MB, rates: tuple[Rate, ...] = (), threads: int = 1) -> Node:
    """A node of its own number, with plenty of memory unless told otherwise."""
    device = Device(name="CPU", description="", backend="ggml", free_bytes=free_bytes, matvec_bytes_per_s=speed, rates=rates, threads=threads)
    return Node(id=NodeId(f"{number:064x}"), name=f"node-{number}", device=device, measured_at=0.0)


def links_of(nodes: Sequence[Node], rtt_s: float, rate: float = 110e6, vary: Callable[[], float] = lambda: 1.0) -> list[Link]:
    """Every node with every other one; ``vary`` is a factor for each number."""
    pairs = [(a.id, b.id) for a in nodes for b in nodes if a is not b]
    return [Link(source=a, target=b, rtt_s=rtt_s * vary(), bandwidth_bytes_per_s=rate * vary()) for a, b in pairs]


@pytest.fixture(scope="session")
def world() -> SimpleNamespace:
    """The makers above, for tests that cannot import them."""
    return SimpleNamespace(spec_of=spec_of, node_of=node_of, links_of=links_of)

"""Who is there, what it offers, and what lies between: dated measurements, never a connection."""

from dataclasses import dataclass
from typing import NewType

from yoke.core.errors import UserError

NodeId = NewType("NodeId", str)
"""A node's ed25519 public key in lower-case hexadecimal: 64 characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast a device multiplies with weights of one stored type (``Q4_0``, ``F16``, ... as in GGUF), with so many threads in all.

    ``matvec_bytes_per_s`` is weights streamed through a matrix-vector product: decoding; ``matmul_flop_per_s`` is operations of a product with many rows: prompts.
    """

    weight_type: str
    threads: int
    matvec_bytes_per_s: float
    matmul_flop_per_s: float

    def __post_init__(self) -> None:
        if self.threads < 1 or not (self.matvec_bytes_per_s > 0 and self.matmul_flop_per_s > 0):
            raise UserError(
                f"rate of {self.weight_type}: {self.threads} threads, {self.matvec_bytes_per_s} B/s, {self.matmul_flop_per_s} op/s; expected positive numbers"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One chip of a node, under the name that its backend gives it (``CPU``, ``CUDA0``, ...).

    ``matvec_bytes_per_s`` is the measured rate at which weights stream through a matrix-vector product, all threads together; ``rates`` say more, for each type
    of weights that was measured with ``threads`` threads.
    """

    name: str
    description: str
    backend: str
    free_bytes: int
    matvec_bytes_per_s: float
    threads: int = 1
    rates: tuple[Rate, ...] = ()

    def __post_init__(self) -> None:
        if self.free_bytes < 0 or not self.matvec_bytes_per_s > 0 or self.threads < 1:
            raise UserError(
                f"device {self.name}: free memory {self.free_bytes} B, speed {self.matvec_bytes_per_s} B/s and {self.threads} threads; "
                "expected at least 0 B, a positive speed and at least one thread"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine in the cluster. ``measured_at`` is seconds since the epoch; ``notes`` are what a planner's reader should know: on battery, a virtual machine."""

    id: NodeId
    name: str
    device: Device
    measured_at: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.id) != 64 or any(c not in "0123456789abcdef" for c in self.id):
            raise UserError(f"node {self.name!r} has id {self.id!r}; expected 64 hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A measured, directed connection between two nodes: round trip in seconds, bandwidth in bytes per second."""

    source: NodeId
    target: NodeId
    rtt_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.rtt_s >= 0 and self.bandwidth_bytes_per_s > 0):
            raise UserError(f"link {self.source[:8]} to {self.target[:8]}: round trip {self.rtt_s} s, bandwidth {self.bandwidth_bytes_per_s} B/s")

"""A cluster in a file: machines that one has or thinks of buying, what lies between them, and a plan by hand. The format is described in docs/planner.md.

The file comes from outside: its size, names and numbers are bounded, every entry that is not known is refused, and each error names the line.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from yoke.core.errors import PlacementError, SettingError, UserError
from yoke.core.node import Device, Link, Node, NodeId, Rate
from yoke.node.entries import Entry, read_entries
from yoke.node.quantities import BITS_PER_S, BYTES, BYTES_PER_S, FLOP_PER_S, SECONDS, THREADS, Quantity, fits, read_quantity, write_bytes, write_quantity
from yoke.planner import COSTS, CostModel, StageWish

MAX_NODES = 1024
MAX_NAME = 64
MAX_BLOCKS = 1 << 16

ANY = "any"
"""In the file, weights of any type; a `Rate` for them has the type ``""``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """What a file says. The first of ``nodes`` is the coordinator. Pairs that ``links`` does not have are as in ``costs``."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    layout: tuple[StageWish, ...] | None = None
    addresses: Mapping[NodeId, str] = field(default_factory=dict)
    costs: CostModel = COSTS

    @property
    def planned(self) -> tuple[str, ...]:
        """The names of the machines that the plan by hand needs, the coordinator first; that one alone without a plan."""
        needed = {node for stage in self.layout or () for node in stage.nodes}
        return (self.nodes[0].name, *(node.name for node in self.nodes[1:] if node.id in needed))

    def are_there(self, nodes: Sequence[Node]) -> bool:
        """Whether all machines that the plan by hand needs are among ``nodes``, the coordinator first.

        Raises
        ------
        SettingError
            if the machine that the file lists first is another one than the coordinator.
        """
        try:
            self.layout_over(nodes)
        except PlacementError:
            return False
        return True

    def layout_over(self, nodes: Sequence[Node]) -> tuple[StageWish, ...] | None:
        """The plan by hand for real machines, the coordinator first. Each is the one with the id, or else the name, that the file gives.

        Raises
        ------
        PlacementError
            if one is not there.
        SettingError
            if the machine that the file lists first is another one than the coordinator.
        """
        if self.layout is None:
            return None
        there = {node.name: node.id for node in nodes}
        if there.get(self.nodes[0].name, nodes[0].id) != nodes[0].id or self.nodes[0].id in {node.id for node in nodes[1:]}:
            raise SettingError(f"the file's first machine is {self.nodes[0].name}, which has joined {nodes[0].name}; list the machine that serves first")
        real = {listed.id: listed.id if listed.id in there.values() else there.get(listed.name) for listed in self.nodes} | {self.nodes[0].id: nodes[0].id}
        names = {listed.id: listed.name for listed in self.nodes}
        stages = []
        for stage in self.layout:
            found = tuple(node for node in map(real.get, stage.nodes) if node is not None)
            if len(found) < len(stage.nodes):
                missing = next(names[node] for node in stage.nodes if real.get(node) is None)
                raise PlacementError(f"the plan by hand needs {missing}, which is not there; there are {', '.join(there)}")
            stages.append(replace(stage, nodes=found))
        return tuple(stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineWords:
    """What is said of a machine before it is a node: bytes, and speeds by type of weights (`ANY` for all)."""

    name: str
    memory_bytes: int
    bytes_per_s: Mapping[str, float]
    flop_per_s: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    id: NodeId | None = None
    device: str = "CPU"
    measured_at: float = 0.0
    notes: tuple[str, ...] = ()

    def node(self) -> Node:
        """The node. Operations a second that were not said are taken to be in proportion to speed."""
        headline = self.bytes_per_s.get(ANY) or next(iter(self.bytes_per_s.values()))
        types = dict.fromkeys([*self.bytes_per_s, *self.flop_per_s])
        if not self.flop_per_s:
            types.pop(ANY, None)  # the headline says it all
        rates = []
        for name in types:
            speed = self.bytes_per_s.get(name, headline)
            flop = self.flop_per_s.get(name) or self.flop_per_s.get(ANY) or speed * COSTS.unmeasured_flop_per_byte
            rates.append(Rate(weight_type="" if name == ANY else name, threads=self.threads, matvec_bytes_per_s=speed, matmul_flop_per_s=flop))
        device = Device(
            name=self.device,
            description="",
            backend="ggml",
            free_bytes=self.memory_bytes,
            matvec_bytes_per_s=headline,
            threads=self.threads,
            rates=tuple(rates),
        )
        return Node(id=self.id or named_id(self.name), name=self.name, device=device, measured_at=self.measured_at, notes=self.notes)


def named_id(name: str) -> NodeId:
    """The id of a node that has only a name: always the same for the same name."""
    return NodeId(hashlib.sha256(b"yoke node by name: " + name.encode()).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMachine:
    """A machine that is thought of: the node, and its link to all others if that was said, else None."""

    node: Node
    rtt_s: float | None = None
    bandwidth_bytes_per_s: float | None = None

    def links(self, others: Sequence[Node], costs: CostModel = COSTS) -> tuple[Link, ...]:
        """Its links with each of ``others``, both ways; what was not said is as in ``costs``, and none if nothing was said."""
        if self.rtt_s is None and self.bandwidth_bytes_per_s is None:
            return ()
        rtt_s = costs.unmeasured_rtt_s if self.rtt_s is None else self.rtt_s
        rate = self.bandwidth_bytes_per_s or costs.unmeasured_bytes_per_s
        pairs = [pair for other in others for pair in ((self.node.id, other.id), (other.id, self.node.id))]
        return tuple(Link(source=a, target=b, rtt_s=rtt_s, bandwidth_bytes_per_s=rate) for a, b in pairs)


_SHORT: Mapping[str, Quantity] = {"memory": BYTES, "bandwidth": BITS_PER_S, "speed": BYTES_PER_S, "rtt": SECONDS, "flops": FLOP_PER_S, "threads": THREADS}
"""What a machine in short may say, told apart by the units."""


def read_machine(text: str) -> NewMachine:
    """A machine in short: ``NAME: MEMORY, SPEED``, and if wanted a round trip, a bandwidth (in bits a second), operations a second, and threads.

    Raises
    ------
    SettingError
        saying what was found and expected.
    """
    name, _, rest = text.partition(next((mark for mark in text if mark in ":="), ":"))
    shown = f"found {text[:80]!r}; expected NAME: MEMORY, SPEED, such as 'desktop: 16 GB, 40 GB/s', then if wanted 0.3 ms, 1 Gbit/s, 500 GFLOP/s, 8 threads"
    found: dict[str, float] = {}
    for part in rest.split(","):
        kind = next((kind for kind, quantity in _SHORT.items() if fits(part, quantity)), None)
        if kind is None or kind in found:
            raise SettingError(f"{part.strip()[:40]!r} is {'no amount with a unit' if kind is None else 'one too many'}: {shown}")
        found[kind] = read_quantity(part, _SHORT[kind])
    if not {"memory", "speed"} <= found.keys() or not _is_name(name.strip()):
        raise SettingError(shown)
    words = MachineWords(
        name=name.strip(),
        memory_bytes=round(found["memory"]),
        bytes_per_s={ANY: found["speed"]},
        flop_per_s={ANY: found["flops"]} if "flops" in found else {},
        threads=round(found.get("threads", 1)),
    )
    return NewMachine(node=words.node(), rtt_s=found.get("rtt"), bandwidth_bytes_per_s=found.get("bandwidth"))


def read_cluster(path: Path) -> ClusterFile:
    """A cluster from its file.

    Raises
    ------
    SettingError
        if the file cannot be read, or an entry is wrong: with file, line and entry.
    """
    root = read_entries(path).entries(("nodes", "links", "plan"), ("nodes",))
    listed = root["nodes"].items()
    if not 1 <= len(listed) <= MAX_NODES:
        root["nodes"].refuse(f"found {len(listed)} nodes; expected 1 to {MAX_NODES}")
    ids: dict[str, NodeId] = {}
    nodes, addresses = [], {}
    for entry in listed:
        node, address = _read_node(entry)
        if node.name in ids or node.id in ids.values():
            entry.refuse(f"there is a node named {node.name} or with its id already; expected each once")
        ids[node.name] = node.id
        nodes.append(node)
        if address is not None:
            addresses[node.id] = address
    links, costs = _read_links(root["links"], ids) if "links" in root else ((), COSTS)
    layout = _read_plan(root["plan"], ids) if "plan" in root else None
    return ClusterFile(nodes=tuple(nodes), links=links, layout=layout, addresses=addresses, costs=costs)


def write_cluster(path: Path, nodes: Sequence[Node], links: Sequence[Link] = (), addresses: Mapping[NodeId, str] | None = None) -> None:
    """Write a file that `read_cluster` reads: sizes exactly, speeds and times to six digits. It appears only when it is whole.

    Raises
    ------
    SettingError
        if it cannot be written.
    """
    text = cluster_text(nodes, links, addresses or {})
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise SettingError(f"{path} cannot be written: {error}") from error


def cluster_text(nodes: Sequence[Node], links: Sequence[Link], addresses: Mapping[NodeId, str]) -> str:
    """The text of a cluster's file. Nodes of the same name get numbers."""
    names: dict[NodeId, str] = {}
    for node in nodes:
        taken = sum(other.name == node.name for other in nodes[: len(names)])
        names[node.id] = f"{node.name}-{taken + 1}" if taken else node.name
    lines = ["# The first node is the coordinator. The format is described in docs/planner.md.", "nodes:"]
    for node in nodes:
        lines += [f"  - name: {_quoted(names[node.id])}", f"    id: '{node.id}'"]
        lines += [f"    address: {_quoted(addresses[node.id])}"] if node.id in addresses else []
        lines += [f"    {line}" for line in _device_lines(node)]
    if links:
        lines += ["links:", "  between:"]
    for link in links:
        rtt, rate = write_quantity(link.rtt_s, 1e-3, "ms"), write_quantity(link.bandwidth_bytes_per_s, 1.25e5, "Mbit/s")
        lines.append(f"    - {{from: {_quoted(names[link.source])}, to: {_quoted(names[link.target])}, rtt: {rtt}, bandwidth: {rate}}}")
    return "\n".join(lines) + "\n"


def _device_lines(node: Node) -> list[str]:
    device = node.device
    rates = [rate for rate in device.rates if rate.threads == device.threads]
    speeds = {ANY: device.matvec_bytes_per_s, **{rate.weight_type or ANY: rate.matvec_bytes_per_s for rate in rates}}
    flops = {rate.weight_type or ANY: rate.matmul_flop_per_s for rate in rates}
    lines = [f"memory: {write_bytes(device.free_bytes)}", f"threads: {device.threads}", f"device: {_quoted(device.name)}"]
    lines.append("speed: {" + ", ".join(f"{name}: {write_quantity(speed, 1e9, 'GB/s')}" for name, speed in speeds.items()) + "}")
    lines += ["flops: {" + ", ".join(f"{name}: {write_quantity(flop, 1e9, 'GFLOP/s')}" for name, flop in flops.items()) + "}"] if flops else []
    lines += [f"measured_at: {node.measured_at:.0f}"] if node.measured_at else []
    return lines + (["notes:", *(f"  - {_quoted(note)}" for note in node.notes)] if node.notes else [])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _read_node(entry: Entry) -> tuple[Node, str | None]:
    known = ("name", "id", "address", "memory", "speed", "flops", "threads", "device", "measured_at", "notes")
    found = entry.entries(known, ("name", "memory", "speed"))
    words = MachineWords(
        name=_checked_name(found["name"]),
        memory_bytes=round(_quantity(found["memory"], BYTES)),
        bytes_per_s=_by_type(found["speed"], BYTES_PER_S),
        flop_per_s=_by_type(found["flops"], FLOP_PER_S) if "flops" in found else {},
        threads=_whole(found["threads"], round(THREADS.most)) if "threads" in found else 1,
        id=NodeId(found["id"].text) if "id" in found else None,
        device=found["device"].text if "device" in found else "CPU",
        measured_at=_whole(found["measured_at"], 1 << 40) if "measured_at" in found else 0.0,
        notes=tuple(note.text for note in found["notes"].items()) if "notes" in found else (),
    )
    try:
        return words.node(), found["address"].text if "address" in found else None
    except UserError as error:
        entry.refuse(str(error))


def _by_type(entry: Entry, quantity: Quantity) -> dict[str, float]:
    """One value for all types of weights, or one for each."""
    if not entry.is_map:
        return {ANY: _quantity(entry, quantity)}
    found = {name: _quantity(value, quantity) for name, value in entry.entries().items()}
    if not found:
        entry.refuse(f"expected {quantity.name} such as {quantity.example}, or one for each type of weights")
    return found


def _read_links(entry: Entry, ids: Mapping[str, NodeId]) -> tuple[tuple[Link, ...], CostModel]:
    root = entry.entries(("default", "between"))
    costs = COSTS
    if "default" in root:
        found = root["default"].entries(("rtt", "bandwidth"), ("rtt", "bandwidth"))
        rtt_s, rate = _quantity(found["rtt"], SECONDS), _quantity(found["bandwidth"], BYTES_PER_S)
        costs = replace(COSTS, unmeasured_rtt_s=rtt_s, unmeasured_bytes_per_s=rate)
    links: dict[tuple[NodeId, NodeId], Link] = {}
    for each in root["between"].items() if "between" in root else ():
        found = each.entries(("nodes", "from", "to", "rtt", "bandwidth"), ("rtt", "bandwidth"))
        rtt_s, rate = _quantity(found["rtt"], SECONDS), _quantity(found["bandwidth"], BYTES_PER_S)
        for pair in _pairs(each, found, ids):
            if pair in links:
                each.refuse("these two nodes have a link in this direction already; expected one")
            links[pair] = Link(source=pair[0], target=pair[1], rtt_s=rtt_s, bandwidth_bytes_per_s=rate)
    return tuple(links.values()), costs


def _pairs(entry: Entry, found: Mapping[str, Entry], ids: Mapping[str, NodeId]) -> list[tuple[NodeId, NodeId]]:
    """Both directions between two ``nodes``, or the one that ``from`` and ``to`` say."""
    is_both = "nodes" in found
    if is_both == ("from" in found or "to" in found) or (not is_both and not {"from", "to"} <= found.keys()):
        entry.refuse("expected either nodes: [A, B] for both directions, or from: A and to: B for one")
    ends = [_known(end, ids) for end in (found["nodes"].items() if is_both else (found["from"], found["to"]))]
    if len(ends) != 2 or ends[0] == ends[1]:
        entry.refuse("expected two different nodes")
    return [(ends[0], ends[1]), (ends[1], ends[0])] if is_both else [(ends[0], ends[1])]


def _read_plan(entry: Entry, ids: Mapping[str, NodeId]) -> tuple[StageWish, ...]:
    stages = []
    for each in entry.entries(("stages",), ("stages",))["stages"].items():
        found = each.entries(("nodes", "shares", "blocks"), ("nodes",)) if each.is_map else {"nodes": each}
        shares = tuple(_number(share) for share in found["shares"].items()) if "shares" in found else None
        try:
            stage = StageWish(
                nodes=tuple(_known(node, ids) for node in found["nodes"].items()),
                shares=shares,
                blocks=_whole(found["blocks"], MAX_BLOCKS) if "blocks" in found else None,
            )
        except UserError as error:
            if isinstance(error, SettingError):  # it names its line already
                raise
            each.refuse(str(error))
        stages.append(stage)
    if not stages:
        entry.refuse("expected at least one stage")
    return tuple(stages)


def _checked_name(entry: Entry) -> str:
    name = entry.text.strip()
    if not _is_name(name):
        entry.refuse(f"expected a name of at most {MAX_NAME} letters on one line")
    return name


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and text.isprintable()


def _known(entry: Entry, ids: Mapping[str, NodeId]) -> NodeId:
    if entry.text not in ids:
        entry.refuse(f"there is no node of this name; there are {', '.join(ids)}")
    return ids[entry.text]


def _quantity(entry: Entry, quantity: Quantity) -> float:
    text = entry.text
    try:
        return read_quantity(text, quantity)
    except SettingError:
        entry.refuse(quantity.expected)


def _whole(entry: Entry, most: int) -> int:
    text = entry.text
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
        entry.refuse(f"expected a whole number from 1 to {most}")
    return int(text)


def _number(entry: Entry) -> float:
    try:
        return float(entry.text)
    except ValueError:
        entry.refuse("expected a number")

"""A cluster's file is read strictly, with the line in every error, and what is written is read back."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yoke.core.errors import PlacementError, SettingError
from yoke.core.node import Device, Link, Node, NodeId, Rate
from yoke.node.clusterfile import MAX_NODES, cluster_text, named_id, read_cluster, read_machine, write_cluster
from yoke.node.entries import MAX_DEPTH, MAX_FILE_BYTES
from yoke.node.quantities import BITS_PER_S, BYTES, BYTES_PER_S, FLOP_PER_S, SECONDS, Quantity, read_quantity, write_bytes, write_quantity
from yoke.planner import COSTS

WHOLE = """\
# machines at home
nodes:
  - name: laptop
    memory: 8 GB
    speed: 25 GB/s
    threads: 8
  - name: desktop
    id: {id}
    address: 192.168.1.20
    memory: 16 GiB
    speed: {{Q4_0: 40 GB/s, F16: 45 GB/s}}
    flops: {{Q4_0: 400 GFLOP/s}}
    device: CUDA0
    notes: [on battery]
  - {{name: attic, memory: 500 MB, speed: {{any: 9 GB/s, Q4_0: 8 GB/s}}, flops: 90 GFLOP/s}}
links:
  default: {{rtt: 0.5 ms, bandwidth: 2.5 Gbit/s}}
  between:
    - {{nodes: [laptop, attic], rtt: 3 ms, bandwidth: 50 Mbit/s}}
    - {{from: laptop, to: desktop, rtt: 300 us, bandwidth: 100 MB/s}}
plan:
  stages:
    - {{nodes: [laptop, desktop], shares: [1, 3], blocks: 20}}
    - [attic]
""".format(id="ab" * 32)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def test_everything_that_a_file_may_say_is_read(file: Path) -> None:
    cluster = read_cluster(written(file, WHOLE))
    laptop, desktop, attic = cluster.nodes
    assert [node.name for node in cluster.nodes] == ["laptop", "desktop", "attic"]
    assert (laptop.id, desktop.id) == (named_id("laptop"), "ab" * 32)
    assert (laptop.device.free_bytes, laptop.device.matvec_bytes_per_s, laptop.device.threads, laptop.device.rates) == (8 * 10**9, 25e9, 8, ())
    assert (desktop.device.free_bytes, desktop.device.name, desktop.notes) == (16 * 2**30, "CUDA0", ("on battery",))
    assert {rate.weight_type: (rate.matvec_bytes_per_s, rate.matmul_flop_per_s) for rate in desktop.device.rates} == {
        "Q4_0": (40e9, 400e9),
        "F16": (45e9, 45e9 * COSTS.unmeasured_flop_per_byte),
    }
    assert {rate.weight_type: (rate.matvec_bytes_per_s, rate.matmul_flop_per_s) for rate in attic.device.rates} == {"": (9e9, 90e9), "Q4_0": (8e9, 90e9)}
    assert attic.device.matvec_bytes_per_s == 9e9
    assert cluster.addresses == {desktop.id: "192.168.1.20"}
    assert (cluster.costs.unmeasured_rtt_s, cluster.costs.unmeasured_bytes_per_s) == (pytest.approx(5e-4), pytest.approx(312.5e6))
    links = {(link.source, link.target): (link.rtt_s, link.bandwidth_bytes_per_s) for link in cluster.links}
    assert links == {
        (laptop.id, attic.id): (pytest.approx(3e-3), pytest.approx(6.25e6)),
        (attic.id, laptop.id): (pytest.approx(3e-3), pytest.approx(6.25e6)),
        (laptop.id, desktop.id): (pytest.approx(3e-4), 100e6),
    }
    assert cluster.layout is not None
    assert [(stage.nodes, stage.shares, stage.blocks) for stage in cluster.layout] == [
        ((laptop.id, desktop.id), (1.0, 3.0), 20),
        ((attic.id,), None, None),
    ]


def test_plan_by_hand_is_for_machines_by_id_or_name(file: Path) -> None:
    cluster = read_cluster(written(file, WHOLE))
    _, desktop, attic = cluster.nodes
    own, other = replace(desktop, id=NodeId("1" * 64), name="whatever"), replace(attic, id=NodeId("2" * 64))
    renamed = replace(desktop, name="renamed")
    layout = cluster.layout_over([own, renamed, other])
    assert layout is not None
    assert [stage.nodes for stage in layout] == [(own.id, desktop.id), (other.id,)]
    assert (layout[0].shares, layout[0].blocks) == ((1, 3), 20)
    assert cluster.planned == ("laptop", "desktop", "attic")
    assert cluster.are_there([own, renamed, other])
    assert not cluster.are_there([own, renamed])
    with pytest.raises(SettingError, match="list the machine that serves first"):
        cluster.are_there([own, renamed, replace(other, name="laptop")])
    with pytest.raises(PlacementError, match="needs attic, which is not there; there are whatever, renamed"):
        cluster.layout_over([own, renamed])
    free = read_cluster(written(file, "nodes: [{name: a, memory: 1 GB, speed: 1 GB/s}]"))
    assert (free.layout_over([own]), free.planned) == (None, ("a",))


def test_example_in_the_manual_is_a_file(file: Path) -> None:
    manual = Path(__file__).resolve().parents[3] / "docs" / "planner.md"
    example = manual.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    cluster = read_cluster(written(file, example))
    assert [node.name for node in cluster.nodes] == ["laptop", "desktop", "attic"]
    assert (len(cluster.links), len(cluster.layout or ())) == (3, 2)


def test_little_is_enough(file: Path) -> None:
    cluster = read_cluster(written(file, "nodes: [{name: a, memory: 1e9 B, speed: 10 GB/s}]"))
    assert (cluster.nodes[0].device.free_bytes, cluster.links, cluster.layout, cluster.costs) == (10**9, (), None, COSTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a", "line 1: the file: expected entries"),
        ("nodes: []", "line 1: nodes: found 0 nodes; expected 1 to"),
        ("nodes: {a: 1}", "line 1: nodes: expected a list"),
        ("nodes:\n  - memory: 1 GB\n    speed: 1 GB/s", r"line 2: nodes\[0\]: name is missing"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s}\n  - {name: a, memory: 1 GB, speed: 1 GB/s}", r"line 3: nodes\[1\]: there is a node named a"),
        ("nodes:\n  - name: a\n    memory: 1 GX\n    speed: 1 GB/s", r"line 3: nodes\[0\]\.memory is '1 GX': expected an amount of memory such as 16 GB"),
        ("nodes:\n  - name: a\n    memory: 1 GB\n    speed: 0 GB/s", r"line 4: nodes\[0\]\.speed is '0 GB/s'"),
        ("nodes:\n  - name: a\n    memory: -1\n    speed: 1 GB/s", r"line 3: nodes\[0\]\.memory is '-1'"),
        ("nodes:\n  - name: a\n    memory: [1]\n    speed: 1 GB/s", r"line 3: nodes\[0\]\.memory: expected a value"),
        ("nodes:\n  - name: a\n    memory:\n    speed: 1 GB/s", r"nodes\[0\]\.memory is '': expected a value"),
        ("nodes:\n  - name: a\n    memory: 1 GB\n    speed: {}", r"line 4: nodes\[0\]\.speed: expected a speed"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s, threads: 0}", "threads is '0': expected a whole number from 1"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s, threads: 99999}", "threads is '99999': expected a whole number"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s, threads: 1.5}", "threads is '1.5': expected a whole number"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s, id: 12}", r"nodes\[0\]: node 'a' has id '12'; expected 64"),
        ("nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s, colour: red}", r"nodes\[0\]\.colour is 'colour': it is not known; known are name, id"),
        ("nodes:\n  - {name: a, name: b, memory: 1 GB, speed: 1 GB/s}", r"nodes\[0\]\.name is 'b': it is there twice"),
        ('nodes:\n  - {name: "a\\nb", memory: 1 GB, speed: 1 GB/s}', "expected a name of at most"),
        (f"nodes:\n  - {{name: {'a' * 65}, memory: 1 GB, speed: 1 GB/s}}", "expected a name of at most 64"),
        ("nodes: [{name: a, memory: 1 GB, speed: 1 GB/s}\n", "expected YAML"),
        ("nodes: &x [{name: a, memory: 1 GB, speed: 1 GB/s}]\nlinks: *x", r"line 2: found a reference \(\*x\)"),
        ("a: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "line 1: more than 8 levels"),
        ("nodes: [{name: a, memory: 1 GB, speed: 1 GB/s}]\n---\nnodes: []", "expected YAML"),
    ],
)
def test_wrong_file_is_refused_with_its_line(file: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        read_cluster(written(file, text))
    assert str(file) in str(caught.value)


TWO = "nodes:\n  - {name: a, memory: 1 GB, speed: 1 GB/s}\n  - {name: b, memory: 1 GB, speed: 1 GB/s}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("links: {default: {rtt: 1 ms}}", "line 4: links.default: bandwidth is missing"),
        ("links:\n  default: {rtt: 1 h, bandwidth: 1 Gbit/s}", "line 5: links.default.rtt is '1 h': expected a time such as 0.3 ms"),
        (
            "links:\n  between:\n    - {nodes: [a, c], rtt: 1 ms, bandwidth: 1 Gbit/s}",
            r"line 6: links.between\[0\].nodes\[1\] is 'c': there is no node of this",
        ),
        ("links:\n  between:\n    - {nodes: [a, a], rtt: 1 ms, bandwidth: 1 Gbit/s}", "expected two different nodes"),
        ("links:\n  between:\n    - {nodes: [a], rtt: 1 ms, bandwidth: 1 Gbit/s}", "expected two different nodes"),
        ("links:\n  between:\n    - {from: a, rtt: 1 ms, bandwidth: 1 Gbit/s}", "expected either nodes"),
        ("links:\n  between:\n    - {from: a, to: b, nodes: [a, b], rtt: 1 ms, bandwidth: 1 Gbit/s}", "expected either nodes"),
        (
            "links:\n  between:\n    - {nodes: [a, b], rtt: 1 ms, bandwidth: 1 Gbit/s}\n    - {from: b, to: a, rtt: 1 ms, bandwidth: 1 Gbit/s}",
            "line 7: .*have a link",
        ),
        ("plan: {stages: []}", "line 4: plan: expected at least one stage"),
        ("plan:\n  stages:\n    - [a, c]", r"line 6: plan.stages\[0\]\[1\] is 'c': there is no node of this name; there are a, b"),
        ("plan:\n  stages:\n    - {nodes: [a, b], shares: [1]}", r"line 6: plan.stages\[0\]: 1 shares are given for 2 ranks"),
        ("plan:\n  stages:\n    - {nodes: [a, b], shares: [1, x]}", r"shares\[1\] is 'x': expected a number"),
        ("plan:\n  stages:\n    - {nodes: [a], blocks: 0}", "blocks is '0': expected a whole number"),
        ("plan:\n  stages:\n    - {blocks: 3}", "nodes is missing"),
    ],
)
def test_wrong_link_or_plan_is_refused_with_its_line(file: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_cluster(written(file, TWO + text))


def test_files_that_are_no_text_or_too_long_or_missing_are_refused(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"nodes: \xff")
    with pytest.raises(SettingError, match="cannot be read"):
        read_cluster(file)
    file.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(SettingError, match="expected at most"):
        read_cluster(file)
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SettingError, match="cannot be read"):
            read_cluster(missing)
    many = "nodes:\n" + "".join(f"- {{name: n{index}, memory: 1 GB, speed: 1 GB/s}}\n" for index in range(MAX_NODES + 1))
    with pytest.raises(SettingError, match=f"found {MAX_NODES + 1} nodes"):
        read_cluster(written(file, many))


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["nodes:", " ", "\n", "- ", "{", "}", "[", "]", "name: a", "&a", "*a", "!!x", ": ", ",", "'", "\t"])).map("".join)
)
@example("!!python/object/apply:os.system ['true']")
def test_any_text_is_a_cluster_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SettingError):
        read_cluster(path)


def node_of(rng: random.Random, number: int) -> Node:
    threads = rng.randint(1, 64)
    types = rng.sample(["Q4_0", "Q8_0", "F16", ""], rng.randint(0, 3))
    rates = [Rate(weight_type=name, threads=threads, matvec_bytes_per_s=rng.uniform(1e9, 1e12), matmul_flop_per_s=rng.uniform(1e10, 1e14)) for name in types]
    device = Device(
        name=rng.choice(["CPU", "CUDA0"]), description="", backend="ggml", free_bytes=rng.randrange(10**12), matvec_bytes_per_s=rng.uniform(1e8, 1e12),
        threads=threads, rates=tuple(rates),
    )  # fmt: skip
    name = rng.choice([f"node {number}", 'a "quoted" \\ name', "same", "# no comment", "null", "12", "yes: no"])
    return Node(
        id=NodeId(f"{number:064x}"), name=name, device=device, measured_at=float(rng.randrange(2 * 10**9)), notes=tuple(rng.sample(["on battery", "a: b"], 1))
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read_back(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    nodes = [node_of(rng, number) for number in range(1, rng.randint(2, 8))]
    links = [
        Link(source=a.id, target=b.id, rtt_s=rng.choice([0.0, rng.uniform(1e-5, 0.1)]), bandwidth_bytes_per_s=rng.uniform(1e5, 1e10))
        for a in nodes
        for b in nodes
        if a is not b
    ]
    write_cluster(file, nodes, links, {nodes[0].id: "10.0.0.1"})
    assert list(file.parent.iterdir()) == [file]
    found = read_cluster(file)
    for node, other in zip(nodes, found.nodes, strict=True):
        assert (other.id, other.device.free_bytes, other.device.threads, other.device.name) == (
            node.id,
            node.device.free_bytes,
            node.device.threads,
            node.device.name,
        )
        assert other.device.matvec_bytes_per_s == pytest.approx(_headline(node), rel=1e-5)
        assert (other.measured_at, other.notes) == (node.measured_at, node.notes)
        assert other.name.startswith(node.name)
        rates = {rate.weight_type: rate for rate in other.device.rates}
        for rate in node.device.rates:
            assert rates[rate.weight_type].matvec_bytes_per_s == pytest.approx(rate.matvec_bytes_per_s, rel=1e-5)
            assert rates[rate.weight_type].matmul_flop_per_s == pytest.approx(rate.matmul_flop_per_s, rel=1e-5)
    pairs = {(link.source, link.target): link for link in found.links}
    assert len(pairs) == len(links)
    for link in links:
        assert pairs[link.source, link.target].rtt_s == pytest.approx(link.rtt_s, rel=1e-5)
        assert pairs[link.source, link.target].bandwidth_bytes_per_s == pytest.approx(link.bandwidth_bytes_per_s, rel=1e-5)
    assert found.addresses == {nodes[0].id: "10.0.0.1"}


def _headline(node: Node) -> float:
    """The speed of a rate for any type takes the place of the headline."""
    return next((rate.matvec_bytes_per_s for rate in node.device.rates if rate.weight_type == ""), node.device.matvec_bytes_per_s)


def test_file_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be written"):
        write_cluster(tmp_path / "none" / "cluster.yaml", [])
    (tmp_path / "directory").mkdir()
    with pytest.raises(SettingError, match="cannot be written"):
        write_cluster(tmp_path / "directory", [])
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_nodes_of_one_name_get_numbers() -> None:
    rng = random.Random(3)
    nodes = [Node(id=NodeId(f"{i:064x}"), name="pi", device=node_of(rng, i).device, measured_at=0.0) for i in range(1, 4)]
    text = cluster_text(nodes, (), {})
    assert [line.strip() for line in text.splitlines() if "name:" in line] == ['- name: "pi"', '- name: "pi-2"', '- name: "pi-3"']


def test_machine_in_short() -> None:
    new = read_machine("desktop: 16 GB, 40 GB/s")
    assert (new.node.name, new.node.id) == ("desktop", named_id("desktop"))
    assert (new.node.device.free_bytes, new.node.device.matvec_bytes_per_s, new.node.device.threads, new.node.device.rates) == (16 * 10**9, 40e9, 1, ())
    assert (new.rtt_s, new.bandwidth_bytes_per_s, new.links([new.node])) == (None, None, ())
    full = read_machine("my box = 300 GB/s , 8 threads, 24 GiB,0.3 ms, 2.5 Gbit/s, 30 TFLOP/s")
    assert (full.node.name, full.node.device.threads, full.node.device.free_bytes) == ("my box", 8, 24 * 2**30)
    assert (full.rtt_s, full.bandwidth_bytes_per_s) == (pytest.approx(3e-4), 312.5e6)
    (rate,) = full.node.device.rates
    assert (rate.weight_type, rate.threads, rate.matvec_bytes_per_s, rate.matmul_flop_per_s) == ("", 8, 300e9, 30e12)
    pairs = {(link.source, link.target) for link in full.links([new.node])}
    assert pairs == {(full.node.id, new.node.id), (new.node.id, full.node.id)}
    far = read_machine("far: 1 GB, 1 GB/s, 20 ms").links([new.node], COSTS)
    assert [(link.rtt_s, link.bandwidth_bytes_per_s) for link in far] == [(pytest.approx(0.02), COSTS.unmeasured_bytes_per_s)] * 2


@pytest.mark.parametrize(
    "text",
    ["", "a", "a: 16 GB", "a: 40 GB/s", "a: 16 GB, 40", "a: 16 GB, 40 GB/s, 1 GB/s", ": 16 GB, 40 GB/s", "a: 16 GB, 40 GB/s, x", "a: 1 GB, 1 GB/s, 0 threads"],
)
def test_machine_that_is_not_said_right_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="expected"):
        read_machine(text)


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("16 GB", BYTES, 16e9), ("16GB", BYTES, 16e9), ("1.5 TiB", BYTES, 1.5 * 2**40), ("512 kB", BYTES, 512e3), ("7 B", BYTES, 7), ("1e9 B", BYTES, 1e9),
        ("40 GB/s", BYTES_PER_S, 40e9), ("1 Gbit/s", BYTES_PER_S, 125e6), ("100 Mbps", BITS_PER_S, 12.5e6), ("0.3 ms", SECONDS, 3e-4),
        ("20 us", SECONDS, 2e-5), ("20 µs", SECONDS, 2e-5), ("1 s", SECONDS, 1), ("2 TFLOP/s", FLOP_PER_S, 2e12), ("2 GFLOPS", FLOP_PER_S, 2e9),
    ],
)  # fmt: skip
def test_quantities_have_units(text: str, quantity: Quantity, value: float) -> None:
    assert read_quantity(text, quantity) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "quantity"),
    [("", BYTES), ("16", BYTES), ("GB", BYTES), ("-1 GB", BYTES), ("nan GB", BYTES), ("1 gb", BYTES), ("1e999 GB", BYTES), ("61 s", SECONDS)],
)
def test_what_is_no_quantity_is_refused(text: str, quantity: Quantity) -> None:
    with pytest.raises(SettingError, match="expected"):
        read_quantity(text, quantity)


@given(st.integers(0, 10**15))
def test_bytes_are_written_exactly(n_bytes: int) -> None:
    assert round(read_quantity(write_bytes(n_bytes), BYTES)) == n_bytes


@given(st.floats(1e-9, 60))
def test_times_are_written_to_six_digits(seconds: float) -> None:
    assert read_quantity(write_quantity(seconds, 1e-3, "ms"), SECONDS) == pytest.approx(seconds, rel=1e-5)

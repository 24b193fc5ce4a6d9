import contextlib
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest

from yoke.core.errors import InvariantError
from yoke.core.node import NodeId
from yoke.net.group import ChannelGroup, SoloGroup, WireType
from yoke.net.identity import Identity
from yoke.net.memory import memory_pair
from yoke.net.tcp import Listener, connect
from yoke.testing.checks import check_group

# Half of float16's last place; half of a block's step of 1/127, and its scale's own rounding.
TOLERANCES = {WireType.FLOAT32: 0.0, WireType.FLOAT16: 2**-11, WireType.Q8_0: 0.5 / 127 + 2**-10}


def memory_groups(size, wire):
    channels = [{} for _ in range(size)]
    for low, high in combinations(range(size), 2):
        channels[low][high], channels[high][low] = memory_pair(NodeId(f"{low:064x}"), NodeId(f"{high:064x}"))
    return [ChannelGroup(rank, channels[rank], wire) for rank in range(size)]


@pytest.mark.parametrize("wire", list(WireType))
def test_group_over_memory_channels_keeps_the_contract(wire):
    check_group(lambda size: memory_groups(size, wire) if size > 1 else [SoloGroup()], tolerance=TOLERANCES[wire])


@pytest.mark.parametrize("wire", list(WireType))
def test_group_over_tcp_channels_keeps_the_contract(tmp_path, wire):
    nodes = [Identity.load_or_create(tmp_path / str(rank)) for rank in range(4)]
    members = [node.certificate_der for node in nodes]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(contextlib.closing(Listener("127.0.0.1", 0, node, members))) for node in nodes]

        def make(size):
            channels = [{} for _ in range(size)]
            for low, high in combinations(range(size), 2):
                channels[high][low] = connect(listeners[low].address, nodes[low].id, nodes[high], members, deadline_s=5)
                channels[low][high] = listeners[low].accept(5)
            return [ChannelGroup(rank, channels[rank], wire) if size > 1 else SoloGroup() for rank in range(size)]

        check_group(make, tolerance=TOLERANCES[wire])


def sums(wire, *contributions):
    groups = memory_groups(len(contributions), wire)
    views = [np.array(contribution, np.float32) for contribution in contributions]
    with ThreadPoolExecutor(len(groups)) as threads:
        for done in [threads.submit(group.all_reduce, view) for group, view in zip(groups, views, strict=True)]:
            done.result(10)
    for group in groups:
        group.close()
    return views


def test_float16_wire_keeps_large_values_finite():
    assert [float(view[0]) for view in sums(WireType.FLOAT16, [1e9], [0.0])] == [65504.0, 65504.0]


@pytest.mark.parametrize("wire", list(WireType))
def test_nan_reaches_every_rank(wire):
    assert all(np.isnan(view[0]) for view in sums(wire, [np.nan, 1.0], [0.0, 1.0], [0.0, 1.0]))


def test_q8_0_wire_takes_infinite_tiny_and_zero_values():
    for view in sums(WireType.Q8_0, [np.inf, 1.0], [1e-30, 0.0]):
        assert np.isfinite(view).all()


def test_q8_0_wire_sends_about_a_quarter():
    groups = memory_groups(2, WireType.Q8_0)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda group: group.all_reduce(np.ones(2048, np.float32)), groups))
    assert groups[0].bytes_sent == 2048 // 32 * 34
    assert groups[0].collective_s > 0


def test_lengths_in_any_order_share_their_room():
    groups = memory_groups(2, WireType.FLOAT32)

    def work(group):
        found = []
        for length in (8, 4000, 8, 4000, 2):
            view = np.full(length, group.rank + 1.0, np.float32)
            group.all_reduce(view)
            found.append(bool((view == 3.0).all()))
        return found

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, groups)) == [[True] * 5] * 2


@pytest.mark.parametrize("view", [np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]])
def test_array_of_another_kind_is_our_own_error(view):
    with pytest.raises(InvariantError, match="expected a contiguous float32"):
        memory_groups(2, WireType.FLOAT32)[0].all_reduce(view)


def test_group_with_a_missing_rank_cannot_be_built():
    with pytest.raises(InvariantError, match="expected every rank"):
        ChannelGroup(0, {2: memory_pair(NodeId("a" * 64), NodeId("b" * 64))[0]})


def test_gather_with_wrong_lengths_is_our_own_error():
    with pytest.raises(InvariantError, match="the lengths are"):
        SoloGroup().gather(np.zeros(3, np.float32), (4,))

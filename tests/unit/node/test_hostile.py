"""Two real ports under fire while members go on: a short version of benchmarks/hostile.py."""

import asyncio
import contextlib
import sys
import threading
from pathlib import Path

import psutil
import pytest

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.channel import receive_message
from yoke.net.codec import HELLO_LIMITS
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, TcpChannel, connect
from yoke.node.admission import Stream, knock
from yoke.node.door import MAX_KNOCKS, Door, Guest
from yoke.node.membership import Membership
from yoke.testing.hostile import Attacker, Target

N_THROWS = 700
MESSAGE = bytes(range(256)) * 16

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback device, and the attackers need many addresses")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    home = tmp_path_factory.mktemp("keys")
    return {name: Identity.load_or_create(home / name) for name in ("first", "friend", "newcomer", "stranger", "traitor")}


class DataPort:
    """A listener as a worker has it: echoes what the friend says, and reads what a traitor says as the first message of a connection."""

    def __init__(self, people: dict[str, Identity]) -> None:
        members = [people[name].certificate_der for name in ("first", "friend", "traitor")]
        self.listener = Listener("127.0.0.1", 0, people["first"], members)
        self._friend = people["friend"].id
        self.surprises: list[BaseException] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(NodeGone):
            while (channel := self.listener.accept()) is not None:
                if channel.peer == self._friend:
                    self._threads.append(threading.Thread(target=self._echo, args=(channel,)))
                    self._threads[-1].start()
                else:
                    self._read_a_message(channel)

    def _echo(self, channel: TcpChannel) -> None:
        data = bytearray(len(MESSAGE))
        with contextlib.suppress(NodeGone):
            while True:
                channel.receive_into(memoryview(data))
                channel.send(data)
        channel.close()

    def _read_a_message(self, channel: TcpChannel) -> None:
        channel.set_timeout(5.0)
        try:
            receive_message(channel, HELLO_LIMITS)
        except (NodeGone, RemoteProtocolError):
            pass
        except Exception as error:
            self.surprises.append(error)
        channel.close()

    def close(self) -> None:
        self.listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()


def exchange(channel: TcpChannel, is_over: threading.Event, done: list[int]) -> None:
    """The friend's side of the data plane."""
    data = bytearray(len(MESSAGE))
    while not is_over.is_set():
        channel.send(MESSAGE)
        channel.receive_into(memoryview(data))
        assert data == MESSAGE
        done[0] += 1


async def converse(stream: Stream, is_over: threading.Event) -> int:
    """The friend's side of the control plane: how often it was answered."""
    reader, writer = stream
    n_answers = 0
    while not is_over.is_set():
        writer.write(b"how are you?")
        assert await reader.readexactly(12) == b"how are you?"
        n_answers += 1
    writer.close()
    return n_answers


def test_members_go_on_and_newcomers_come_in_while_both_ports_are_under_fire(people: dict[str, Identity], tmp_path: Path) -> None:
    process = psutil.Process()
    data_port = DataPort(people)
    address = data_port.listener.address
    channel = connect(address, people["first"].id, people["friend"], [people["first"].certificate_der], deadline_s=5.0)
    channel.set_timeout(10.0)
    guests: dict[NodeId, Stream] = {}
    faults: list[object] = []
    is_over, exchanges = threading.Event(), [0]
    friend = threading.Thread(target=exchange, args=(channel, is_over, exchanges))
    friend.start()

    async def welcome(guest: Guest) -> None:
        guests[guest.id] = guest.stream
        if guest.id == people["friend"].id:
            echoing.append(asyncio.ensure_future(echo(guest.stream)))

    async def echo(stream: Stream) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                stream[1].write(await stream[0].readexactly(12))
        stream[1].close()

    echoing: list[asyncio.Future[None]] = []

    async def scene() -> tuple[Attacker, Door, int]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        async with Door(people["first"], Membership(tmp_path, people["first"].id, "hall"), ("127.0.0.1", 0), welcome, guests.__contains__) as door:
            conversation = asyncio.ensure_future(converse(await knock(door.invite(), people["friend"]), is_over))
            target = Target(
                coordinator=people["first"].id, door_port=door.port, data_port=address[1], certificates=(people["first"].certificate_der,)
            )
            attacker = Attacker(target, people["stranger"], people["traitor"], seed=1)
            n_fds, n_threads = process.num_fds(), threading.active_count()
            most = 0
            kinds = list(attacker.kinds)

            def fire(first: int) -> None:
                for index in range(first, first + N_THROWS // 2):
                    attacker.throw(kinds[index % len(kinds)])

            await asyncio.to_thread(fire, 0)
            invite = door.invite()
            newcomer = asyncio.ensure_future(knock(invite, people["newcomer"]))
            await asyncio.to_thread(fire, 1)
            (await newcomer)[1].close()
            most = max(most, len(door._strangers))
            attacker.stop()
            assert most <= MAX_KNOCKS
            assert attacker.counts.total() == 2 * (N_THROWS // 2)
            while process.num_fds() > n_fds + 4 or threading.active_count() > n_threads:  # what is left of the attack goes by itself: the timeout of tests tells if not
                await asyncio.sleep(0.01)
            is_over.set()
            n_answers = await conversation
        await asyncio.gather(*echoing)
        guests[people["newcomer"].id][1].close()
        return attacker, door, n_answers

    attacker, door, n_answers = asyncio.run(scene())
    friend.join(10)
    channel.close()
    data_port.close()
    assert faults == data_port.surprises == []
    assert exchanges[0] > 20
    assert n_answers > 20
    assert set(guests) == {people["friend"].id, people["newcomer"].id}
    assert door.counts.admitted == 2
    assert door.counts.refused > N_THROWS / 20, "some came as far as being told no"
    assert data_port.listener.refused > N_THROWS / 20

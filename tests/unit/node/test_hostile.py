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

N_THROWS, N_VOLLEYS = 220, 10
MESSAGE = bytes(range(256)) * 16

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback device, and the attackers need many addresses"
)


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


class Friend:
    """A member that goes on, on both planes, until it is told to stop."""

    def __init__(self, channel: TcpChannel) -> None:
        self.channel, self.is_over = channel, threading.Event()
        self.n_exchanges = self.n_answers = 0
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self._thread.start()

    def _exchange(self) -> None:
        data = bytearray(len(MESSAGE))
        while not self.is_over.wait(0.001):
            self.channel.send(MESSAGE)
            self.channel.receive_into(memoryview(data))
            assert data == MESSAGE
            self.n_exchanges += 1

    async def converse(self, stream: Stream) -> None:
        """The control plane, where a guest is echoed."""
        reader, writer = stream
        while not self.is_over.is_set():
            writer.write(b"how are you?")
            assert await reader.readexactly(12) == b"how are you?"
            self.n_answers += 1
            await asyncio.sleep(0.001)
        writer.close()

    def stop(self) -> None:
        """All that was sent came back: an exchange that failed has ended its thread, and is seen in the count."""
        self.is_over.set()
        self._thread.join(10)
        self.channel.close()


async def echo(stream: Stream) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            stream[1].write(await stream[0].readexactly(12))
    stream[1].close()


def fire(attacker: Attacker, n_throws: int) -> None:
    kinds = list(attacker.kinds)
    for index in range(n_throws):
        attacker.throw(kinds[index % len(kinds)])


async def scene(people: dict[str, Identity], directory: Path, data_port: DataPort, friend: Friend) -> tuple[Door, list[NodeId]]:
    """The door's counts at the end, and who came in by it."""
    first, process = people["first"], psutil.Process()
    guests: dict[NodeId, asyncio.Task[None]] = {}

    async def welcome(guest: Guest) -> None:
        guests[guest.id] = asyncio.create_task(echo(guest.stream))

    async with Door(first, Membership(directory, first.id, "hall"), ("127.0.0.1", 0), welcome, guests.__contains__) as door:
        conversation = asyncio.create_task(friend.converse(await knock(door.invite(), people["friend"])))
        target = Target(coordinator=first.id, door_port=door.port, data_port=data_port.listener.address[1], certificates=(first.certificate_der,))
        attacker = Attacker(target, people["stranger"], people["traitor"], seed=1, wait_s=0.05)
        n_fds = process.num_fds()
        for _ in range(N_VOLLEYS):
            firing = asyncio.create_task(asyncio.to_thread(fire, attacker, N_THROWS // N_VOLLEYS))
            newcomer = await knock(door.invite(), people["newcomer"])
            assert len(door._strangers) <= MAX_KNOCKS
            await hang_up(newcomer)
            await guests.pop(people["newcomer"].id)
            await firing
        attacker.stop()
        while process.num_fds() > n_fds + 2:  # noqa: ASYNC110 (what is left of the attack goes by itself; if not, the tests' timeout tells)
            await asyncio.sleep(0.01)
        friend.is_over.set()
        await conversation
    await asyncio.gather(*guests.values())
    return door, [member.id for member in Membership(directory, first.id, "hall").members]


async def hang_up(stream: Stream) -> None:
    stream[1].close()
    with contextlib.suppress(OSError):
        await stream[1].wait_closed()


# Python's ssl leaves a socket to the collector when a caller resets its connection at the very moment of wrapping it.
@pytest.mark.filterwarnings("ignore:Exception ignored in. .ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_members_go_on_and_newcomers_come_in_while_both_ports_are_under_fire(people: dict[str, Identity], tmp_path: Path) -> None:
    faults: list[object] = []

    async def watched() -> tuple[Door, list[NodeId]]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        return await scene(people, tmp_path, data_port, friend)

    data_port = DataPort(people)
    first = people["first"]
    friend = Friend(connect(data_port.listener.address, first.id, people["friend"], [first.certificate_der], deadline_s=5.0))
    try:
        door, members = asyncio.run(watched())
    finally:
        friend.stop()
        data_port.close()
    assert faults == data_port.surprises == []
    assert min(friend.n_exchanges, friend.n_answers) > 50
    assert members == [people["friend"].id, people["newcomer"].id]
    assert door.counts.refused > N_THROWS / 20, "some came as far as being told no"
    assert data_port.listener.refused > N_THROWS / 20

"""Who gets through the door and who does not, over real TLS on the loopback device: invites, keys, codes, and those who mean harm."""

import asyncio
import contextlib
import secrets
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from yoke.core.errors import AdmissionError, NodeGone, RemoteProtocolError, RequestError, SettingError
from yoke.core.node import NodeId
from yoke.net.identity import Identity, admission_server_context, joining_client_context
from yoke.net.pairing import CODE_S, TRIES, Exchange
from yoke.node.admission import NONCE_BYTES, Kind, Stream, _Said, _seen, knock, knock_with_code, knock_with_key
from yoke.node.door import MAX_KNOCKS, Door, Guest
from yoke.node.joining import Place, Way, by_code, by_invite
from yoke.node.membership import Membership, remembered
from yoke.node.roster import Refused, Why
from yoke.node.turnstile import GUESSES, KNOCKS

LOCAL = ("127.0.0.1",)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback device")


class SetClock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def monotonic(self) -> float:
        return self.now_s

    def epoch(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    home = tmp_path_factory.mktemp("keys")
    return {name: Identity.load_or_create(home / name) for name in ("first", "newcomer", "stranger", "attacker")}


class House:
    """A door and who came through it."""

    def __init__(self, identity: Identity, directory: Path) -> None:
        self.identity, self.directory, self.clock = identity, directory, SetClock()
        self.guests: list[Guest] = []
        self.connected: set[NodeId] = set()
        self.notes: list[str] = []
        self.welcome: Callable[[Guest], Awaitable[None]] = self.greet

    async def greet(self, guest: Guest) -> None:
        self.guests.append(guest)
        self.connected.add(guest.id)
        guest.stream[1].write(b"welcome")

    @contextlib.asynccontextmanager
    async def open(self, port: int = 0) -> AsyncIterator[Door]:
        self.membership = Membership(self.directory, self.identity.id, "hall", self.clock)

        async def welcome(guest: Guest) -> None:
            await self.welcome(guest)

        door = Door(self.identity, self.membership, ("127.0.0.1", port), welcome, lambda node: node in self.connected, note=self.notes.append, clock=self.clock)
        async with door:
            yield door
        for guest in self.guests:
            await hang_up(guest.stream)
        self.guests.clear()
        self.connected.clear()

    @property
    def names(self) -> list[NodeId]:
        return [member.id for member in self.membership.members]


@pytest.fixture
def house(people: dict[str, Identity], tmp_path: Path) -> House:
    return House(people["first"], tmp_path / "first")


async def hang_up(stream: Stream) -> None:
    stream[1].close()
    with contextlib.suppress(OSError):
        await stream[1].wait_closed()


async def is_welcome(stream: Stream) -> bool:
    """Whether the other side sees a guest in this connection."""
    try:
        async with asyncio.timeout(5):
            return await stream[0].readexactly(7) == b"welcome"
    finally:
        await hang_up(stream)


async def refused(work: Awaitable[Any]) -> Why:
    with pytest.raises(Refused) as caught:
        await work
    return caught.value.why


def run(scene: Awaitable[Any]) -> Any:
    """A scene that ends, and leaves no task behind."""

    async def whole() -> Any:
        async with asyncio.timeout(20):
            result = await scene
        for _ in range(20):  # transports close in later turns of the loop
            await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left
        return result

    return asyncio.run(whole())


# The three ways in


def test_invite_lets_a_machine_in_and_its_key_lets_it_back_after_both_have_started_anew(house: House, people: dict[str, Identity], tmp_path: Path) -> None:
    newcomer, directory = people["newcomer"], tmp_path / "newcomer"

    async def scene() -> None:
        async with house.open() as door:
            port = door.port
            assert await is_welcome(await Way(newcomer, directory, by_invite(door.invite(), newcomer))())
            assert [guest.id for guest in house.guests] == [newcomer.id]
        async with house.open() as door:
            assert door.port == port, "where members look for it"
            assert await is_welcome(await Way(newcomer, directory)())
            assert house.names == [newcomer.id]
            assert (door.counts.admitted, door.counts.refused) == (1, 0)

    run(scene())


def test_code_lets_a_machine_in_and_tells_it_the_right_key_whatever_was_announced(house: House, people: dict[str, Identity], tmp_path: Path) -> None:
    newcomer, directory = people["newcomer"], tmp_path / "newcomer"

    async def scene() -> None:
        async with house.open() as door:
            code = door.open_code()
            assert await is_welcome(await Way(newcomer, directory, by_code(code.digits, LOCAL, door.port, newcomer))())
            assert await refused(knock_with_code(LOCAL, door.port, code.digits, people["stranger"])) is Why.NO_CODE, "it is good for one machine"
            house.connected.clear()
            assert await is_welcome(await Way(newcomer, directory)())
        known = remembered(directory)
        assert known is not None
        assert (known.cluster, known.hosts) == (people["first"].id, LOCAL)

    run(scene())


def test_machine_that_is_there_already_is_not_let_in_twice_but_may_wait_until_its_loss_is_noticed(
    house: House, people: dict[str, Identity], tmp_path: Path
) -> None:
    newcomer = people["newcomer"]

    async def scene() -> None:
        async with house.open() as door:
            invite = door.invite()
            way = Way(newcomer, tmp_path / "newcomer", by_invite(invite, newcomer))
            stream = await way()
            with pytest.raises(NodeGone, match="not noticed yet"):
                await way()
            with pytest.raises(Refused, match="give each a directory of its own with --state-dir"):
                await Way(newcomer, tmp_path / "newcomer")()
            house.connected.clear()
            assert await is_welcome(await way())
            await hang_up(stream)

    run(scene())


def test_machine_that_did_not_hear_that_it_was_let_in_may_show_its_invite_again(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            invite = door.invite(uses=1)
            await hang_up(await knock(invite, people["newcomer"]))
            house.connected.clear()
            assert await is_welcome(await knock(invite, people["newcomer"]))
            assert await refused(knock(invite, people["stranger"])) is Why.NOT_INVITED

    run(scene())


def test_removed_machine_stays_out_at_once_and_forgets_the_cluster_and_a_new_invite_lets_it_in(
    house: House, people: dict[str, Identity], tmp_path: Path
) -> None:
    newcomer, directory = people["newcomer"], tmp_path / "newcomer"

    async def scene() -> None:
        async with house.open() as door:
            old = door.invite(uses=5)
            way = Way(newcomer, directory, by_invite(old, newcomer))
            await hang_up(await way())
            house.connected.clear()
            door.open_code()
            assert door.remove(house.membership.introduce(newcomer.id, "attic")).id == newcomer.id
            assert await refused(way()) is Why.REMOVED
            assert remembered(directory) is None
            assert await refused(knock(old, newcomer)) is Why.REMOVED
            assert await refused(knock(old, people["stranger"])) is Why.NOT_INVITED
            assert await refused(knock_with_code(LOCAL, door.port, "000000", newcomer)) is Why.NO_CODE
            assert await is_welcome(await knock(door.invite(), newcomer))
            with pytest.raises(RequestError, match="no machine named 'cellar'"):
                door.remove("cellar")

    run(scene())


def test_removal_ends_a_welcome_under_way(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> bytes:
        is_inside = asyncio.Event()

        async def dawdle(guest: Guest) -> None:
            is_inside.set()
            await asyncio.Event().wait()

        house.welcome = dawdle
        async with house.open() as door:
            stream = await knock(door.invite(uses=2), people["newcomer"])
            await is_inside.wait()
            assert await refused(knock_with_key(LOCAL, door.port, people["first"].id, people["newcomer"])) is Why.CONNECTED
            door.remove(house.membership.members[0].name)
            return await read_out(stream)

    assert run(scene()) == b""


async def read_out(stream: Stream) -> bytes:
    """What still comes until the connection ends, in whatever way."""
    try:
        return await stream[0].read(1000)
    except OSError:
        return b""
    finally:
        await hang_up(stream)


@pytest.mark.parametrize("error", [RemoteProtocolError("no introduction"), TimeoutError()])
def test_guest_that_does_not_behave_is_dropped_and_the_door_stays_open(house: House, people: dict[str, Identity], error: Exception) -> None:
    async def scene() -> None:
        async def fail(guest: Guest) -> None:
            raise error

        async with house.open() as door:
            house.welcome = fail
            assert await read_out(await knock(door.invite(), people["newcomer"])) == b""
            house.welcome = house.greet
            assert await is_welcome(await knock(door.invite(), people["newcomer"]))

    run(scene())


def test_newcomer_that_cannot_be_written_down_is_not_let_in_and_somebody_is_told(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            invite = door.invite()
            (house.directory / "members.json").chmod(0o644)
            (house.directory / "members.json").write_text("{")
            with pytest.raises(NodeGone):
                await knock(invite, people["newcomer"])

    run(scene())
    assert len(house.notes) == 1
    assert "a machine could not be let in" in house.notes[0]


def test_two_doors_do_not_share_a_port_and_a_port_of_the_last_time_that_is_taken_is_no_obstacle(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            taken = door.port
            other = House(people["stranger"], house.directory.parent / "other")
            with pytest.raises(SettingError, match=f"cannot listen for joining machines on 127.0.0.1 port {taken}.*choose another"):
                async with other.open(taken):
                    pass
            other.membership.keep_port(taken)
            async with other.open() as second:
                assert second.port not in {0, taken}

    run(scene())


def test_coordinator_that_moved_is_found_again_by_asking_the_network_and_a_liar_is_not_believed(
    house: House, people: dict[str, Identity], tmp_path: Path
) -> None:
    newcomer, directory = people["newcomer"], tmp_path / "newcomer"

    async def scene() -> None:
        async with house.open() as door:
            await hang_up(await Way(newcomer, directory, by_invite(door.invite(), newcomer))())
        house.membership.keep_port(0)
        liar = House(people["attacker"], tmp_path / "liar")
        async with house.open() as moved, liar.open() as lying:
            places = {"truth": moved.port, "lie": lying.port}

            def look(what: str) -> Any:
                async def look_there(node: NodeId) -> Place:
                    return Place(node=node, hosts=LOCAL, port=places[what])

                return look_there

            with pytest.raises(NodeGone, match="no answer"):
                await Way(newcomer, directory)()
            with pytest.raises(NodeGone, match="another node"):
                await Way(newcomer, directory, look=look("lie"))()
            assert lying.counts.refused == lying.counts.admitted == 0
            assert await is_welcome(await Way(newcomer, directory, look=look("truth"))())
            house.connected.clear()
            assert await is_welcome(await Way(newcomer, directory)()), "it remembers the new place"

    run(scene())


def test_machine_that_joined_nothing_says_so(people: dict[str, Identity], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="has joined no cluster yet"):
        Way(people["newcomer"], tmp_path)


# Codes, and somebody in between


def test_three_wrong_codes_end_the_code(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            digits = door.open_code().digits
            wrong = f"{(int(digits) + 1) % 10**6:06d}"
            for _ in range(TRIES):
                assert await refused(knock_with_code(LOCAL, door.port, wrong, people["stranger"])) is Why.WRONG_CODE
            assert await refused(knock_with_code(LOCAL, door.port, digits, people["newcomer"])) is Why.NO_CODE
            _, stream = await knock_with_code(LOCAL, door.port, door.open_code().digits, people["newcomer"])
            assert await is_welcome(stream)
            assert house.names == [people["newcomer"].id]

    run(scene())


def test_code_ends_with_its_time(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            digits = door.open_code().digits
            house.clock.now_s += CODE_S
            assert await refused(knock_with_code(LOCAL, door.port, digits, people["newcomer"])) is Why.NO_CODE

    run(scene())


@contextlib.asynccontextmanager
async def man_in_the_middle(own: Identity, port: int, change: Callable[[bytes, bool], bytes] = lambda data, _: data) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A TLS server with its own key that passes everything on to the real one, both ways, and may change it: its port, and what it read."""
    read: list[bytes] = []
    tasks: list[asyncio.Task[None]] = []

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        onward = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context())

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_up: bool) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    read.append(data)
                    sink.write(change(data, is_up))
                    await sink.drain()
            sink.close()

        await asyncio.gather(pass_on(reader, onward[1], is_up=True), pass_on(onward[0], writer, is_up=False))

    async with await asyncio.start_server(visit, "127.0.0.1", 0, ssl=admission_server_context(own)) as server:
        yield server.sockets[0].getsockname()[1], read
        server.close()
        await asyncio.gather(*tasks)


def test_man_in_the_middle_of_a_pairing_gets_neither_side_though_the_code_is_right(house: House, people: dict[str, Identity]) -> None:
    """He ends the newcomer's TLS with his own key, and passes every message on as it is."""

    async def scene() -> None:
        async with house.open() as door:
            digits = door.open_code().digits
            async with man_in_the_middle(people["attacker"], door.port) as (port, read):
                assert await refused(knock_with_code(LOCAL, port, digits, people["newcomer"])) is Why.FORGED
            assert len(b"".join(read)) > 200, "he was really in between"
            assert house.names == []
            _, stream = await knock_with_code(LOCAL, door.port, digits, people["newcomer"])
            assert await is_welcome(stream), "without him it works"

    run(scene())


def test_man_in_the_middle_who_signs_as_himself_is_told_that_the_code_is_wrong(house: House, people: dict[str, Identity]) -> None:
    """He speaks with both sides in his own name, and passes on only what the code protects."""
    attacker = people["attacker"]

    async def scene() -> Why:
        async with house.open() as door:
            digits = door.open_code().digits
            verdicts: list[bytes] = []

            async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                onward, back = await asyncio.open_connection("127.0.0.1", door.port, ssl=joining_client_context())
                hello = await onward.readexactly(1 + NONCE_BYTES)
                writer.write(hello)
                head = await reader.readexactly(131)
                await reader.readexactly(int.from_bytes(head[129:131], "little"))
                back.write(_Said(attacker, Kind.CODE).knock(head[97:129], hello[1:], people["first"].id))
                writer.write(await onward.readexactly(33))
                back.write(await reader.readexactly(32))
                verdicts.append(await onward.readexactly(1))
                writer.write(verdicts[0])
                for sink in (writer, back):
                    await hang_up((reader, sink))

            async with await asyncio.start_server(visit, "127.0.0.1", 0, ssl=admission_server_context(attacker)) as server:
                why = await refused(knock_with_code(LOCAL, server.sockets[0].getsockname()[1], digits, people["newcomer"]))
            assert verdicts == [Why.WRONG_CODE.byte]
            assert house.names == []
        return why

    assert run(scene()) is Why.WRONG_CODE


@pytest.mark.parametrize("answer", ["yes at once", "yes, and a random confirmation"])
def test_machine_that_does_not_know_the_code_cannot_claim_to_show_it(people: dict[str, Identity], answer: str) -> None:
    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes((2,)) + bytes(NONCE_BYTES))
        await reader.readexactly(131)
        if answer == "yes at once":
            writer.write(b"\x06" + bytes(32))
        else:
            writer.write(b"\x07" + Exchange("111111", people["newcomer"].id, people["attacker"].id, is_host=True).message)
            writer.write(b"\x06" + secrets.token_bytes(32))
        await writer.drain()
        await reader.read()
        await hang_up((reader, writer))

    async def scene() -> None:
        async with await asyncio.start_server(visit, "127.0.0.1", 0, ssl=admission_server_context(people["attacker"])) as server:
            with pytest.raises(AdmissionError, match=r"without the code|another machine is in between"):
                await knock_with_code(LOCAL, server.sockets[0].getsockname()[1], "222222", people["newcomer"])

    run(scene())


async def say(port: int, *words: bytes | Callable[[bytes], bytes], source: str | None = None) -> bytes:
    """Connect, hear the nonce, say something (made from the nonce), and what was answered until the end."""
    local = None if source is None else (source, 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context(), local_addr=local)
    try:
        hello = await reader.readexactly(1 + NONCE_BYTES)
        for word in words:
            writer.write(word(hello[1:]) if callable(word) else word)
        return await reader.read(1)
    except (OSError, asyncio.IncompleteReadError):
        return b""
    finally:
        await hang_up((reader, writer))


def test_whole_knocks_that_went_well_are_worth_nothing_when_they_are_said_again(house: House, people: dict[str, Identity]) -> None:
    """As whoever could read inside TLS would say them: with a secret, a key, and a code, confirmation and all."""
    newcomer, first = people["newcomer"], people["first"]
    said: list[bytes] = []

    def keep(kind: Kind, payload: bytes) -> Callable[[bytes], bytes]:
        def word(nonce: bytes) -> bytes:
            said.append(_Said(newcomer, kind).knock(payload, nonce, first.id))
            return said[-1]

        return word

    async def scene() -> None:
        async with house.open() as door:
            invite = door.invite(uses=9)
            for kind, payload in ((Kind.SECRET, invite.secret), (Kind.KEY, b"")):
                assert await say(door.port, keep(kind, payload)) == b"\x06"
                house.connected.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", door.port, ssl=joining_client_context())
            exchange = Exchange(door.open_code().digits, newcomer.id, first.id, is_host=False)
            nonce = (await reader.readexactly(1 + NONCE_BYTES))[1:]
            said.append(_Said(newcomer, Kind.CODE).knock(exchange.message, nonce, first.id))
            writer.write(said[-1])
            shown, _ = exchange.finish((await reader.readexactly(33))[1:], _seen(nonce, first.certificate_der, newcomer.certificate_der))
            writer.write(shown)
            assert await reader.readexactly(1) == b"\x06"
            await hang_up((reader, writer))
            said[-1] += shown
            house.connected.clear()
            for words in said:
                door.open_code()
                assert await say(door.port, words) == Why.FORGED.byte
            assert len(house.guests) == 3

    run(scene())


# Noise, slowness, floods


@on_linux
def test_strangers_who_dawdle_lose_their_places_to_whoever_does_not(house: House, people: dict[str, Identity]) -> None:
    """Half of them are silent before TLS, half after it; a machine with an invite comes in all the same, and no more than the places are held."""

    async def scene() -> None:
        async with house.open() as door:
            streams = []
            for index in range(2 * MAX_KNOCKS):
                local, secured = (f"127.0.0.{2 + index % 5}", 0), joining_client_context() if index % 2 else None
                streams.append(await asyncio.open_connection("127.0.0.1", door.port, ssl=secured, local_addr=local))
            assert await is_welcome(await knock(door.invite(), people["newcomer"]))
            assert door.counts.displaced >= MAX_KNOCKS
            for stream in streams:
                await hang_up(stream)

    run(scene())


@on_linux
def test_one_address_that_takes_all_places_loses_its_own_and_not_anothers(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            patient = await asyncio.open_connection("127.0.0.1", door.port, ssl=joining_client_context(), local_addr=("127.0.0.2", 0))
            nonce = (await patient[0].readexactly(1 + NONCE_BYTES))[1:]
            invite = door.invite()
            greedy = [await asyncio.open_connection("127.0.0.1", door.port, local_addr=("127.0.0.3", 0)) for _ in range(MAX_KNOCKS + 8)]
            for stream in greedy[:9]:
                assert await read_out(stream) == b"", "these made room"
            assert door.counts.displaced == 9
            patient[1].write(_Said(people["newcomer"], Kind.SECRET).knock(invite.secret, nonce, people["first"].id))
            assert await patient[0].readexactly(1) == b"\x06"
            for stream in (patient, *greedy[9:]):
                await hang_up(stream)

    run(scene())


@on_linux
def test_address_that_knocks_too_often_is_hung_up_on_and_nobody_else_is(house: House, people: dict[str, Identity]) -> None:
    async def scene() -> None:
        async with house.open() as door:
            for _ in range(int(KNOCKS) + 10):
                reader, writer = await asyncio.open_connection("127.0.0.1", door.port, local_addr=("127.0.0.2", 0))
                writer.write(secrets.token_bytes(64))
                await read_out((reader, writer))
            assert door.counts.held_off == 10
            assert await is_welcome(await knock(door.invite(), people["newcomer"]))
            house.clock.now_s += 60.0
            assert await say(door.port, bytes(131), source="127.0.0.2") == Why.FORGED.byte

    run(scene())


@on_linux
def test_guessers_at_many_addresses_end_the_guessing_for_a_while_but_keep_no_member_out(house: House, people: dict[str, Identity]) -> None:
    first, newcomer, stranger = people["first"], people["newcomer"], people["stranger"]

    async def scene() -> None:
        async with house.open() as door:
            invite = door.invite(uses=2)
            await hang_up(await knock(invite, newcomer))
            house.connected.clear()
            guess = _Said(stranger, Kind.SECRET)
            for index in range(int(GUESSES)):
                answer = await say(door.port, lambda nonce: guess.knock(bytes(10), nonce, first.id), source=f"127.0.1.{index}")
                assert answer == Why.NOT_INVITED.byte
            assert await refused(knock(invite, stranger)) is Why.BUSY
            assert await is_welcome(await knock_with_key(LOCAL, door.port, first.id, newcomer))
            house.connected.clear()
            assert await is_welcome(await knock(invite, newcomer)), "a member is no guesser, whatever it shows"
            house.clock.now_s += 60.0
            assert await is_welcome(await knock(invite, stranger))

    run(scene())


def test_door_that_closes_hangs_up_on_strangers(house: House) -> None:
    async def scene() -> bytes:
        async with house.open() as door:
            plain = await asyncio.open_connection("127.0.0.1", door.port)
            secured = await asyncio.open_connection("127.0.0.1", door.port, ssl=joining_client_context())
            await secured[0].readexactly(1 + NONCE_BYTES)
        return await read_out(plain) + await read_out(secured)

    assert run(scene()) == b""


def test_no_older_tls_is_spoken(house: House) -> None:
    async def scene() -> None:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with house.open() as door:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", door.port, ssl=old)

    run(scene())


def test_invite_of_a_door_that_listens_everywhere_names_the_machines_addresses(people: dict[str, Identity], tmp_path: Path) -> None:
    async def welcome(guest: Guest) -> None:
        raise AssertionError

    async def scene() -> None:
        membership = Membership(tmp_path, people["first"].id, "hall")
        async with Door(people["first"], membership, ("0.0.0.0", 0), welcome, lambda _: False) as door:
            invite = door.invite()
            assert invite.hosts == door.hosts
            assert "0.0.0.0" not in invite.hosts
            with pytest.raises(Refused):  # it answers at one of them
                await knock(replace(invite, secret=bytes(10)), people["newcomer"])

    run(scene())

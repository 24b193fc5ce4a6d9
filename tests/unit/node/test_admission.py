"""What is said at the door, over real TLS on the loopback device."""

import asyncio
import contextlib
import secrets
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from yoke.core.errors import AdmissionError, NodeGone
from yoke.core.node import NodeId
from yoke.net.identity import Identity, admission_server_context, joining_client_context
from yoke.net.invite import SECRET_BYTES, Invite
from yoke.net.pairing import Code
from yoke.node.admission import NONCE_BYTES, PAYLOAD_BYTES, Host, Kind, _Said, hear, knock, knock_with_key
from yoke.node.roster import Applicant, Refused, Why, check_certificate

KNOCK_BYTES = 1 + 32 + 64 + PAYLOAD_BYTES + 2
SECRET = bytes(range(SECRET_BYTES))
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    home: Path = tmp_path_factory.mktemp("keys")
    return {name: Identity.load_or_create(home / name) for name in ("coordinator", "newcomer", "stranger")}


@contextlib.asynccontextmanager
async def door(owner: Identity, serve: Serve, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[tuple[int, list[BaseException | None]]]:
    """A server with ``owner``'s key: its port, and how each visit ended."""
    ends: list[BaseException | None] = []
    visits: list[asyncio.Task[Any]] = []

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await serve(reader, writer)
            ends.append(None)
        except Exception as error:
            ends.append(error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(visit, host, port, ssl=admission_server_context(owner))
    async with server:
        yield server.sockets[0].getsockname()[1], ends
        await asyncio.wait_for(asyncio.gather(*visits), 5)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class OneSecret:
    """A judge with one secret, good for any number of machines."""

    def is_member(self, node: NodeId) -> bool:
        return False

    def is_connected(self, node: NodeId) -> bool:
        return False

    def may_guess(self) -> bool:
        return True

    def admit(self, applicant: Applicant, secret: bytes | None) -> None:
        if secret is None:
            raise Refused(Why.UNKNOWN)
        if secret != SECRET:
            raise Refused(Why.NOT_INVITED)
        check_certificate(applicant)

    def begin_code(self) -> Code | None:
        return None

    def admit_by_code(self, applicant: Applicant, code: Code) -> None:
        raise AssertionError


def admitting(people: dict[str, Identity]) -> Serve:
    coordinator = people["coordinator"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hear((reader, writer), Host(coordinator.id, coordinator.certificate_der), OneSecret())

    return serve


def invite(people: dict[str, Identity], port: int, **changes: Any) -> Invite:
    return Invite(**({"node_id": people["coordinator"].id, "hosts": ("127.0.0.1",), "port": port, "secret": SECRET} | changes))


async def visit_with(people: dict[str, Identity], proof: Callable[[bytes], bytes]) -> tuple[bytes, BaseException | None]:
    """Knock by hand with a proof made from the nonce: what is answered, and how the coordinator saw it."""
    async with door(people["coordinator"], admitting(people)) as (port, ends):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context())
        hello = await reader.readexactly(1 + NONCE_BYTES)
        writer.write(proof(hello[1:]))
        answer = await reader.read(1)
        await close(writer)
    return answer, ends[0]


def test_newcomer_with_the_invite_is_let_in_and_known_by_its_key(people: dict[str, Identity]) -> None:
    coordinator, newcomer, known = people["coordinator"], people["newcomer"], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        known.append(await hear((reader, writer), Host(coordinator.id, coordinator.certificate_der), OneSecret()))
        writer.write(b"welcome")
        await writer.drain()

    async def scene() -> bytes:
        async with door(coordinator, serve) as (port, _):
            reader, writer = await knock(invite(people, port), newcomer)
            heard = await reader.readexactly(7)
            await close(writer)
        return heard

    assert asyncio.run(scene()) == b"welcome"
    assert known == [Applicant(id=newcomer.id, certificate=newcomer.certificate_der, host="127.0.0.1")]


def test_wrong_secret_is_refused_to_the_newcomers_face(people: dict[str, Identity]) -> None:
    async def scene() -> list[BaseException | None]:
        async with door(people["coordinator"], admitting(people)) as (port, ends):
            with pytest.raises(Refused, match="the coordinator refused: the invite is not valid") as caught:
                await knock(invite(people, port, secret=bytes(SECRET_BYTES)), people["newcomer"])
            assert caught.value.why is Why.NOT_INVITED
        return ends

    (end,) = asyncio.run(scene())
    assert isinstance(end, Refused)
    assert end.why is Why.NOT_INVITED


def test_newcomer_says_nothing_to_a_man_in_the_middle(people: dict[str, Identity]) -> None:
    """Another key answers at the invite's address: the connection ends before one byte of the invite is sent."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(secrets.token_bytes(1 + NONCE_BYTES))
        heard.append(await reader.read())

    async def scene() -> None:
        async with door(people["stranger"], serve) as (port, _):
            with pytest.raises(AdmissionError, match=r"another node than the invite's answers.*Nothing was sent"):
                await knock(invite(people, port), people["newcomer"])
            with pytest.raises(NodeGone, match=r"another node .* answers.*Nothing was sent"):  # a member tries again: addresses change hands
                await knock_with_key(("127.0.0.1",), port, people["coordinator"].id, people["newcomer"])

    asyncio.run(scene())
    assert heard == [b"", b""]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback device")
def test_of_several_addresses_the_one_whose_key_matches_is_taken_whatever_the_others_are(people: dict[str, Identity]) -> None:
    """Nobody, somebody else, and somebody who accepts and is silent: as happens with private addresses on another network."""
    heard: list[bytes] = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    held: list[asyncio.StreamWriter] = []

    async def scene() -> str:
        async with door(people["coordinator"], admitting(people), "127.0.0.5") as (port, ends):
            async with door(people["stranger"], other, "127.0.0.3", port), await asyncio.start_server(silent, "127.0.0.4", port):
                hosts = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
                _, writer = await knock(invite(people, port, hosts=hosts), people["newcomer"])
                worked = str(writer.get_extra_info("peername")[0])
                await close(writer)
                for writer in held:
                    await close(writer)
            assert ends in ([], [None])
        return worked

    assert asyncio.run(scene()) == "127.0.0.5"
    assert heard == [b""]


def forged(people: dict[str, Identity], nonce: bytes, case: str) -> bytes:
    coordinator, newcomer, stranger = people["coordinator"], people["newcomer"], people["stranger"]
    good = _Said(newcomer, Kind.SECRET, SECRET).knock(SECRET, nonce, coordinator.id)
    key_at, signature_at, payload_at = 1, 33, 97
    match case:
        case "another's key":
            return good[:key_at] + bytes.fromhex(stranger.id) + good[signature_at:]
        case "replayed nonce":
            return _Said(newcomer, Kind.SECRET, SECRET).knock(SECRET, bytes(NONCE_BYTES), coordinator.id)
        case "meant for another coordinator":
            return _Said(newcomer, Kind.SECRET, SECRET).knock(SECRET, nonce, stranger.id)
        case "signed for another kind":
            return bytes((Kind.KEY,)) + good[1:]
        case "another payload":
            return good[:payload_at] + bytes(PAYLOAD_BYTES) + good[payload_at + PAYLOAD_BYTES :]
        case "another's certificate":
            return good[: KNOCK_BYTES - 2] + struct.pack("<H", len(stranger.certificate_der)) + stranger.certificate_der
        case "long certificate":
            return good[: KNOCK_BYTES - 2] + struct.pack("<H", 65535)
        case "unknown kind":
            return _Said(newcomer, 9, SECRET).knock(SECRET, nonce, coordinator.id)  # type: ignore[arg-type]
        case "key of a stranger":
            return _Said(newcomer, Kind.KEY).knock(b"", nonce, coordinator.id)
        case "code where none is":
            return _Said(newcomer, Kind.CODE).knock(secrets.token_bytes(32), nonce, coordinator.id)
        case "nothing wrong":
            return good
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "told", "answer"),
    [
        ("another's key", "does not hold the key", Why.FORGED.byte),
        ("replayed nonce", "does not hold the key", Why.FORGED.byte),
        ("meant for another coordinator", "does not hold the key", Why.FORGED.byte),
        ("signed for another kind", "does not hold the key", Why.FORGED.byte),
        ("another payload", "does not hold the key", Why.FORGED.byte),
        ("another's certificate", "does not hold the key", Why.FORGED.byte),
        ("long certificate", "certificate of 65535 bytes", Why.FORGED.byte),
        ("unknown kind", "a knock of kind 9; expected 1, 2, 3", Why.FORGED.byte),
        ("key of a stranger", "is no member of that cluster", Why.UNKNOWN.byte),
        ("code where none is", "no code is open", Why.NO_CODE.byte),
        ("nothing wrong", "", b"\x06"),
    ],
)
def test_forged_knocks_are_refused(people: dict[str, Identity], case: str, told: str, answer: bytes) -> None:
    heard, end = asyncio.run(visit_with(people, lambda nonce: forged(people, nonce, case)))
    assert heard == answer
    if told:
        assert isinstance(end, Refused)
        assert told in str(end)
    else:
        assert end is None


def test_visitor_that_hangs_up_is_refused(people: dict[str, Identity]) -> None:
    async def scene() -> list[BaseException | None]:
        async with door(people["coordinator"], admitting(people)) as (port, ends):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context())
            await reader.readexactly(1 + NONCE_BYTES)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await close(writer)
        return ends

    (end,) = asyncio.run(scene())
    assert isinstance(end, NodeGone)
    assert "did not finish its introduction" in str(end)


@pytest.mark.parametrize("case", ["nobody listens", "hangs up", "speaks no TLS", "impossible name"])
def test_coordinator_that_does_not_answer_is_gone(people: dict[str, Identity], case: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if case == "speaks no TLS":
            writer.write(b"SSH-2.0-x\r\n")
        await close(writer)

    async def scene() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            if case == "nobody listens":
                server.close()
                await server.wait_closed()
            host = "a" * 70 + ".example" if case == "impossible name" else "127.0.0.1"
            with pytest.raises(NodeGone, match="no answer from the coordinator at"):
                await knock(invite(people, port, node_id=NodeId("a" * 64), hosts=(host,)), people["newcomer"])

    asyncio.run(scene())


def test_other_version_at_the_door_is_named(people: dict[str, Identity]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x07" + bytes(NONCE_BYTES))
        await writer.drain()
        await reader.read()

    async def scene() -> None:
        async with door(people["coordinator"], serve) as (port, _):
            with pytest.raises(AdmissionError, match="version 7 at its door, this program 2; install the same version"):
                await knock(invite(people, port), people["newcomer"])

    asyncio.run(scene())


def test_each_reason_has_a_byte_and_a_sentence_of_its_own() -> None:
    assert len({why.byte for why in Why}) == len({why.sentence for why in Why}) == len(Why)
    assert not {why.byte for why in Why} & {b"\x06", b"\x07"}

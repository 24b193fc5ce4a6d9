"""Who gets in, over real TLS on the loopback device."""

import asyncio
import contextlib
import secrets
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from yoke.core.errors import AdmissionError, NodeGone
from yoke.core.node import NodeId
from yoke.net.identity import Identity, admission_server_context, joining_client_context
from yoke.net.invite import SECRET_BYTES, Invite
from yoke.node.admission import NONCE_BYTES, admit, check_proof, knock, prove

PROOF_BYTES = SECRET_BYTES + 32 + 64 + 2
SECRET = bytes(range(SECRET_BYTES))
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    home: Path = tmp_path_factory.mktemp("keys")
    return {name: Identity.load_or_create(home / name) for name in ("coordinator", "newcomer", "stranger")}


@contextlib.asynccontextmanager
async def door(owner: Identity, serve: Serve) -> AsyncIterator[tuple[int, list[BaseException | None]]]:
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

    server = await asyncio.start_server(visit, "127.0.0.1", 0, ssl=admission_server_context(owner))
    async with server:
        yield server.sockets[0].getsockname()[1], ends
        await asyncio.wait_for(asyncio.gather(*visits), 5)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def visit_with(people: dict[str, Identity], proof: Callable[[bytes], bytes]) -> tuple[bytes, BaseException | None]:
    """Knock by hand with a proof made from the nonce: what is answered, and how the coordinator saw it."""
    coordinator = people["coordinator"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await admit(reader, writer, coordinator.id, SECRET)

    async with door(coordinator, serve) as (port, ends):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context())
        writer.write(proof(await reader.readexactly(NONCE_BYTES)))
        answer = await reader.read(1)
        await close(writer)
    return answer, ends[0]


def test_newcomer_with_the_invite_is_let_in_and_known_by_its_key(people: dict[str, Identity]) -> None:
    coordinator, newcomer, known = people["coordinator"], people["newcomer"], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        known.append(await admit(reader, writer, coordinator.id, SECRET))
        writer.write(b"welcome")
        await writer.drain()

    async def scene() -> bytes:
        async with door(coordinator, serve) as (port, _):
            reader, writer = await knock(Invite(node_id=coordinator.id, host="127.0.0.1", port=port, secret=SECRET), newcomer)
            heard = await reader.readexactly(7)
            await close(writer)
        return heard

    assert asyncio.run(scene()) == b"welcome"
    assert known == [(newcomer.id, newcomer.certificate_der)]


def test_wrong_secret_is_refused_to_the_newcomers_face(people: dict[str, Identity]) -> None:
    coordinator = people["coordinator"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await admit(reader, writer, coordinator.id, SECRET)

    async def scene() -> list[BaseException | None]:
        async with door(coordinator, serve) as (port, ends):
            with pytest.raises(AdmissionError, match="the coordinator refused"):
                await knock(Invite(node_id=coordinator.id, host="127.0.0.1", port=port, secret=bytes(SECRET_BYTES)), people["newcomer"])
        return ends

    (end,) = asyncio.run(scene())
    assert isinstance(end, AdmissionError)
    assert "secret is wrong" in str(end)


def test_newcomer_says_nothing_to_a_man_in_the_middle(people: dict[str, Identity]) -> None:
    """Another key answers at the invite's address: the connection ends before one byte of the invite is sent."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(secrets.token_bytes(NONCE_BYTES))
        heard.append(await reader.read())

    async def scene() -> None:
        async with door(people["stranger"], serve) as (port, _):
            with pytest.raises(AdmissionError, match=r"another node than the invite's answers.*Nothing was sent"):
                await knock(Invite(node_id=people["coordinator"].id, host="127.0.0.1", port=port, secret=SECRET), people["newcomer"])

    asyncio.run(scene())
    assert heard == [b""]


def forged(people: dict[str, Identity], nonce: bytes, case: str) -> bytes:
    coordinator, newcomer, stranger = people["coordinator"], people["newcomer"], people["stranger"]
    good = prove(newcomer, coordinator.id, nonce, SECRET)
    key_at, signature_at = SECRET_BYTES, SECRET_BYTES + 32
    match case:
        case "another's key":
            return good[:key_at] + bytes.fromhex(stranger.id) + good[signature_at:]
        case "replayed nonce":
            return prove(newcomer, coordinator.id, bytes(NONCE_BYTES), SECRET)
        case "meant for another coordinator":
            return prove(newcomer, stranger.id, nonce, SECRET)
        case "another's certificate":
            head = good[: PROOF_BYTES - 2] + struct.pack("<H", len(stranger.certificate_der))
            return head + stranger.certificate_der
        case "long certificate":
            return good[: PROOF_BYTES - 2] + struct.pack("<H", 65535)
        case "no certificate":
            return good[: PROOF_BYTES - 2] + struct.pack("<H", 9) + b"not a one"
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "told", "answer"),
    [
        ("another's key", "does not hold the key", b"\x15"),
        ("replayed nonce", "does not hold the key", b"\x15"),
        ("meant for another coordinator", "does not hold the key", b"\x15"),
        ("another's certificate", "certificate is of another key", b"\x15"),
        ("long certificate", "certificate of 65535 bytes", b"\x15"),
        ("no certificate", "did not finish its introduction", b""),
    ],
)
def test_forged_proofs_are_refused(people: dict[str, Identity], case: str, told: str, answer: bytes) -> None:
    heard, end = asyncio.run(visit_with(people, lambda nonce: forged(people, nonce, case)))
    assert isinstance(end, AdmissionError)
    assert told in str(end)
    assert heard == answer


def test_visitor_that_hangs_up_is_refused(people: dict[str, Identity]) -> None:
    coordinator = people["coordinator"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await admit(reader, writer, coordinator.id, SECRET)

    async def scene() -> list[BaseException | None]:
        async with door(coordinator, serve) as (port, ends):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=joining_client_context())
            await reader.readexactly(NONCE_BYTES)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await close(writer)
        return ends

    (end,) = asyncio.run(scene())
    assert isinstance(end, AdmissionError)


def test_proof_names_the_newcomer_and_its_certificates_length(people: dict[str, Identity]) -> None:
    nonce, coordinator, newcomer = bytes(NONCE_BYTES), people["coordinator"], people["newcomer"]
    head = prove(newcomer, coordinator.id, nonce, SECRET)[:PROOF_BYTES]
    assert check_proof(head, coordinator.id, nonce, SECRET) == (newcomer.id, len(newcomer.certificate_der))


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
                await knock(Invite(node_id=NodeId("a" * 64), host=host, port=port, secret=SECRET), people["newcomer"])

    asyncio.run(scene())

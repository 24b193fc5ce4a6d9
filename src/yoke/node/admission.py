"""What is said at the door, from both sides: one TLS connection, few short messages of fixed size before anything is parsed.

Three kinds of knock come in by the same door: with an invite's secret, with the key of a known member, and with a code of six digits. In the first two the
newcomer knows the coordinator's key and checks it before it says a word; with a code, both sides learn each other's keys. A newcomer always proves that it holds
the key that it claims, for a number that the coordinator has just drawn and for this coordinator alone, so that nothing overheard or asked for elsewhere can be
used. The bytes are in docs/protocol.md.

Does not know who may come in (a `Judge` does), how strangers are held off (`yoke.node.door`), or what a newcomer remembers (`yoke.node.joining`).
"""

import asyncio
import hashlib
import secrets
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from yoke.core.errors import AdmissionError, NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.identity import MAX_CERTIFICATE_BYTES, Identity, certificate_id, joining_client_context, verify
from yoke.net.invite import DOOR_VERSION, SECRET_BYTES, Invite
from yoke.net.pairing import CONFIRMATION_BYTES, MESSAGE_BYTES, Code, Exchange, check_confirmation
from yoke.node.roster import Applicant, Refused, Why

NONCE_BYTES = 32
PAYLOAD_BYTES = 32
ADMISSION_S = 10.0
"""From the first byte of TLS to the last word of an introduction."""

MAX_STREAM_BYTES = 1 << 20

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_HELLO = struct.Struct(f"<B{NONCE_BYTES}s")
_KNOCK = struct.Struct(f"<B32s64s{PAYLOAD_BYTES}sH")  # kind, public key, signature, payload, length of the certificate that follows
_ACCEPTED, _GO_ON = b"\x06", b"\x07"
_CONTEXT = b"yoke admission 2"
_REFUSALS = {why.byte: why for why in Why}
_UNANSWERED = (TimeoutError, asyncio.IncompleteReadError, OSError, RemoteProtocolError, UnicodeError)
"""What it looks like when nobody fit to talk to is there; UnicodeError is a host's name that no resolver can ask for."""


class Kind(IntEnum):
    """How a newcomer wants to be let in; and what its payload is."""

    SECRET = 1
    """The invite's secret, and zeros."""

    KEY = 2
    """Zeros: the key that every newcomer proves is enough."""

    CODE = 3
    """The pairing message."""


class Judge(Protocol):
    """Who may come in, and with what."""

    def is_member(self, node: NodeId) -> bool:
        """Whether this key belongs to the cluster."""

    def is_connected(self, node: NodeId) -> bool:
        """Whether a node with this key is here already."""

    def may_guess(self) -> bool:
        """Whether secrets and codes are looked at now."""

    def admit(self, applicant: Applicant, secret: bytes | None) -> None:
        """Let a member in, or whoever knows an invite's ``secret``; raises `Refused`."""

    def begin_code(self) -> Code | None:
        """The code for one exchange, if one is open: the try counts."""

    def admit_by_code(self, applicant: Applicant, code: Code) -> None:
        """Let in who has shown the code, and use it up; raises `Refused`."""


@dataclass(frozen=True, slots=True)
class Host:
    """The coordinator as it shows itself."""

    id: NodeId
    certificate: bytes


# The coordinator's side


async def hear(stream: Stream, host: Host, judge: Judge) -> Applicant:
    """Hear a knock out, on a fresh TLS connection: who was let in. The caller sets the deadline, and closes the connection if this raises.

    Raises
    ------
    Refused
        if it may not come in; it has been told why.
    NodeGone
        if it did not finish its introduction.
    """
    reader, writer = stream
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        writer.write(_HELLO.pack(DOOR_VERSION, nonce))
        head = await reader.readexactly(_KNOCK.size)
        n_bytes = _KNOCK.unpack(head)[4]
        if n_bytes > MAX_CERTIFICATE_BYTES:
            raise Refused(Why.FORGED, f"a certificate of {n_bytes} bytes; expected at most {MAX_CERTIFICATE_BYTES}")
        certificate = await reader.readexactly(n_bytes)
        kind, payload, applicant = _check_knock(head, certificate, nonce, host.id, _address(writer))
        answer = _ACCEPTED
        if judge.is_connected(applicant.id):
            raise Refused(Why.CONNECTED)
        if kind is not Kind.KEY and not judge.is_member(applicant.id) and not judge.may_guess():
            raise Refused(Why.BUSY)
        if kind is Kind.CODE:
            answer += await _hear_code(stream, host, judge, applicant, payload, nonce)
        else:
            judge.admit(applicant, payload[:SECRET_BYTES] if kind is Kind.SECRET else None)
        writer.write(answer)
        await writer.drain()
    except Refused as refused:
        writer.write(refused.why.byte)
        raise
    except (asyncio.IncompleteReadError, OSError) as error:
        raise NodeGone(f"the newcomer did not finish its introduction: {error}") from error
    return applicant


async def _hear_code(stream: Stream, host: Host, judge: Judge, applicant: Applicant, message: bytes, nonce: bytes) -> bytes:
    """What proves to a newcomer with the right code that this is the machine that shows it."""
    reader, writer = stream
    code = judge.begin_code()
    if code is None:
        raise Refused(Why.NO_CODE)
    exchange = Exchange(code.digits, applicant.id, host.id, is_host=True)
    try:
        shown, expected = exchange.finish(message, _seen(nonce, host.certificate, applicant.certificate))
    except RemoteProtocolError as error:
        raise Refused(Why.FORGED, str(error)) from error
    writer.write(_GO_ON + exchange.message)
    try:
        check_confirmation(await reader.readexactly(CONFIRMATION_BYTES), expected)
    except AdmissionError as error:
        raise Refused(Why.WRONG_CODE, "the newcomer does not know the code") from error
    judge.admit_by_code(applicant, code)
    return shown


def _check_knock(head: bytes, certificate: bytes, nonce: bytes, host: NodeId, address: str) -> tuple[Kind, bytes, Applicant]:
    """What is wanted, with what, and by whom: it holds the key that it claims. The certificate is bytes still."""
    kind, key, signature, payload, _ = _KNOCK.unpack(head)
    newcomer = NodeId(key.hex())
    if not verify(newcomer, signature, _signed(kind, nonce, host, newcomer, payload, certificate)):
        raise Refused(Why.FORGED, "the newcomer does not hold the key that it shows")
    try:
        return Kind(kind), payload, Applicant(id=newcomer, certificate=certificate, host=address)
    except ValueError as error:
        raise Refused(Why.FORGED, f"a knock of kind {kind}; expected {', '.join(f'{known:d}' for known in Kind)}") from error


# The newcomer's side


async def knock(invite: Invite, identity: Identity) -> Stream:
    """A control connection to the coordinator of an invite.

    Raises
    ------
    NodeGone
        if nobody answers there.
    AdmissionError
        if another node answers, or the coordinator refuses (`Refused`).
    """
    _, stream = await _knock(invite.hosts, invite.port, invite.node_id, _Said(identity, Kind.SECRET, invite.secret))
    return stream


async def knock_with_key(hosts: tuple[str, ...], port: int, coordinator: NodeId, identity: Identity) -> Stream:
    """A control connection to the coordinator of the cluster that this machine is a member of.

    Raises
    ------
    NodeGone
        if that node does not answer there; another one may, since addresses change hands.
    Refused
        if it does not know this machine (any more), or it is there already.
    """
    try:
        _, stream = await _knock(hosts, port, coordinator, _Said(identity, Kind.KEY))
    except Refused:
        raise
    except AdmissionError as error:
        raise NodeGone(str(error)) from error
    return stream


async def knock_with_code(hosts: tuple[str, ...], port: int, digits: str, identity: Identity) -> tuple[NodeId, Stream]:
    """A control connection to the machine that shows this code, and its key, which is certain from now on.

    Raises
    ------
    NodeGone
        if nobody answers there.
    AdmissionError
        if the code is wrong or none is open there, or another machine is in between.
    """
    return await _knock(hosts, port, None, _Said(identity, Kind.CODE, digits=digits))


@dataclass(frozen=True, slots=True)
class _Said:
    """What a newcomer says of itself."""

    identity: Identity
    kind: Kind
    secret: bytes = b""
    digits: str = ""

    def knock(self, payload: bytes, nonce: bytes, host: NodeId) -> bytes:
        """The bytes that answer the coordinator's nonce."""
        own, payload = self.identity, payload.ljust(PAYLOAD_BYTES, b"\0")
        signature = own.sign(_signed(self.kind, nonce, host, own.id, payload, own.certificate_der))
        return _KNOCK.pack(self.kind, bytes.fromhex(own.id), signature, payload, len(own.certificate_der)) + own.certificate_der


async def _knock(hosts: tuple[str, ...], port: int, expected: NodeId | None, said: _Said) -> tuple[NodeId, Stream]:
    """Knock at whichever of the addresses the right node answers first."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(ADMISSION_S):
            host, (reader, writer) = await _reach(hosts, port, expected)
            await _say(host, (reader, writer), said)
    except BaseException as error:
        if writer is not None:
            writer.close()
        if not isinstance(error, _UNANSWERED):
            raise
        where, why = f"{' or '.join(hosts)} port {port}", str(error) or ("timed out" if isinstance(error, TimeoutError) else "it hung up")
        raise NodeGone(f"no answer from the coordinator at {where}: {why}; is it running, and reachable?") from error
    return host.id, (reader, writer)


async def _say(host: Host, stream: Stream, said: _Said) -> None:
    reader, writer = stream
    version = (await reader.readexactly(1))[0]
    if version != DOOR_VERSION:
        raise AdmissionError(
            f"the other machine speaks version {version} at its door, this program {DOOR_VERSION}; install the same version of Yoke on both machines"
        )
    nonce = await reader.readexactly(NONCE_BYTES)
    exchange = Exchange(said.digits, said.identity.id, host.id, is_host=False) if said.kind is Kind.CODE else None
    writer.write(said.knock(said.secret if exchange is None else exchange.message, nonce, host.id))
    answer = await reader.readexactly(1)
    if exchange is not None and answer == _GO_ON:
        message = await reader.readexactly(MESSAGE_BYTES)
        shown, expected = exchange.finish(message, _seen(nonce, host.certificate, said.identity.certificate_der))
        writer.write(shown)
        answer = await reader.readexactly(1)
        if answer == _ACCEPTED:
            check_confirmation(await reader.readexactly(CONFIRMATION_BYTES), expected)
            return
    elif exchange is not None and answer == _ACCEPTED:
        raise AdmissionError("the other machine let this one in without the code, so it is not the one that shows it; somebody may be in between")
    if answer != _ACCEPTED:
        why = _REFUSALS.get(answer, Why.FORGED)
        raise Refused(why, f"the coordinator refused: {why.sentence}")


async def _reach(hosts: tuple[str, ...], port: int, expected: NodeId | None) -> tuple[Host, Stream]:
    """The first of ``hosts`` at which the ``expected`` node answers, or any if None. All are tried at once, and told nothing."""
    dials = {asyncio.ensure_future(_dial(host, port, expected)) for host in hosts}
    found: list[tuple[Host, Stream]] = []
    failures: list[BaseException] = []
    try:
        while dials and not found:
            done, _ = await asyncio.wait(dials, return_when=asyncio.FIRST_COMPLETED)
            dials -= done
            for dial in done:
                if (failure := dial.exception()) is None:
                    found.append(dial.result())
                else:
                    failures.append(failure)
    finally:
        for dial in dials:
            dial.cancel()
        late = await asyncio.gather(*dials, return_exceptions=True)
        for other in (*found[1:], *late):
            if not isinstance(other, BaseException):
                other[1][1].close()
    if found:
        return found[0]
    raise next((failure for failure in failures if isinstance(failure, AdmissionError)), failures[0])


async def _dial(host: str, port: int, expected: NodeId | None) -> tuple[Host, Stream]:
    reader, writer = await asyncio.open_connection(host, port, ssl=joining_client_context(), limit=MAX_STREAM_BYTES)
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
        node = certificate_id(certificate)
        if expected is not None and node != expected:
            raise AdmissionError(f"another node than the invite's answers at {host} port {port}: somebody may be in between. Nothing was sent")
    except BaseException:
        writer.close()
        raise
    return Host(node, certificate), (reader, writer)


# Both sides


def _signed(kind: int, nonce: bytes, host: NodeId, newcomer: NodeId, payload: bytes, certificate: bytes) -> bytes:
    """What a newcomer signs: this knock, now, at this door. All parts have fixed sizes."""
    return _CONTEXT + bytes((kind,)) + nonce + bytes.fromhex(host) + bytes.fromhex(newcomer) + payload + hashlib.sha256(certificate).digest()


def _seen(nonce: bytes, host_certificate: bytes, newcomer_certificate: bytes) -> bytes:
    """What both sides of a pairing must have seen alike.

    TLS 1.3 proves the key of the coordinator's certificate over the whole handshake, so that the certificate stands for the connection (Python's ssl gives no
    exporter).
    """
    return nonce + hashlib.sha256(host_certificate).digest() + hashlib.sha256(newcomer_certificate).digest()


def _address(writer: asyncio.StreamWriter) -> str:
    return str((writer.get_extra_info("peername") or ("unknown",))[0])

"""How a machine with an invite becomes a member: one TLS connection, four short messages of fixed size before anything is parsed.

The newcomer checks the coordinator's key against the invite before it says a word. It then proves that it holds the invite's secret and the key that it
claims, bound to a number that the coordinator has just drawn, so that nothing overheard can be used again.
"""

import asyncio
import hmac
import secrets
import struct
from collections.abc import Container

from yoke.core.errors import AdmissionError, NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.identity import MAX_CERTIFICATE_BYTES, Identity, certificate_id, joining_client_context, verify
from yoke.net.invite import SECRET_BYTES, Invite

NONCE_BYTES = 32
ADMISSION_S = 10.0
MAX_STREAM_BYTES = 1 << 20
_ACCEPTED, _REFUSED, _KNOWN = b"\x06", b"\x15", b"\x16"
_PROOF = struct.Struct(f"<{SECRET_BYTES}s32s64sH")  # secret, public key, signature, length of the certificate that follows
_CONTEXT = b"yoke admission 1"
_UNANSWERED = (TimeoutError, asyncio.IncompleteReadError, OSError, RemoteProtocolError, UnicodeError)
"""What it looks like when nobody fit to talk to is there; UnicodeError is a host's name that no resolver can ask for."""


def prove(identity: Identity, coordinator: NodeId, nonce: bytes, secret: bytes) -> bytes:
    """The newcomer's answer to the coordinator's ``nonce``."""
    signature = identity.sign(_CONTEXT + nonce + bytes.fromhex(coordinator))
    return _PROOF.pack(secret, bytes.fromhex(identity.id), signature, len(identity.certificate_der)) + identity.certificate_der


def check_proof(head: bytes, coordinator: NodeId, nonce: bytes, secret: bytes) -> tuple[NodeId, int]:
    """Who knocks, and the length of the certificate that follows.

    Raises
    ------
    AdmissionError
        if the secret is wrong, the key is not the knocker's, or the certificate is too long.
    """
    given, key, signature, certificate_bytes = _PROOF.unpack(head)
    if not hmac.compare_digest(given, secret):
        raise AdmissionError("the invite's secret is wrong")
    newcomer = NodeId(key.hex())
    if not verify(newcomer, signature, _CONTEXT + nonce + bytes.fromhex(coordinator)):
        raise AdmissionError("the newcomer does not hold the key that it shows")
    if certificate_bytes > MAX_CERTIFICATE_BYTES:
        raise AdmissionError(f"a certificate of {certificate_bytes} bytes; expected at most {MAX_CERTIFICATE_BYTES}")
    return newcomer, certificate_bytes


async def admit(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, coordinator: NodeId, secret: bytes, members: Container[NodeId] = ()
) -> tuple[NodeId, bytes]:
    """The coordinator's side, on a fresh TLS connection: the newcomer's id and certificate.

    Raises
    ------
    AdmissionError
        if it was not invited, in `ADMISSION_S` seconds, or is one of the ``members`` already.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        async with asyncio.timeout(ADMISSION_S):
            writer.write(nonce)
            newcomer, certificate_bytes = check_proof(await reader.readexactly(_PROOF.size), coordinator, nonce, secret)
            certificate = await reader.readexactly(certificate_bytes)
            if certificate_id(certificate) != newcomer:
                raise AdmissionError("the newcomer's certificate is of another key")
            if newcomer in members:
                writer.write(_KNOWN)
                await writer.drain()
                raise AdmissionError("the newcomer is a member already")
            writer.write(_ACCEPTED)
            await writer.drain()
    except (TimeoutError, asyncio.IncompleteReadError, OSError, RemoteProtocolError) as error:
        raise AdmissionError(f"the newcomer did not finish its introduction: {error}") from error
    except AdmissionError:
        writer.write(_REFUSED)
        raise
    return newcomer, certificate


async def knock(invite: Invite, identity: Identity) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The newcomer's side: a control connection to the coordinator of the invite.

    Raises
    ------
    NodeGone
        if nobody answers there.
    AdmissionError
        if another node answers, or the coordinator refuses.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(ADMISSION_S):
            connection = asyncio.open_connection(invite.host, invite.port, ssl=joining_client_context(), limit=MAX_STREAM_BYTES)
            reader, writer = await connection
            certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
            if certificate_id(certificate) != invite.node_id:
                raise AdmissionError(
                    f"another node than the invite's answers at {invite.host} port {invite.port}: somebody may be in between. Nothing was sent"
                )
            writer.write(prove(identity, invite.node_id, await reader.readexactly(NONCE_BYTES), invite.secret))
            answer = await reader.readexactly(1)
            if answer == _KNOWN:
                raise AdmissionError(
                    "a node with this machine's key is in the cluster already; for two nodes on one machine, give each a directory of its own with --state-dir"
                )
            if answer != _ACCEPTED:
                raise AdmissionError("the coordinator refused: the invite is not valid (any more); ask for a new one")
    except BaseException as error:
        if writer is not None:
            writer.close()
        if not isinstance(error, _UNANSWERED):
            raise
        raise NodeGone(f"no answer from the coordinator at {invite.host} port {invite.port}: {error or 'timed out'}; is it running, and reachable?") from error
    return reader, writer

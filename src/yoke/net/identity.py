"""Who a node is: one ed25519 key, its certificate, and the TLS settings that trust exactly the members' keys. Opens no connection.

A node's id is its public key. There is no authority: every node signs its own certificate, and a member's certificate is trusted because it is in the
membership list. Certificates say ``CA: false``, so that no member can vouch for another key.
"""

import contextlib
import datetime as dt
import os
import secrets
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from yoke.core.errors import RemoteProtocolError, SettingError
from yoke.core.node import NodeId

MAX_CERTIFICATE_BYTES = 2048
"""Ours take about 430 bytes; a longer one is not parsed."""

_FILE_NAME = "node.pem"
# Everything but the key is fixed, so that a key has one certificate. Home machines have wrong clocks: validity is no part of the trust.
_SERIAL = 1
_NOT_BEFORE = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)

_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h), which Python does not name: a key is a member or not, whatever the time is thought to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A node's key and what follows from it. ``pem_path`` holds both key and certificate, readable by the owner alone."""

    id: NodeId
    certificate_der: bytes
    pem_path: Path
    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def load_or_create(cls, directory: Path) -> "Identity":
        """The identity kept in ``directory``; made at the first call, also when several processes make that call at once.

        Raises
        ------
        SettingError
            if the file is broken, others may read it, or the directory cannot be written.
        """
        path = directory / _FILE_NAME
        try:
            if not path.exists():
                _create(path)
            return cls._load(path)
        except OSError as error:
            raise SettingError(f"cannot keep this node's key in {path}: {error}") from error

    @classmethod
    def _load(cls, path: Path) -> "Identity":
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise SettingError(f"others may read this node's key in {path}; run: chmod 600 {path}")
        pem = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(pem, password=None)
            certificate = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingError(f"{path} does not hold a node's key and certificate; move it away and this node gets a new identity") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise SettingError(f"{path} holds a key of another kind than ed25519; move it away and this node gets a new identity")
        der = certificate.public_bytes(serialization.Encoding.DER)
        return cls(id=NodeId(key.public_key().public_bytes_raw().hex()), certificate_der=der, pem_path=path, _key=key)

    def sign(self, message: bytes) -> bytes:
        """The ed25519 signature of ``message``: 64 bytes."""
        return self._key.sign(message)


def verify(node_id: NodeId, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` is that of node ``node_id`` under ``message``. False also for what is no id or no signature."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(node_id)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def certificate_id(der: bytes) -> NodeId:
    """The node whose self-signed certificate ``der`` is.

    Raises
    ------
    RemoteProtocolError
        if it is too long, no certificate, not of an ed25519 key, not signed by that key, or a certificate authority's.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise RemoteProtocolError(f"a certificate of {len(der)} bytes; expected at most {MAX_CERTIFICATE_BYTES}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not isinstance(key, Ed25519PublicKey) or constraints.ca:
            raise RemoteProtocolError("a certificate that is not a node's: expected an ed25519 key and no certificate authority")
        key.verify(certificate.signature, certificate.tbs_certificate_bytes)
    except (
        ValueError,
        TypeError,
        KeyError,
        UnsupportedAlgorithm,
        InvalidSignature,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.InvalidVersion,
    ) as error:
        raise RemoteProtocolError(f"bytes that are no node's certificate: {error}") from error
    return NodeId(key.public_bytes_raw().hex())


def server_context(identity: Identity, members: Iterable[bytes]) -> ssl.SSLContext:
    """TLS for accepting connections from ``members`` (their certificates, DER) and no one else."""
    context = _member_context(ssl.PROTOCOL_TLS_SERVER, identity, members)
    context.num_tickets = 0  # nobody resumes, and a ticket would be bytes that the client has to read
    return context


def client_context(identity: Identity, members: Iterable[bytes]) -> ssl.SSLContext:
    """TLS for connecting to ``members`` (their certificates, DER). The caller still compares the peer's id with the one it wanted."""
    return _member_context(ssl.PROTOCOL_TLS_CLIENT, identity, members)


def joining_client_context() -> ssl.SSLContext:
    """TLS for a machine that knows of its host only the id in the invite.

    Nothing is verified here: the caller must compare `certificate_id` of the peer's certificate with that id before it sends anything.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def admission_server_context(identity: Identity) -> ssl.SSLContext:
    """TLS for the one port that strangers may knock at: proves this node's key, asks for none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(identity.pem_path)
    return context


def _member_context(protocol: int, identity: Identity, members: Iterable[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a node is its key, whatever its address
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= _NO_CHECK_TIME
    context.load_cert_chain(identity.pem_path)
    trusted = b"".join(members)
    if trusted:  # an empty store trusts nobody, which is right for an empty list, but OpenSSL refuses to load it
        context.load_verify_locations(cadata=trusted)
    return context


def _create(path: Path) -> None:
    """Write a new key and its certificate, whole or not at all; the first of several processes wins."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem += _certificate(key).public_bytes(serialization.Encoding.PEM)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, fails if another process was first
    finally:
        draft.unlink()


def _certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, key.public_key().public_bytes_raw().hex())])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=key.public_key(), serial_number=_SERIAL)
    builder = builder.not_valid_before(_NOT_BEFORE).not_valid_after(_NOT_AFTER)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True).add_extension(usage, critical=True)
    return builder.sign(key, algorithm=None)

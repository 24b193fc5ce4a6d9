"""The one line that lets a machine into a cluster: where to knock, whose key must answer, and a secret to show. Knows no socket."""

import base64
import binascii
import ipaddress
import re
import struct
from dataclasses import dataclass

from yoke.core.errors import UserError
from yoke.core.node import NodeId

SECRET_BYTES = 10

MAX_HOSTS = 8
"""A machine with more addresses than that names the first ones."""

VERSION = 2

DOOR_VERSION = 2
"""The version of what is said where an invite leads to (`yoke.node.admission`)."""

_PREFIX = f"yoke{VERSION}-"
_COMMAND = re.compile(r"\Ayoke\s+join\s+", re.IGNORECASE)
_ANY_PREFIX = re.compile(r"yoke(\d{1,3})-", re.ASCII)
# version, public key, port, secret, number of hosts; the hosts follow, then a checksum.
_FIXED = struct.Struct(f"<B32sH{SECRET_BYTES}sB")
_CHECKSUM = struct.Struct("<H")
_MAX_NAME_BYTES = 255
_NAME, _IPV4, _IPV6 = 0, 4, 6  # how a host is written: a name's length and its UTF-8, 4 bytes, 16 bytes
_ADDRESS_BYTES = {_IPV4: 4, _IPV6: 16}
_MAX_BYTES = _FIXED.size + MAX_HOSTS * (2 + _MAX_NAME_BYTES) + _CHECKSUM.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """An invitation by node ``node_id``, which answers at ``port`` of one of its ``hosts``. ``secret`` is 10 bytes.

    ``hosts`` are names and addresses, at least one; a machine on several networks has several.
    """

    node_id: NodeId
    hosts: tuple[str, ...]
    port: int
    secret: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", tuple(dict.fromkeys(map(_plain, self.hosts))))
        check_place(self.node_id, self.hosts, self.port)
        if len(self.secret) != SECRET_BYTES:
            raise UserError(f"an invite with a secret of {len(self.secret)} bytes; expected {SECRET_BYTES}")

    def encode(self) -> str:
        """The invite as text: ``yoke2-`` and lower-case base32, about 90 characters and 8 more for each further IPv4 address."""
        data = _FIXED.pack(VERSION, bytes.fromhex(self.node_id), self.port, self.secret, len(self.hosts)) + b"".join(map(_packed, self.hosts))
        return _PREFIX + _base32(data + _CHECKSUM.pack(_checksum(data)))

    @classmethod
    def decode(cls, text: str) -> "Invite":
        """Read an invite; space around it, capital letters, and the ``yoke join`` before it do no harm.

        Raises
        ------
        UserError
            if the text is no invite, is incomplete, was mistyped, or is of another version.
        """
        text = _COMMAND.sub("", text.strip(), count=1)
        if not text.isascii() or (prefix := _ANY_PREFIX.match(text.lower())) is None:
            raise UserError(f"this is not an invite: an invite starts with {_PREFIX}; copy the whole line that the other machine printed")
        if int(prefix[1]) != VERSION:
            raise _other_version(int(prefix[1]))
        code = text.lower()[prefix.end() :]
        if len(code) > 2 * _MAX_BYTES:
            raise _mistyped()
        try:
            raw = base64.b32decode(code.upper() + "=" * (-len(code) % 8))
        except binascii.Error as error:
            raise _mistyped() from error
        data, checksum = raw[: -_CHECKSUM.size], raw[-_CHECKSUM.size :]
        # The comparison with the canonical text catches a last character whose surplus bits are set: they are in no byte, so in no checksum.
        if len(data) <= _FIXED.size or _CHECKSUM.pack(_checksum(data)) != checksum or _base32(raw) != code:
            raise _mistyped()
        version, key, port, secret, n_hosts = _FIXED.unpack_from(data)
        if version != VERSION:
            raise _other_version(version)
        return cls(node_id=NodeId(key.hex()), hosts=_unpacked(data[_FIXED.size :], n_hosts), port=port, secret=secret)


def check_place(node_id: str, hosts: tuple[str, ...], port: int) -> None:
    """Whether this can be a node and where it answers.

    Raises
    ------
    UserError
        naming what cannot.
    """
    if len(node_id) != 64 or any(c not in "0123456789abcdef" for c in node_id):
        raise UserError(f"an invite of node {node_id!r}; expected 64 hexadecimal digits")
    if not 0 < port < 1 << 16:
        raise UserError(f"an invite with port {port}; expected 1 to 65535")
    if not 0 < len(hosts) <= MAX_HOSTS:
        raise UserError(f"an invite with {len(hosts)} hosts; expected 1 to {MAX_HOSTS}")
    for host in hosts:
        if not _is_host(host):
            raise UserError(f"an invite with host {host!r}; expected a name or address without spaces or a zone, of at most {_MAX_NAME_BYTES} bytes")


def _plain(host: str) -> str:
    """An address as it is usually written, so that equal ones are equal; a name as it is."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _packed(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode()
        return bytes((_NAME, len(name))) + name
    return bytes((_IPV4 if address.version == 4 else _IPV6,)) + address.packed


def _unpacked(data: bytes, n_hosts: int) -> tuple[str, ...]:
    """So many hosts, and not a byte more."""
    hosts = []
    try:
        for _ in range(n_hosts):
            kind = data[0]
            start, n_bytes = (2, data[1]) if kind == _NAME else (1, _ADDRESS_BYTES[kind])
            packed, data = data[start : start + n_bytes], data[start + n_bytes :]
            if len(packed) < n_bytes:
                raise _mistyped()
            hosts.append(packed.decode() if kind == _NAME else str(ipaddress.ip_address(packed)))
    except (LookupError, ValueError) as error:
        raise _mistyped() from error
    if data:
        raise _mistyped()
    return tuple(hosts)


def _is_host(host: str) -> bool:
    if not host or not host.isprintable() or any(c.isspace() or c == "%" for c in host):  # a zone (%eth0) means nothing on another machine
        return False
    return len(host.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def _mistyped() -> UserError:
    return UserError("this invite was mistyped or cut off; copy the whole line that the other machine printed")


def _other_version(version: int) -> UserError:
    return UserError(f"this invite is of version {version}, this program knows {VERSION}; install the same version of Yoke on both machines and make a new one")


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _checksum(data: bytes) -> int:
    """CRC-16 with the CCITT polynomial: finds every burst of up to 16 bits, so every single wrong character."""
    return binascii.crc_hqx(data, 0xFFFF)

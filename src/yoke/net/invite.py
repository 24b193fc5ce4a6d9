"""The one line that lets a machine into a cluster: where to knock, whose key must answer, and a secret to show. Knows no socket."""

import base64
import binascii
import struct
from dataclasses import dataclass

from yoke.core.errors import UserError
from yoke.core.node import NodeId

SECRET_BYTES = 10

_PREFIX = "yoke1-"
_VERSION = 1
# version, public key, port, secret; the host's name follows, then a checksum.
_FIXED = struct.Struct(f"<B32sH{SECRET_BYTES}s")
_CHECKSUM = struct.Struct("<H")
_MAX_HOST_BYTES = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """An invitation by node ``node_id``, which answers at ``host`` and ``port``. ``secret`` is 10 bytes, good for whom it was made."""

    node_id: NodeId
    host: str
    port: int
    secret: bytes

    def __post_init__(self) -> None:
        if len(self.node_id) != 64 or any(c not in "0123456789abcdef" for c in self.node_id):
            raise UserError(f"an invite of node {self.node_id!r}; expected 64 hexadecimal digits")
        if not 0 < self.port < 1 << 16:
            raise UserError(f"an invite with port {self.port}; expected 1 to 65535")
        if len(self.secret) != SECRET_BYTES:
            raise UserError(f"an invite with a secret of {len(self.secret)} bytes; expected {SECRET_BYTES}")
        if not _is_host(self.host):
            raise UserError(f"an invite with host {self.host!r}; expected a name or address without spaces, of at most {_MAX_HOST_BYTES} bytes")

    def encode(self) -> str:
        """The invite as text: ``yoke1-`` and lower-case base32, about 90 characters."""
        data = _FIXED.pack(_VERSION, bytes.fromhex(self.node_id), self.port, self.secret) + self.host.encode()
        return _PREFIX + _base32(data + _CHECKSUM.pack(_checksum(data)))

    @classmethod
    def decode(cls, text: str) -> "Invite":
        """Read an invite; space around it and capital letters do no harm.

        Raises
        ------
        UserError
            if the text is no invite, is incomplete, or was mistyped.
        """
        text = text.strip()
        if not text.isascii() or not text.lower().startswith(_PREFIX):
            raise UserError(f"this is not an invite: an invite starts with {_PREFIX}; copy the whole line that the other machine printed")
        code = text.lower()[len(_PREFIX) :]
        mistyped = UserError("this invite was mistyped or cut off; copy the whole line that the other machine printed")
        if len(code) > 2 * (_FIXED.size + _MAX_HOST_BYTES + _CHECKSUM.size):
            raise mistyped
        try:
            raw = base64.b32decode(code.upper() + "=" * (-len(code) % 8))
        except binascii.Error as error:
            raise mistyped from error
        data, checksum = raw[: -_CHECKSUM.size], raw[-_CHECKSUM.size :]
        # The comparison with the canonical text catches a last character whose surplus bits are set: they are in no byte, so in no checksum.
        if len(data) <= _FIXED.size or _CHECKSUM.pack(_checksum(data)) != checksum or _base32(raw) != code:
            raise mistyped
        version, key, port, secret = _FIXED.unpack_from(data)
        if version != _VERSION:
            raise UserError(f"this invite is of version {version}, this program knows {_VERSION}; install the same version of Yoke on both machines")
        try:
            host = data[_FIXED.size :].decode()
        except UnicodeDecodeError as error:
            raise mistyped from error
        return cls(node_id=NodeId(key.hex()), host=host, port=port, secret=secret)


def _is_host(host: str) -> bool:
    if not host or not host.isprintable() or any(c.isspace() for c in host):
        return False
    return len(host.encode("utf-8", "replace")) <= _MAX_HOST_BYTES


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _checksum(data: bytes) -> int:
    """CRC-16 with the CCITT polynomial: finds every burst of up to 16 bits, so every single wrong character."""
    return binascii.crc_hqx(data, 0xFFFF)

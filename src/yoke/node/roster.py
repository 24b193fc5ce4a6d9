"""Who belongs to the cluster and who may come: members, those that were removed, and open invites. Decides: a value in, a value out, the time an argument.

Knows no file (`yoke.node.membership` keeps one), no socket, and not who is connected now.

A removed machine is refused whatever it shows, until it is invited anew: a removal also ends all invites that are open, since the removed machine may know
them. So an invite that is open now was made after every removal, and lets a removed machine in again.
"""

import hashlib
import hmac
import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, Self

import msgspec
from msgspec.structs import replace

from yoke.core.errors import AdmissionError, RemoteProtocolError, RequestError
from yoke.core.node import NodeId
from yoke.net.identity import MAX_CERTIFICATE_BYTES, certificate_id

MAX_MEMBERS = 256
MAX_INVITES = 64
MAX_REMOVED = 256
"""Removed machines remembered by name. One that is forgotten is still refused: it is no member."""

MAX_NAME_CHARS = 40
MAX_USES = 1000
MAX_VALID_S = 366 * 86400.0

_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")


class Why(Enum):
    """Why a knock is refused, as the newcomer is told: its byte on the wire, and the sentence that the newcomer's program makes of it."""

    NOT_INVITED = (0x15, "the invite is not valid (any more): it was used up, withdrawn, or is too old; ask for a new one")
    CONNECTED = (
        0x16,
        "a node with this machine's key is in the cluster already; for two nodes on one machine, give each a directory of its own with --state-dir",
    )
    UNKNOWN = (0x17, "this machine is no member of that cluster; join it with an invite or a code")
    REMOVED = (0x18, "this machine was removed from the cluster; it takes a new invite or a new code to come back")
    NO_CODE = (0x19, "no code is open there (any more): it was used, tried too often, or is too old; ask for a new one on the first machine")
    WRONG_CODE = (0x1A, "the code is not the one that the first machine shows; type it again, or ask for a new one there")
    BUSY = (0x1B, "there were too many wrong tries just now; wait a minute and try again")
    FULL = (0x1C, f"the cluster has {MAX_MEMBERS} members, which is as many as it can have; remove one that is not needed any more")
    FORGED = (0x1D, "the introduction was not right: another machine may be in between, or the two have different versions of Yoke")

    @property
    def byte(self) -> bytes:
        """On the wire."""
        return bytes((self.value[0],))

    @property
    def sentence(self) -> str:
        """For people."""
        return self.value[1]


class Refused(AdmissionError):
    """A knock is refused, and the newcomer is told ``why``."""

    def __init__(self, why: Why, detail: str = "") -> None:
        super().__init__(detail or why.sentence)
        self.why = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """Who has proved that it holds the key ``id``; ``host`` is the address that it knocked from."""

    id: NodeId
    certificate: bytes
    host: str


Id = Annotated[NodeId, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS + 8, pattern=r"\A[\w.-]+\Z")]
Host = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Moment = Annotated[float, msgspec.Meta(ge=0)]


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine that belongs to the cluster, here or not. ``joined_at`` is seconds since the epoch, ``host`` the last address that it knocked from.

    ``name`` is its own among all members; ``wanted`` is what it calls itself, empty until it has said so. One that is not ``is_lasting`` is a member for as long
    as the coordinator runs.
    """

    id: Id
    name: Name
    wanted: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
    certificate: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]
    joined_at: Moment
    host: Host
    is_lasting: bool = True


class Removed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine that was put out."""

    id: Id
    name: Name
    removed_at: Moment


class OpenInvite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An invite as its maker remembers it: not the secret, but what the secret is recognised by."""

    secret_hash: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    label: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
    expires_at: Moment
    uses_left: Annotated[int, msgspec.Meta(ge=1, le=MAX_USES)]
    is_lasting: bool = True


class Roster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who belongs to the cluster, and who may come. ``port`` is where its machines knocked last. Times are seconds since the epoch."""

    version: Literal[1] = 1
    port: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] = 0
    members: Annotated[tuple[Member, ...], msgspec.Meta(max_length=MAX_MEMBERS)] = ()
    removed: Annotated[tuple[Removed, ...], msgspec.Meta(max_length=MAX_REMOVED)] = ()
    invites: Annotated[tuple[OpenInvite, ...], msgspec.Meta(max_length=MAX_INVITES)] = ()

    def __post_init__(self) -> None:
        for what, found in (("keys", [member.id for member in self.members]), ("names", [member.name.casefold() for member in self.members])):
            if len(set(found)) < len(found):
                raise ValueError(f"two members with equal {what}")

    @property
    def lasting(self) -> Self:
        """Of this what is written down."""
        return replace(
            self,
            members=tuple(member for member in self.members if member.is_lasting),
            invites=tuple(invite for invite in self.invites if invite.is_lasting),
        )

    def with_passing(self, other: "Roster") -> Self:
        """The roster, and of the ``other`` what does not last."""
        roster = replace(self, invites=self.invites + tuple(invite for invite in other.invites if not invite.is_lasting))
        for member in other.members:
            if not member.is_lasting and roster.member(member.id) is None:
                roster = replace(roster, members=(*roster.members, replace(member, name=roster._free(member.name, member.id, ""))))
        return roster

    def member(self, node: NodeId) -> Member | None:
        """The member with this key."""
        return next((member for member in self.members if member.id == node), None)

    def invited(self, secret: bytes, *, uses: int, expires_at: float, now: float, label: str = "", is_lasting: bool = True) -> Self:
        """With an invite more. One with the same label, if it has one, is replaced.

        Raises
        ------
        RequestError
            if there are too many.
        """
        invites = tuple(invite for invite in self.invites if invite.expires_at > now and not (label and invite.label == label))
        if len(invites) >= MAX_INVITES:
            raise RequestError(f"{len(invites)} invites are open; wait until one is used or too old, or remove a machine, which ends them all", status=409)
        new = OpenInvite(secret_hash=_hash(secret), label=label, expires_at=expires_at, uses_left=uses, is_lasting=is_lasting)
        return replace(self, invites=(*invites, new))

    def admitted_by_secret(self, applicant: Applicant, secret: bytes, now: float) -> Self:
        """With the applicant as a member, and the invite used once more. A member that shows an invite again uses nothing up.

        Raises
        ------
        Refused
            if no open invite has that secret, or the cluster is full.
        """
        if self.member(applicant.id) is not None:
            return self.admitted_by_key(applicant)
        given, found = _hash(secret), None
        for invite in self.invites:  # all of them, so that the time does not tell which one it was
            if hmac.compare_digest(invite.secret_hash, given) and now < invite.expires_at:
                found = invite
        if found is None:
            was_removed = any(gone.id == applicant.id for gone in self.removed)
            raise Refused(Why.REMOVED if was_removed else Why.NOT_INVITED)
        used = (replace(found, uses_left=found.uses_left - 1),) if found.uses_left > 1 else ()
        others = tuple(invite for invite in self.invites if invite is not found)
        return replace(self._with_new(applicant, now, is_lasting=found.is_lasting), invites=(*others, *used))

    def admitted_by_key(self, applicant: Applicant) -> Self:
        """With the address that the member came from.

        Raises
        ------
        Refused
            if it is none.
        """
        known = self.member(applicant.id)
        if known is None:
            raise Refused(Why.REMOVED if any(gone.id == applicant.id for gone in self.removed) else Why.UNKNOWN)
        return self._with(replace(known, certificate=applicant.certificate, host=applicant.host))

    def admitted_by_code(self, applicant: Applicant, now: float) -> Self:
        """With the applicant as a member: it has shown the code.

        Raises
        ------
        Refused
            if the cluster is full.
        """
        return self.admitted_by_key(applicant) if self.member(applicant.id) is not None else self._with_new(applicant, now, is_lasting=True)

    def named(self, node: NodeId, wanted: str, reserved: str) -> Self:
        """With the name that a member wants, or the same with a number if another one, or ``reserved``, has it. Once given, it stays until it wants another."""
        known = self.member(node)
        wanted = clean_name(wanted)
        if known is None or (known.wanted == wanted and known.name.casefold() != reserved.casefold()):
            return self
        return self._with(replace(known, wanted=wanted, name=self._free(wanted, node, reserved)))

    def without(self, name: str, now: float) -> Self:
        """Without the member of that name, and without any invite that it may know.

        Raises
        ------
        RequestError
            if there is none.
        """
        gone = next((member for member in self.members if member.name == name), None)
        if gone is None:
            names = ", ".join(sorted(member.name for member in self.members))
            raise RequestError(f"no machine named {name!r} is a member; those that are: {names or 'none'}", status=404)
        removed = tuple(old for old in self.removed if old.id != gone.id)[-(MAX_REMOVED - 1) :]
        members = tuple(member for member in self.members if member is not gone)
        return replace(self, members=members, removed=(*removed, Removed(id=gone.id, name=gone.name, removed_at=now)), invites=())

    def _with(self, known: Member) -> Self:
        return replace(self, members=tuple(known if member.id == known.id else member for member in self.members))

    def _with_new(self, applicant: Applicant, now: float, *, is_lasting: bool) -> Self:
        if len(self.members) >= MAX_MEMBERS:
            raise Refused(Why.FULL)
        new = Member(
            id=applicant.id,
            name=self._free(f"node-{applicant.id[:8]}", applicant.id, ""),
            wanted="",
            certificate=applicant.certificate,
            joined_at=now,
            host=applicant.host,
            is_lasting=is_lasting,
        )
        return replace(self, members=(*self.members, new), removed=tuple(gone for gone in self.removed if gone.id != applicant.id))

    def _free(self, wanted: str, node: NodeId, reserved: str) -> str:
        taken = {member.name.casefold() for member in self.members if member.id != node} | {reserved.casefold()}
        return next(name for name in _names(wanted) if name.casefold() not in taken)


def check_certificate(applicant: Applicant) -> None:
    """Come so far, an applicant's certificate is parsed: it must be of its key.

    Raises
    ------
    Refused
        if it is not.
    """
    try:
        if certificate_id(applicant.certificate) == applicant.id:
            return
    except RemoteProtocolError as error:
        raise Refused(Why.FORGED, f"the newcomer did not show a certificate: {error}") from error
    raise Refused(Why.FORGED, "the newcomer's certificate is of another key")


def clean_name(text: str) -> str:
    """A name that can stand in a table, a terminal and an address: letters, digits, ``_``, ``.`` and ``-``, at most 40 of them. It comes from another machine."""
    plain = _NOT_IN_A_NAME.sub("-", unicodedata.normalize("NFC", text[: 4 * MAX_NAME_CHARS])).strip("-.")[:MAX_NAME_CHARS]
    return plain.strip("-.") or "node"


def _names(name: str) -> Iterator[str]:
    """A machine's name, then the same with a number."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _hash(secret: bytes) -> bytes:
    """A secret has 80 bits of chance, so that nobody finds it by trying: no slow hash is needed."""
    return hashlib.sha256(b"yoke invite" + secret).digest()

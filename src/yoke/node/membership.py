"""The roster in a file, and on the other side the cluster that this machine joined.

Each file is written whole or not at all, is for its owner's eyes only, and is checked when it is read.

What may be decided is in `yoke.node.roster`; who knocks, in `yoke.node.admission`.
"""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import RemoteProtocolError, RequestError, SettingError, UserError
from yoke.core.node import NodeId
from yoke.net.identity import certificate_id
from yoke.net.invite import MAX_HOSTS, SECRET_BYTES, Invite, check_place
from yoke.node.roster import (
    MAX_NAME_CHARS,
    MAX_USES,
    MAX_VALID_S,
    Applicant,
    Host,
    Id,
    Member,
    Moment,
    OpenInvite,
    Refused,
    Roster,
    Why,
    check_certificate,
    clean_name,
)

MEMBERS_FILE, JOINED_FILE = "members.json", "joined.json"
MAX_FILE_BYTES = 1 << 20

_REMEDY = "move the file away"

RecordT = TypeVar("RecordT")


class Membership:
    """The coordinator's list of who belongs to its cluster.

    Another process of this machine may change the file (``yoke nodes`` while a server runs): every question looks whether it did.

    Parameters
    ----------
    directory : where ``members.json`` is; None keeps nothing beyond this process.
    own : the coordinator's key, and what it calls itself: no member gets that name.

    Raises
    ------
    SettingError
        if the file cannot be read, others may, or it is not what was written.
    """

    def __init__(self, directory: Path | None, own: NodeId, own_name: str, clock: Clock | None = None) -> None:
        self._path = None if directory is None else directory / MEMBERS_FILE
        self._own, self._own_name = own, clean_name(own_name)
        self._clock = clock or SystemClock()
        self._roster = Roster()
        self._stamp: object = None
        self._fresh()

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them, here or not, in the order in which they came first."""
        return self._fresh().members

    @property
    def invites(self) -> tuple[OpenInvite, ...]:
        """Those that can be used now."""
        return tuple(invite for invite in self._fresh().invites if self._clock.epoch() < invite.expires_at)

    @property
    def port(self) -> int:
        """Where members knocked last, so that they find this machine there again; 0 if nobody ever did."""
        return self._fresh().port

    def keep_port(self, port: int) -> None:
        """Remember where members knock."""
        self._change(lambda roster: replace(roster, port=port))

    def is_member(self, node: NodeId) -> bool:
        """Whether this key belongs to the cluster now."""
        return self._fresh().member(node) is not None

    def invite(self, hosts: tuple[str, ...], port: int, *, uses: int = 1, valid_s: float = 86400.0, label: str = "", is_lasting: bool = True) -> Invite:
        """A new invite for ``uses`` machines, good for ``valid_s`` seconds.

        Parameters
        ----------
        hosts, port : where this machine answers.
        label : what it is called here. One with the same label is replaced.
        is_lasting : False for machines that belong to the cluster only as long as this process runs; of them, and of the invite, nothing is written down.

        Raises
        ------
        RequestError
            if a number is out of bounds, or there are too many invites.
        SettingError
            if the file cannot be written.
        """
        if not (1 <= uses <= MAX_USES and 1 <= valid_s <= MAX_VALID_S and len(label) <= MAX_NAME_CHARS):
            raise RequestError(
                f"an invite for {uses} machines and {valid_s} s, called {label!r}; expected 1 to {MAX_USES} machines, 1 s to a year, and a short name"
            )
        now = self._clock.epoch()
        made = Invite(node_id=self._own, hosts=hosts, port=port, secret=secrets.token_bytes(SECRET_BYTES))
        self._change(lambda roster: roster.invited(made.secret, uses=uses, expires_at=now + valid_s, now=now, label=label, is_lasting=is_lasting))
        return made

    def admit_by_secret(self, applicant: Applicant, secret: bytes) -> Member:
        """Make a member of whoever knows an invite's secret; its use counts from here on.

        Raises
        ------
        Refused
            if no open invite has that secret, or the cluster is full.
        """
        return self._admit(applicant, lambda roster: roster.admitted_by_secret(applicant, secret, self._clock.epoch()))

    def admit_by_key(self, applicant: Applicant) -> Member:
        """Welcome a member back.

        Raises
        ------
        Refused
            if it is none.
        """
        return self._admit(applicant, lambda roster: roster.admitted_by_key(applicant))

    def admit_by_code(self, applicant: Applicant) -> Member:
        """Make a member of whoever has shown the code: the caller has checked that.

        Raises
        ------
        Refused
            if the cluster is full.
        """
        return self._admit(applicant, lambda roster: roster.admitted_by_code(applicant, self._clock.epoch()))

    def introduce(self, node: NodeId, wanted: str) -> str:
        """What a member is called everywhere, now that it has said what it calls itself.

        Raises
        ------
        Refused
            if it is no member (any more).
        """
        _, new = self._change(lambda roster: roster.named(node, wanted, self._own_name))
        member = new.member(node)
        if member is None:
            raise Refused(Why.REMOVED)
        return member.name

    def remove(self, name: str) -> Member:
        """Put a machine out: its key and all open invites are worth nothing from here on. The caller ends its connection.

        Raises
        ------
        RequestError
            if there is none of that name.
        """
        old, _ = self._change(lambda roster: roster.without(name, self._clock.epoch()))
        return next(member for member in old.members if member.name == name)

    def _admit(self, applicant: Applicant, change: Callable[[Roster], Roster]) -> Member:
        if applicant.id == self._own:
            raise Refused(Why.CONNECTED, "the newcomer has this machine's own key")

        def checked(roster: Roster) -> Roster:
            """Only the certificate of somebody who may come in is parsed, and only one that fits is kept."""
            changed = change(roster)
            check_certificate(applicant)
            return changed

        _, new = self._change(checked)
        return next(member for member in new.members if member.id == applicant.id)

    def _change(self, change: Callable[[Roster], Roster]) -> tuple[Roster, Roster]:
        """The roster before and after. Written before it holds: who was let in is a member also after a crash, and a use is not given twice."""
        old = self._fresh()
        new = change(old)
        if self._path is not None and new.lasting != old.lasting:
            _write(self._path, new.lasting)
            self._stamp = _stamp(self._path)
        self._roster = new
        return old, new

    def _fresh(self) -> Roster:
        """The roster, read again if somebody else has written it. What does not last is this process's alone."""
        if self._path is not None and (stamp := _stamp(self._path)) != self._stamp:
            kept = _read(self._path, Roster, "all machines then need a new invite") or Roster()
            for member in kept.members:
                _check_certificate(self._path, member)
            self._roster = kept.with_passing(self._roster)
            self._stamp = stamp
        return self._roster


class Joined(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cluster that this machine belongs to, as it remembers it: whose key answers, and where it did last. ``joined_at`` is seconds since the epoch."""

    version: Literal[1] = 1
    cluster: Id
    hosts: Annotated[tuple[Host, ...], msgspec.Meta(min_length=1, max_length=MAX_HOSTS)]
    port: Annotated[int, msgspec.Meta(gt=0, lt=1 << 16)]
    joined_at: Moment

    def __post_init__(self) -> None:
        check_place(self.cluster, self.hosts, self.port)


def remember(directory: Path, joined: Joined) -> None:
    """Keep it for the next start.

    Raises
    ------
    SettingError
        if it cannot be written.
    """
    _write(directory / JOINED_FILE, joined)


def remembered(directory: Path) -> Joined | None:
    """The cluster that this machine joined last, if it did.

    Raises
    ------
    SettingError
        if the file cannot be read, others may, or it is not what was written.
    """
    return _read(directory / JOINED_FILE, Joined, "then join with an invite or a code")


def forget(directory: Path) -> None:
    """Belong to no cluster any more."""
    (directory / JOINED_FILE).unlink(missing_ok=True)


def _check_certificate(path: Path, member: Member) -> None:
    try:
        if certificate_id(member.certificate) == member.id:
            return
    except RemoteProtocolError:
        pass
    raise SettingError(f"{path} holds a certificate of {member.name} that is not its key's; {_REMEDY}")


def _stamp(path: Path) -> object:
    """Something that changes whenever the file is replaced; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingError(f"cannot look at {path}: {error}") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path, kind: type[RecordT], consequence: str) -> RecordT | None:
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise SettingError(f"others may read or change {path}; run: chmod 600 {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise SettingError(f"{path} has more than {MAX_FILE_BYTES} bytes; {_REMEDY} ({consequence})")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UserError, RecursionError) as error:
        raise SettingError(f"{path} is not what was written there: {error}; {_REMEDY} ({consequence})") from error


def _write(path: Path, record: msgspec.Struct) -> None:
    """The whole record or none of it, on the disk before this returns."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(record), indent=1))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error}; give this node another directory with --state-dir, or make room") from error

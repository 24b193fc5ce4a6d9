"""What a machine can do, measured once and kept: rates of its devices by type of weights and number of threads, and how fast its disk reads.

Knows when a profile still holds: for the same chips, memory, library and number of threads, for `MAX_AGE_S`. Does not know who plans with it.
"""

import os
import platform
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil

from yoke.backends.ops import ATTENTION, Backend, Chip, measured_device
from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import BackendError, SettingError, YokeError
from yoke.core.node import Device, Rate
from yoke.node.surroundings import Others, available_bytes, battery, disk_read_bytes_per_s, sentences, virtual_machine

FORMAT = 1
"""Counts up when rates that are kept would mean something else: then all is measured anew."""

FILE_NAME = "profile.json"
DEFAULT_TYPES = ("Q4_0", "Q8_0", "F16", "Q4_K")
INTRODUCTION_S, WHOLE_S = 0.8, 8.0
MAX_AGE_S = 30 * 86400.0
DISTURBED_AGE_S = 3600.0
"""How long a measurement holds during which other programs computed: long enough for a cluster that is started again, short enough to be mended soon."""

MAX_FILE_BYTES, MAX_ENTRIES = 1 << 20, 16
MAX_PER_S = 1e15
"""More bytes or operations a second than any chip has; what claims more was not measured."""

QUIET_SHARE = 0.1
"""What others may compute meanwhile, as a share of the machine's cores, for a measurement to hold for long."""

Tell = Callable[[str, float], None]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a profile depends on. ``chips`` are (name, description), ``memory_gib`` is rounded: a new system takes some megabytes more or less."""

    machine: str
    cores: int
    memory_gib: int
    backend: str
    version: str
    threads: int
    chips: tuple[tuple[str, str], ...]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured: rates by device, and bytes a second from the disk; None where that is not known. ``busy_cores`` is what others took, if too much."""

    key: Key
    measured_at: float
    rates: dict[str, tuple[Rate, ...]]
    disk_read_bytes_per_s: float | None = None
    busy_cores: float = 0.0


class Book(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: the newest entry first."""

    format: int
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What has to be known: rates of ``weight_types``, the most important one first, and of attention; in about ``budget_s`` seconds.

    ``every_count``: also with fewer threads than the chosen number. ``disk``: also how fast the state directory's disk reads.
    """

    weight_types: tuple[str, ...] = DEFAULT_TYPES
    every_count: bool = True
    disk: bool = True
    budget_s: float = WHOLE_S


def introduction(weight_type: str = DEFAULT_TYPES[0]) -> Ask:
    """As much as a worker needs before it says who it is; within 1.5 s in all, measured or not."""
    return Ask(weight_types=(weight_type,), every_count=False, disk=False, budget_s=INTRODUCTION_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A machine's devices with all rates that are known, and what a planner's reader should know (a node's ``notes``).

    ``measured`` names what was not known before: ``CPU Q4_0``, ...
    """

    devices: tuple[Device, ...]
    notes: tuple[str, ...]
    disk_read_bytes_per_s: float | None = None
    measured: tuple[str, ...] = ()


def silent(_what: str, _share: float) -> None:
    """Tell nobody."""


def take_profile(backend: Backend, directory: Path, ask: Ask, *, tell: Tell = silent, clock: Clock | None = None) -> Profile:
    """What is kept in ``directory``, and the rest measured now and kept there; for an hour only, if other programs computed meanwhile.

    Parameters
    ----------
    tell : is given what is being measured, and the share of all that is done.

    Raises
    ------
    BackendError
        if no device can compute with a type that was asked for, or one fails.
    SettingError
        if the directory cannot be written.
    """
    clock = clock or SystemClock()
    chips = tuple(_with_limits(chip) for chip in backend.chips())
    key = key_of(backend, chips)
    notes = list(sentences(battery(), virtual_machine()))
    path = directory / FILE_NAME
    try:
        book = read_book(path)
    except SettingError as error:
        book = Book(format=FORMAT)
        notes.append(f"its speed was measured anew: {error}")
    entry = find(book, key, clock.epoch()) or Entry(key=key, measured_at=clock.epoch(), rates={})
    others = Others()
    found = _measured(backend, directory, chips, entry, ask, tell)
    measured = tuple(_news(entry, found))
    if measured:
        busy = others.cores()
        if busy > QUIET_SHARE * key.cores:
            found = msgspec.structs.replace(found, measured_at=clock.epoch(), busy_cores=max(entry.busy_cores, busy))
        write_book(path, with_entry(book, found))
    if found.busy_cores:
        notes.append(f"while its speed was measured, other programs kept {found.busy_cores:.1f} of its {key.cores} cores busy: it may be faster than that")
    devices = tuple(_devices(backend, chips, found, ask.weight_types))
    if not devices:
        raise BackendError(
            f"no device of {backend.name} {backend.version} can compute with weights in {', '.join(ask.weight_types)}; take a model of another type"
        )
    return Profile(devices=devices, notes=tuple(notes), disk_read_bytes_per_s=found.disk_read_bytes_per_s, measured=measured)


def key_of(backend: Backend, chips: tuple[Chip, ...]) -> Key:
    """What a profile of these chips depends on, on this machine."""
    return Key(
        machine=platform.machine(),
        cores=psutil.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        backend=backend.name,
        version=backend.version,
        threads=max((chip.threads for chip in chips if chip.is_host), default=1),
        chips=tuple((chip.name, chip.description) for chip in chips),
    )


def find(book: Book, key: Key, now: float) -> Entry | None:
    """What is known for ``key`` at ``now``, seconds since the epoch, and not too old."""
    return next((e for e in book.entries if e.key == key and 0 <= now - e.measured_at <= (DISTURBED_AGE_S if e.busy_cores else MAX_AGE_S)), None)


def with_entry(book: Book, entry: Entry) -> Book:
    """The book with ``entry`` in the place of what it had for that key; the oldest go when there are too many."""
    others = (old for old in book.entries if old.key != entry.key)
    return Book(format=FORMAT, entries=(entry, *others)[:MAX_ENTRIES])


def read_book(path: Path) -> Book:
    """The profiles that are kept in a file; none if there is no file, or one of another `FORMAT`.

    Raises
    ------
    SettingError
        if it cannot be read, others may write it, or it is anything else than what `write_book` writes.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise SettingError(f"{path} is no plain file of at most {MAX_FILE_BYTES} bytes")
            if os.name == "posix" and status.st_mode & 0o022:
                raise SettingError(f"others may write to {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return Book(format=FORMAT)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    try:
        if msgspec.json.decode(data, type=_Mark).format != FORMAT:
            return Book(format=FORMAT)
        book = msgspec.json.decode(data, type=Book)
    except (msgspec.MsgspecError, YokeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(f"{path} holds no profile: {error}") from error
    numbers = [number for entry in book.entries for number in _numbers(entry)]
    if len(book.entries) > MAX_ENTRIES or not all(0 < number <= MAX_PER_S for number in numbers):
        raise SettingError(f"{path} holds {len(book.entries)} profiles, some with impossible numbers; expected at most {MAX_ENTRIES}, of real ones")
    return book


def write_book(path: Path, book: Book) -> None:
    """Keep profiles in a file that only its owner may read: whole, or not at all.

    Raises
    ------
    SettingError
        if the directory cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(book), indent=1))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SettingError(f"cannot keep this machine's profile in {path}: {error}") from error


def thread_counts(chip: Chip, every_count: bool) -> tuple[int, ...]:
    """The numbers of threads to measure, the chosen one first: all that are less up to eight, above that the powers of two."""
    if not (chip.is_host and every_count):
        return (chip.threads,)
    return (chip.threads, *(count for count in range(1, chip.threads) if chip.threads <= 8 or count & (count - 1) == 0))


class _Mark(msgspec.Struct):
    """The part of the file that is the same in every format."""

    format: int


def _numbers(entry: Entry) -> Iterator[float]:
    for rates in entry.rates.values():
        for rate in rates:
            yield rate.matvec_bytes_per_s
            yield rate.matmul_flop_per_s
    if entry.disk_read_bytes_per_s is not None:
        yield entry.disk_read_bytes_per_s
    yield 1.0 + abs(entry.measured_at)


def _with_limits(chip: Chip) -> Chip:
    return replace(chip, free_bytes=min(chip.free_bytes, available_bytes())) if chip.is_host else chip


def _measured(backend: Backend, directory: Path, chips: tuple[Chip, ...], entry: Entry, ask: Ask, tell: Tell) -> Entry:
    """``entry`` with what it lacks."""
    rates = {chip.name: list(entry.rates.get(chip.name, ())) for chip in chips}
    missing = [(chip, kind) for chip in chips for kind in (*ask.weight_types, ATTENTION) if not _is_known(rates[chip.name], kind, chip, ask.every_count)]
    for index, (chip, kind) in enumerate(missing):
        tell(f"{chip.name} {kind}", index / len(missing))
        new = backend.measure(chip.name, kind, thread_counts(chip, ask.every_count), ask.budget_s / len(missing))
        rates[chip.name] = [rate for rate in rates[chip.name] if rate.weight_type != kind] + list(new)
    disk = entry.disk_read_bytes_per_s
    if ask.disk and disk is None:
        tell("disk", 1.0)
        disk = _disk(directory)
    return msgspec.structs.replace(entry, rates={name: tuple(each) for name, each in rates.items()}, disk_read_bytes_per_s=disk)


def _disk(directory: Path) -> float | None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return disk_read_bytes_per_s(directory)
    except OSError as error:
        raise SettingError(f"cannot try the disk of {directory}: {error}") from error


def _is_known(rates: list[Rate], kind: str, chip: Chip, every_count: bool) -> bool:
    """Whether there is a rate of that kind with the chosen threads, and with fewer where that is wanted."""
    counts = {rate.threads for rate in rates if rate.weight_type == kind}
    return chip.threads in counts and (len(counts) > 1 or len(thread_counts(chip, every_count)) == 1)


def _news(old: Entry, new: Entry) -> Iterator[str]:
    for device, rates in new.rates.items():
        before = set(old.rates.get(device, ()))
        yield from dict.fromkeys(f"{device} {rate.weight_type}" for rate in rates if rate not in before)
    if new.disk_read_bytes_per_s != old.disk_read_bytes_per_s:
        yield "disk"


def _devices(backend: Backend, chips: tuple[Chip, ...], entry: Entry, weight_types: tuple[str, ...]) -> Iterator[Device]:
    """Those that compute with a type that was asked for; what the first of these runs at, with the chosen threads, is the device's speed."""
    for chip in chips:
        rates = entry.rates.get(chip.name, ())
        headline = [rate for kind in weight_types for rate in rates if (rate.weight_type, rate.threads) == (kind, chip.threads)]
        if headline:
            yield measured_device(chip, backend.name, (headline[0], *(rate for rate in rates if rate is not headline[0])))

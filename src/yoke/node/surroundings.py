"""What a machine stands in, as the system tells it: battery, virtual machine, memory that is left, its disk, and what other programs compute.

Each reading says None where the system does not tell. Knows nothing of backends, clusters and what anybody concludes.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

DISK_BYTES, DISK_S = 32 << 20, 0.5
"""What a disk is tried with: as much as it reads in that time, at most."""

LEAST_FREE_DISK_BYTES = 1 << 30
UNKNOWN_KIND = "unknown kind"

_PIECE_BYTES = 1 << 20
_BUSY = ("user", "nice", "system", "irq", "softirq")
_DMI = Path("/sys/class/dmi/id")
# How hypervisors call the computers that they pretend to be: in systemd's detect-virt, dmi_vendor_table.
_VENDORS = {
    "qemu": "QEMU",
    "kvm": "KVM",
    "vmware": "VMware",
    "innotek": "VirtualBox",
    "virtualbox": "VirtualBox",
    "xen": "Xen",
    "parallels": "Parallels",
    "bhyve": "bhyve",
    "microsoft corporation virtual machine": "Hyper-V",
    "google compute engine": "Google Compute Engine",
    "amazon ec2": "Amazon EC2",
    "apple virtualization": "Apple Virtualization",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery:
    """A battery: how full, and whether the machine is plugged in (None where the system cannot say)."""

    percent: float
    is_plugged: bool | None


def battery() -> Battery | None:
    """The machine's battery, if it has one."""
    read = getattr(psutil, "sensors_battery", None)
    found = read() if read is not None else None
    return Battery(percent=float(found.percent), is_plugged=found.power_plugged) if found is not None else None


def cpu_flags() -> frozenset[str] | None:
    """What the processor can do, in Linux's names (``avx2``, ``asimd``, ...)."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(flags.split())
    return None


def virtual_machine() -> str | None:
    """The kind of virtual machine that this is; empty if it is none, None where the system does not tell."""
    shown = " ".join(_text(_DMI / name).strip() for name in ("sys_vendor", "product_name", "bios_vendor")).lower()
    return judge_virtual(platform.machine(), cpu_flags(), shown)


def judge_virtual(machine: str, flags: frozenset[str] | None, shown: str) -> str | None:
    """`virtual_machine`, from the kind of processor, its flags, and how the computer calls itself (in small letters)."""
    kind = next((name for mark, name in _VENDORS.items() if mark in shown), None)
    if machine.lower() in {"x86_64", "amd64", "i386", "i686"} and flags is not None:
        return (kind or UNKNOWN_KIND) if "hypervisor" in flags else ""  # the flag decides: vendors rent out bare machines too
    return kind


def available_bytes() -> int:
    """Memory that programs can have without swapping: the system's, or what this process's control groups leave if that is less."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _group_limits())])


def _group_limits() -> list[tuple[int, int]]:
    """(limit, use without what the system would give back) of each control group above this process that has a limit (Linux, version 2)."""
    found = []
    root = Path("/sys/fs/cgroup")
    lines = _text(Path("/proc/self/cgroup")).splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    group = root / (own or "/").lstrip("/")
    while own is not None and group.is_relative_to(root):
        limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            kept = [line.split()[1] for line in _text(group / "memory.stat").splitlines() if line.startswith("inactive_file ")]
            found.append((int(limit), int(used) - sum(map(int, kept))))
        group = group.parent
    return found


def disk_read_bytes_per_s(directory: Path) -> float | None:
    """How fast new data comes from the disk of ``directory``, in bytes a second; about a second of writing and reading.

    None where that cannot be said: no room to try, or the system cannot be told to forget what it has just written (it would be its memory that is measured).
    What the drive itself, or the host of a virtual machine, remembers is beyond our reach: then the figure is too good.

    Raises
    ------
    OSError
        if the directory cannot be written.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT") or shutil.disk_usage(directory).free < LEAST_FREE_DISK_BYTES:
        return None
    with tempfile.TemporaryFile(dir=directory, prefix=".disk-", buffering=0) as file:
        piece = os.urandom(_PIECE_BYTES)
        written, stop = 0, time.perf_counter() + DISK_S
        while written < DISK_BYTES and time.perf_counter() < stop:
            written += os.write(file.fileno(), piece)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(_is_remembered(file.fileno(), offset) for offset in (0, written // 2, written - 4096)):
            return None
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # asking may have fetched the neighbourhood
        return _reading_rate(file.fileno(), written)


def _is_remembered(descriptor: int, offset: int) -> bool:
    """Whether the system has that page in its memory, or does not tell."""
    try:
        os.preadv(descriptor, [bytearray(4096)], max(0, offset), os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _reading_rate(descriptor: int, n_bytes: int) -> float:
    buffer, done, started = bytearray(_PIECE_BYTES), 0, time.perf_counter()
    while done < n_bytes and time.perf_counter() < started + DISK_S:
        done += os.preadv(descriptor, [buffer], done)
    return done / (time.perf_counter() - started)


class Usage(NamedTuple):
    """Processor seconds so far, of all processes and of this one, and the time of the monotonic clock."""

    all_s: float
    own_s: float
    at_s: float


def usage() -> Usage:
    """As the system counts it now."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return Usage(sum(getattr(times, name, 0.0) for name in _BUSY), own.user + own.system, time.monotonic())


class Others:
    """Cores that other processes keep busy, counted from when this is made. ``read`` gives the counts."""

    def __init__(self, read: Callable[[], Usage] = usage) -> None:
        self._read, self._since = read, read()

    def cores(self) -> float:
        """Their mean number until now."""
        now, then = self._read(), self._since
        return max(0.0, now.all_s - then.all_s - (now.own_s - then.own_s)) / max(1e-9, now.at_s - then.at_s)


def sentences(power: Battery | None, machine: str | None) -> tuple[str, ...]:
    """What whoever plans with this machine should know of it: a node's notes."""
    notes = []
    if power is not None and power.is_plugged is False:
        notes.append(f"it runs on battery, which is {power.percent:.0f} % full")
    if machine:
        notes.append(f"it is a virtual machine ({machine}): others may use its cores and memory")
    return tuple(notes)


def _text(path: Path) -> str:
    """A small file of the system's; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

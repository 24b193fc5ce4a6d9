"""Makes whole nodes slower with the system's own means: a quota of processor time for a group of processes (Linux control groups, version 1 or 2).

The quota is kept when the system looks, at ticks of its clock and at every change of processes: what runs meanwhile is paid back later. On a kernel of 250 ticks a
second, a loop under 1 ms of 8 runs for 1.8 ms and stands for 14 (measured). See `cluster_pace` for a finer brake.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yoke.core.errors import SettingError

LEAST_US = 1000
"""Kernels refuse quotas and periods below that. The period is the shortest that gives a quota of so much: the shorter, the finer."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Where control groups of processor time are made, and by which version's files."""

    root: Path
    version: int


def groups() -> Groups:
    """Those of this system.

    Raises
    ------
    SettingError
        if it has none that can be made, or they belong to somebody else.
    """
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        root = Path(place)
        if kind == "cgroup" and "cpu" in options.split(","):
            return _writable(Groups(root, 1))
        if kind == "cgroup2" and "cpu" in (root / "cgroup.controllers").read_text().split():
            return _writable(Groups(root, 2))
    raise SettingError("found no control groups with processor time in /proc/mounts, of version 1 or 2; expected one of them: use `--brake pace`")


def _writable(found: Groups) -> Groups:
    if not os.access(found.root, os.W_OK):
        raise SettingError(f"the control groups at {found.root} cannot be changed by this user; expected root: use `--brake pace`")
    return found


@contextlib.contextmanager
def quota(made: Groups, name: str, speed: float) -> Iterator[list[str]]:
    """The words before a command that let it and its children have ``speed`` processors in all; the group goes when the context ends, if they have ended."""
    place = made.root / name
    if made.version == 2:
        (made.root / "cgroup.subtree_control").write_text("+cpu")
    place.mkdir(exist_ok=True)
    try:
        period_us = max(LEAST_US, round(LEAST_US / speed))
        quota_us = max(LEAST_US, round(period_us * speed))
        if made.version == 2:
            (place / "cpu.max").write_text(f"{quota_us} {period_us}")
        else:
            (place / "cpu.cfs_quota_us").write_text("-1")  # else a period that does not fit the old quota is refused
            (place / "cpu.cfs_period_us").write_text(str(period_us))
            (place / "cpu.cfs_quota_us").write_text(str(quota_us))
        yield ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(place)]
    finally:
        place.rmdir()

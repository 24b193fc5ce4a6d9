"""Looking at this machine: every fact that `yoke.node.health` judges, gathered in one go of a few seconds. Concludes nothing, changes nothing.

As a program (``python -m yoke.node.examination LIBRARY``) it only loads ggml and says what it found: in a process of its own, since a library that was built for
another processor ends the process that loads it.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import psutil

import yoke
from yoke.backends.ggml.backend import GgmlBackend, physical_cores
from yoke.core.errors import SettingError, YokeError
from yoke.core.settings import Settings
from yoke.net.addresses import local_addresses
from yoke.net.identity import Identity
from yoke.net.invite import MAX_HOSTS, Invite
from yoke.node.health import Facts, Ggml, Network, Package, Processor, Room, Software
from yoke.node.profile import FILE_NAME, read_book
from yoke.node.reach import NAME_S, Call, PortUse, addresses_of, call_all, clock_skew, interface_towards, port_use, within
from yoke.node.surroundings import Others, available_bytes, battery, cpu_flags, virtual_machine

DISTRIBUTION = "yoke-llm"
KEY_NAME = "node.pem"
LOAD_S, GGML_S = 0.5, 60.0
N_BUSIEST, LEAST_CORES = 3, 0.1

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_CLAUSE = re.compile(r"(==|>=|<=|<|>)\s*([\d.]+)")
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def examine(settings: Settings, state_dir: Path, invite: Invite | None) -> Facts:
    """All facts about this machine, and about the way to the coordinator of ``invite``, or to the one that runs here."""
    return Facts(
        software=_software(settings),
        processor=_processor(),
        room=_room(state_dir),
        network=_network(settings, state_dir, invite),
        battery=battery(),
        virtual_machine=virtual_machine(),
    )


def requirement(text: str) -> tuple[str, str] | None:
    """Name and versions of a requirement as a package writes it; None for one of an extra, or what is no requirement."""
    found = _REQUIREMENT.fullmatch(text.strip())
    if found is None or "extra" in (found[3] or ""):
        return None
    return found[1], found[2].replace(" ", "")


def is_within(version: str, wanted: str) -> bool:
    """Whether a version is one of those that were ``wanted``: numbers with comparisons before them, between commas."""
    numbers = _numbers(version)
    for comparison, text in _CLAUSE.findall(wanted):
        bound = _numbers(text)
        length = max(len(numbers), len(bound))
        a, b = ((*each, *(0,) * (length - len(each))) for each in (numbers, bound))
        if not {"==": a == b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b}[comparison]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The release's numbers; what follows them (rc1, +cpu, .post1) does not count."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found is not None else ()


def _software(settings: Settings) -> Software:
    return Software(
        python=sys.version_info[:3],
        bits=8 * struct.calcsize("P"),
        yoke=yoke.__version__,
        packages=_packages(),
        ggml=_ggml(settings.library),
    )


def _packages() -> tuple[Package, ...] | None:
    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(_package(*found) for found in map(requirement, texts) if found is not None)


def _package(name: str, wanted: str) -> Package:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name=name, wanted=wanted, found=None, is_right=False)
    return Package(name=name, wanted=wanted, found=found, is_right=is_within(found, wanted))


def _ggml(library: str) -> Ggml:
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "yoke.node.examination", library]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=GGML_S, check=False)
        if ended.returncode == 0:
            return msgspec.json.decode(ended.stdout, type=Ggml)
    except subprocess.TimeoutExpired:
        return Ggml(error=f"ggml's libraries were not loaded in {GGML_S:.0f} s")
    except (OSError, msgspec.MsgspecError) as error:
        return Ggml(error=f"ggml could not be looked at: {error}")
    return Ggml(error=f"ggml's libraries end the process that loads them (code {ended.returncode}): they were built for another processor, or are broken")


def _look_at_ggml(library: str) -> Ggml:
    try:
        backend = GgmlBackend(library)
        devices = tuple(f"{chip.name} ({chip.description})" for chip in backend.chips())
        return Ggml(version=backend.version, devices=devices, features=backend.features)
    except YokeError as error:
        return Ggml(error=str(error))


def _processor() -> Processor:
    others, before, started = Others(), _cpu_seconds(), time.monotonic()
    time.sleep(LOAD_S)
    cores, seconds = others.cores(), time.monotonic() - started
    used = {name: (total - before[name]) / seconds for name, total in _cpu_seconds().items() if name in before}
    busiest = sorted(((name.split(" ", 1)[1], share) for name, share in used.items() if share >= LEAST_CORES), key=lambda each: -each[1])
    hottest_c, hot_c = _heat()
    highest, allowed = (_number(_CPUFREQ / name) for name in ("cpuinfo_max_freq", "scaling_max_freq"))
    return Processor(
        machine=platform.machine(),
        flags=cpu_flags(),
        n_cores=psutil.cpu_count(logical=False) or 1,
        n_allowed=physical_cores(),
        others_cores=cores,
        busiest=tuple(busiest[:N_BUSIEST]),
        governor=_word(_CPUFREQ / "scaling_governor"),
        driver=_word(_CPUFREQ / "scaling_driver"),
        preference=_word(_CPUFREQ / "energy_performance_preference"),
        limit_share=allowed / highest if highest and allowed else None,
        hottest_c=hottest_c,
        hot_c=hot_c,
    )


def _cpu_seconds() -> dict[str, float]:
    """Processor seconds of every other process so far, by number and name."""
    found = {}
    for process in psutil.process_iter(["pid", "name", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None and process.pid != os.getpid():
            found[f"{process.pid} {process.info['name'] or 'unknown'}"] = times.user + times.system
    return found


def _heat() -> tuple[float | None, float | None]:
    """The hottest sensor and its limit, in degrees Celsius."""
    read = getattr(psutil, "sensors_temperatures", None)
    sensors = [entry for entries in (read() if read is not None else {}).values() for entry in entries if 0 < entry.current < 150]
    hottest = max(sensors, key=lambda entry: entry.current, default=None)
    if hottest is None:
        return None, None
    return float(hottest.current), float(hottest.high) if hottest.high and hottest.high > 0 else None


def _room(state_dir: Path) -> Room:
    exists = os.path.isdir(state_dir)  # unlike Path's methods, says no where it may not look
    nearest = next((path for path in (state_dir, *state_dir.absolute().parents) if os.path.exists(path)), Path.cwd())
    key = state_dir / KEY_NAME
    has_modes = os.name == "posix"
    error, disk = "", None
    try:
        disk = next((entry.disk_read_bytes_per_s for entry in read_book(state_dir / FILE_NAME).entries), None)
    except SettingError as unreadable:
        error = str(unreadable)
    return Room(
        available_bytes=available_bytes(),
        swapped_bytes=psutil.swap_memory().used,
        state_dir=str(state_dir),
        state_dir_exists=exists,
        is_writable=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        state_dir_mode=state_dir.stat().st_mode & 0o777 if exists and has_modes else None,
        key_mode=key.stat().st_mode & 0o777 if has_modes and os.path.isfile(key) else None,
        free_disk_bytes=shutil.disk_usage(nearest).free,
        disk_read_bytes_per_s=disk,
        profile_error=error,
    )


def _network(settings: Settings, state_dir: Path, invite: Invite | None) -> Network:
    use = port_use(settings.host, settings.port)
    calls = tuple(_calls(settings, state_dir, invite, use))
    hostname = socket.gethostname()
    (interface,) = within([partial(interface_towards, invite.hosts[0]) if invite is not None else interface_towards], NAME_S)
    return Network(
        hostname=hostname,
        addresses=addresses_of(hostname),
        interface=interface,
        host=settings.host,
        port=settings.port,
        port_use=use,
        calls=calls,
        server_skew_s=clock_skew(settings.host, settings.port) if use is PortUse.YOKE and not calls else None,
    )


def _calls(settings: Settings, state_dir: Path, invite: Invite | None, use: PortUse) -> Iterator[Call]:
    if invite is not None:
        yield from call_all(invite.hosts, invite.port, invite.node_id, settings.port)
    elif use is PortUse.YOKE and settings.cluster_port and os.path.isfile(state_dir / KEY_NAME):
        try:
            own = Identity.load_or_create(state_dir).id
        except SettingError:  # the key is found to be wrong where it lies: see `_room`
            return
        hosts = (settings.cluster_host,) if settings.cluster_host else ("127.0.0.1", *local_addresses(MAX_HOSTS))
        yield from call_all(tuple(dict.fromkeys(hosts)), settings.cluster_port, own, settings.port)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> float | None:
    text = _word(path)
    return float(text) if text.isdigit() else None


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_look_at_ggml(sys.argv[1] if len(sys.argv) > 1 else "")))

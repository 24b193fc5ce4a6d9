"""What may be wrong with a machine: facts as one value, and a pure function from them to findings, each with what to do.

Knows thresholds and remedies. Touches nothing: `yoke.node.examination` gathers the facts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from yoke.node.reach import Call, Interface, Outcome, PortUse
from yoke.node.surroundings import Battery

LEAST_PYTHON = (3, 11)
LOW_BYTES, TOO_LOW_BYTES = 1 << 30, 256 << 20
"""A worker takes 128 MiB before it holds a single weight."""

SWAPPED_BYTES = 256 << 20
LOW_DISK_BYTES, TOO_LOW_DISK_BYTES = 2 << 30, 100 << 20
SLOW_DISK_BYTES_PER_S = 100e6
HOT_C = 95.0
LIMITED_SHARE = 0.8
BUSY_SHARE = 0.25
SLOW_LINK_MBIT_PER_S = 1000
SKEW_S = 30.0
SLOW_CALL_S = 0.5
DYNAMIC_DRIVERS = frozenset({"intel_pstate", "amd-pstate", "amd-pstate-epp"})
"""Drivers whose governor ``powersave`` is the usual one and saves no power under load (kernel.org, admin-guide/pm/intel_pstate)."""

REINSTALL = "compile it for this machine: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={version}"


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: how it is, and what to do about it; no ``remedy`` where nothing has to be done, or can be."""

    level: Level
    subject: str
    sentence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A library that Yoke needs: which versions, as pip writes it, and the one that is installed."""

    name: str
    wanted: str
    found: str | None
    is_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ggml:
    """ggml, as a process of its own found it: its version and devices, what its code for the processor uses; or why it failed."""

    version: str = ""
    devices: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Python, Yoke and its libraries. ``packages`` is None if Yoke is not installed, so that nobody says what it needs."""

    python: tuple[int, int, int]
    bits: int
    yoke: str
    packages: tuple[Package, ...] | None
    ggml: Ggml


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Cores, what they can do (Linux's names; None where the system does not tell) and what holds them back.

    ``n_allowed`` are those that this process may use. ``limit_share`` is the highest clock that is allowed, as a share of the highest there is.
    """

    machine: str
    flags: frozenset[str] | None
    n_cores: int
    n_allowed: int
    others_cores: float
    busiest: tuple[tuple[str, float], ...] = ()
    governor: str = ""
    driver: str = ""
    preference: str = ""
    limit_share: float | None = None
    hottest_c: float | None = None
    hot_c: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory and disk. Modes are those of the state directory and of the key in it, None where there is none or the system has no modes."""

    available_bytes: int
    swapped_bytes: int
    state_dir: str
    state_dir_exists: bool
    is_writable: bool
    state_dir_mode: int | None
    key_mode: int | None
    free_disk_bytes: int
    disk_read_bytes_per_s: float | None = None
    profile_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Names, ports and ways. ``addresses`` is what the machine's own name leads to, None if nobody said; ``calls`` are to the coordinator, if one was named."""

    hostname: str
    addresses: tuple[str, ...] | None
    interface: Interface | None
    host: str
    port: int
    port_use: PortUse
    calls: tuple[Call, ...] = ()
    server_skew_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was looked at."""

    software: Software
    processor: Processor
    room: Room
    network: Network
    battery: Battery | None
    virtual_machine: str | None


def findings(facts: Facts) -> tuple[Finding, ...]:
    """What is right and what is wrong, in the order in which it is looked at."""
    return (*_software(facts.software), *_processor(facts), *_power(facts), *_room(facts.room), *_network(facts.network))


def is_well(found: tuple[Finding, ...]) -> bool:
    """Whether nothing is bad; warnings are no obstacle."""
    return all(finding.level is not Level.BAD for finding in found)


def _ok(subject: str, sentence: str) -> Finding:
    return Finding(level=Level.OK, subject=subject, sentence=sentence)


def _warn(subject: str, sentence: str, remedy: str = "") -> Finding:
    return Finding(level=Level.WARN, subject=subject, sentence=sentence, remedy=remedy)


def _bad(subject: str, sentence: str, remedy: str) -> Finding:
    return Finding(level=Level.BAD, subject=subject, sentence=sentence, remedy=remedy)


def _software(software: Software) -> Iterator[Finding]:
    version = ".".join(map(str, software.python))
    if software.python < LEAST_PYTHON or software.bits < 64:
        least = ".".join(map(str, LEAST_PYTHON))
        yield _bad("python", f"Python {version} with {software.bits} bits", f"install Python {least} or newer, for 64 bits")
    else:
        yield _ok("python", f"Python {version}, Yoke {software.yoke}")
    if software.packages is None:
        yield _warn("packages", "Yoke is not installed here, so its libraries cannot be checked", "run: pip install . in its directory")
    else:
        wrong = [package for package in software.packages if not package.is_right]
        for package in wrong:
            is_there = f"is version {package.found}" if package.found is not None else "is missing"
            wanted = f"{package.name}{package.wanted}"
            yield _bad("packages", f"{package.name} {is_there}, needed is {wanted}", f"run: pip install '{wanted}'")
        if not wrong:
            yield _ok("packages", f"all {len(software.packages)} libraries are there")
    if software.ggml.error:
        yield _bad("ggml", software.ggml.error, "reinstall it: pip install --force-reinstall --no-cache-dir llama-cpp-python")
    else:
        yield _ok("ggml", f"ggml {software.ggml.version} with {', '.join(software.ggml.devices)}")


def _processor(facts: Facts) -> Iterator[Finding]:
    processor, ggml = facts.processor, facts.software.ggml
    yield from _instructions(processor, ggml, facts.software.packages or ())
    if processor.n_allowed < processor.n_cores:
        sentence = f"this process may use {processor.n_allowed} of {processor.n_cores} cores"
        yield _warn("cores", sentence, "lift the limit (taskset, container) if that was not meant")
    else:
        yield _ok("cores", f"{processor.n_cores} cores")
    if processor.others_cores > BUSY_SHARE * processor.n_cores:
        names = ", ".join(f"{name} ({cores:.1f})" for name, cores in processor.busiest) or "none that this user may see"
        yield _warn("load", f"other programs keep {processor.others_cores:.1f} of {processor.n_cores} cores busy: {names}", "end what is not needed now")
    else:
        yield _ok("load", f"other programs use {processor.others_cores:.1f} cores")


def _instructions(processor: Processor, ggml: Ggml, packages: tuple[Package, ...]) -> Iterator[Finding]:
    """What the processor can do and ggml's code makes of it. Only known to matter for x86: ARM's NEON is always there."""
    if processor.machine.lower() not in {"x86_64", "amd64"}:
        return
    version = next((package.found for package in packages if package.name == "llama-cpp-python" and package.found), "VERSION")
    remedy = REINSTALL.format(version=version)
    flags = processor.flags
    if flags is not None and "avx2" not in flags:
        yield _warn("processor", "it has no AVX2: it computes several times slower than newer ones", "let it hold few blocks, or leave it out")
    elif ggml.features and "AVX2" not in ggml.features:
        yield _warn("processor", "ggml was built without AVX2: it computes several times slower than it could", remedy)
    elif flags is not None and "avx512f" in flags and ggml.features and "AVX512" not in ggml.features:
        yield _warn("processor", "ggml was built without AVX-512, which this processor has: prompts are read about a third slower than they could be", remedy)
    elif flags is not None or ggml.features:
        yield _ok("processor", "ggml uses what this processor can do" if ggml.features else "it has AVX2")


def _power(facts: Facts) -> Iterator[Finding]:
    processor, battery = facts.processor, facts.battery
    if battery is not None and battery.is_plugged is False:
        yield _warn("battery", f"runs on battery, {battery.percent:.0f} % full: most machines are slower then", "plug it in")
    elif battery is not None:
        yield _ok("battery", f"plugged in, {battery.percent:.0f} % full")
    if processor.governor == "powersave" and processor.driver not in DYNAMIC_DRIVERS:
        yield _warn("power", "the governor powersave keeps the processor at its lowest clock", "run: sudo cpupower frequency-set -g performance")
    elif processor.preference == "power":
        yield _warn("power", "the processor is told to save power", "choose another power profile: powerprofilesctl set balanced")
    elif processor.limit_share is not None and processor.limit_share < LIMITED_SHARE:
        yield _warn(
            "power", f"the processor is held to {100 * processor.limit_share:.0f} % of its highest clock", "choose a faster power profile, or let it cool"
        )
    if processor.hottest_c is not None:
        hot_c = processor.hot_c or HOT_C
        if processor.hottest_c >= hot_c:
            sentence = f"a sensor shows {processor.hottest_c:.0f} degrees C (limit {hot_c:.0f}): the machine slows itself down"
            yield _warn("heat", sentence, "free its air inlets, put it on a hard surface")
        else:
            yield _ok("heat", f"the hottest sensor shows {processor.hottest_c:.0f} degrees C")
    if facts.virtual_machine:
        yield _ok("machine", f"a virtual machine ({facts.virtual_machine}): its speed depends on what else runs on its host")


def _room(room: Room) -> Iterator[Finding]:
    available = f"{room.available_bytes / 1e9:.1f} GB of memory are free"
    if room.available_bytes < TOO_LOW_BYTES:
        yield _bad("memory", f"{available}: too little for any part of a model", "close other programs")
    elif room.available_bytes < LOW_BYTES:
        yield _warn("memory", f"{available}: room for a small part of a model", "close other programs")
    else:
        yield _ok("memory", available)
    if room.swapped_bytes > SWAPPED_BYTES:
        yield _warn("swap", f"{room.swapped_bytes / 1e9:.1f} GB lie in swap: memory has been short", "close other programs, or give less with --memory-share")
    yield from _state_dir(room)
    free = f"{room.free_disk_bytes / 1e9:.1f} GB are free on its disk"
    if room.free_disk_bytes < TOO_LOW_DISK_BYTES:
        yield _bad("disk", free, "make room, or choose another disk with --state-dir")
    elif room.free_disk_bytes < LOW_DISK_BYTES:
        yield _warn("disk", free, "make room, or choose another disk with --state-dir: weights that this machine holds are kept there")
    elif room.disk_read_bytes_per_s is not None and room.disk_read_bytes_per_s < SLOW_DISK_BYTES_PER_S:
        yield _warn("disk", f"{free}; it reads {room.disk_read_bytes_per_s / 1e6:.0f} MB/s: loading takes its time", "choose a faster disk with --state-dir")
    else:
        yield _ok("disk", free)


def _state_dir(room: Room) -> Iterator[Finding]:
    name = room.state_dir
    if not room.is_writable:
        yield _bad("state", f"{name} cannot be written", "become its owner, or choose another directory with --state-dir")
    elif room.state_dir_mode is not None and room.state_dir_mode & 0o022:
        yield _bad("state", f"others may write to {name}, where this node's key is", f"run: chmod go-w {name}")
    elif room.key_mode is not None and room.key_mode & 0o077:
        yield _bad("state", f"others may read this node's key in {name}", f"run: chmod 600 {name}/node.pem")
    else:
        yield _ok("state", f"{name} is this user's own" if room.state_dir_exists else f"{name} will be made when it is needed")
    if room.profile_error:
        yield _warn("profile", room.profile_error, "remove the file: this machine is measured again")


def _network(network: Network) -> Iterator[Finding]:
    interface = network.interface
    if interface is None:
        yield _warn("link", "no network leads to other machines", "connect a cable or a Wi-Fi network")
    elif interface.is_wireless:
        yield _warn(
            "link", f"{interface.name} is Wi-Fi: exchanges take milliseconds instead of tenths of one", "connect a cable, most of all to the first machine"
        )
    elif 0 < interface.mbit_per_s < SLOW_LINK_MBIT_PER_S:
        yield _warn("link", f"{interface.name} runs at {interface.mbit_per_s} Mbit/s", "look at cable, socket and switch: gigabit is usual")
    else:
        yield _ok("link", f"packets leave by {interface.name}" + (f" at {interface.mbit_per_s} Mbit/s" if interface.mbit_per_s else ""))
    if network.addresses:
        yield _ok("name", f"{network.hostname} is {', '.join(network.addresses)}")
    else:
        why = "leads nowhere" if network.addresses is not None else "is not answered for in time"
        yield _warn("name", f"this machine's own name {network.hostname} {why}", f"add a line to the hosts file: 127.0.1.1 {network.hostname}")
    yield from _port(network)
    if network.server_skew_s is not None:
        yield _clock(network.server_skew_s, "the server here")
    if network.calls:
        yield from _calls(network.calls)


def _port(network: Network) -> Iterator[Finding]:
    place = f"port {network.port} at {network.host}"
    match network.port_use:
        case PortUse.FREE:
            yield _ok("port", f"{place} is free for `yoke serve`")
        case PortUse.YOKE:
            yield _ok("port", f"a server answers at {place}")
        case PortUse.OTHER:
            yield _warn("port", f"another program has {place}", "end it, or choose another port with --port")
        case PortUse.FORBIDDEN:
            yield _bad("port", f"this user may not listen at {place}", "choose a port above 1023 with --port")
        case PortUse.NOT_HERE:
            yield _bad("port", f"{network.host} is no address of this machine", "choose one that is with --host, or 127.0.0.1")


def _calls(calls: tuple[Call, ...]) -> Iterator[Finding]:
    """The coordinator is well if one of its addresses answers; if none does, each says why."""
    reached = next((call for call in calls if call.outcome is Outcome.REACHED), None)
    if reached is None:
        yield from map(_failed_call, calls)
        return
    sentence = f"it answers at {reached.host} port {reached.port}, with the right key, in {1000 * reached.seconds:.0f} ms"
    yield _warn("coordinator", sentence, "look at the link between") if reached.seconds > SLOW_CALL_S else _ok("coordinator", sentence)
    if reached.skew_s is not None:
        yield _clock(reached.skew_s, "the coordinator")


def _failed_call(call: Call) -> Finding:
    place = f"{call.host} port {call.port}"
    sentence, remedy = {
        Outcome.ANOTHER_KEY: (f"another node answers at {place}: somebody may be in between, or the server has a new key", "ask for a new invite"),
        Outcome.NOT_YOKE: (f"what answers at {place} is no coordinator, or is turning strangers away", "wait a minute; then ask for a new invite"),
        Outcome.REFUSED: (f"nothing listens at {place}", "start `yoke serve` there; its port may have changed: ask for a new invite"),
        Outcome.SILENT: (f"nobody answers at {place}", f"is that machine on, and in this network? Then let TCP port {call.port} through its firewall"),
        Outcome.NO_WAY: (f"no way leads to {place} ({call.detail})", "bring both machines into one network"),
        Outcome.NO_SUCH_NAME: (f"the name {call.host} leads nowhere", "start the server with --cluster-host and an address instead of a name"),
        Outcome.REACHED: (f"the coordinator answers at {place}", ""),
    }[call.outcome]
    return _bad("coordinator", sentence, remedy)


def _clock(skew_s: float, whose: str) -> Finding:
    if abs(skew_s) <= SKEW_S:
        return _ok("clock", f"it agrees with that of {whose} to {SKEW_S:.0f} s")
    way = "behind" if skew_s > 0 else "ahead of"
    return _warn("clock", f"it is {abs(skew_s):.0f} s {way} that of {whose}: logs will not match", "let both machines set their clocks from the network")

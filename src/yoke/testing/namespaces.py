"""Machines on one machine: Linux network namespaces with a shaped network between them, for tests and benchmarks.

Knows how namespaces are made, entered and taken away, with root or without; what the network does to packets is the switch's business.
"""

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yoke.core.errors import InvariantError, UserError
from yoke.testing.control import CARD, DEVICE, READY, Place, shape_words
from yoke.testing.fabric import MAX_MACHINES, Way
from yoke.testing.shape import WIRED, Profile, Shape

SUBNET = "10.83.0"
REPLY_S, END_S = 30.0, 10.0
_NAME = re.compile(r"[A-Za-z0-9-]+")
_OURS = re.compile(r"yoke-(\d+)-")
_numbers = itertools.count()
# Without root: a user namespace in which we are root, with a place of its own for the names of network namespaces. It ends when its input does.
_HOUSE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/netns && echo ready && exec cat"]


class NetworkUnavailable(UserError):
    """Networks cannot be made on this system; the message names what is missing. A reason to skip a test."""


class Network:
    """Machines that can reach each other through a switch; see `network`, which makes them.

    Attributes
    ----------
    addresses : the IPv4 address of each machine, by its name.
    """

    def __init__(self, places: Sequence[Place], outer: Sequence[str], ask: Callable[[str], str]) -> None:
        self.addresses: Mapping[str, str] = {place.name: place.address.split("/")[0] for place in places}
        self._namespaces = {place.name: place.namespace for place in places}
        self._outer = list(outer)
        self._ask = ask

    def __repr__(self) -> str:
        return f"Network({', '.join(f'{name} {address}' for name, address in self.addresses.items())})"

    def prefix(self, machine: str) -> list[str]:
        """The words before a command that make it run on a machine."""
        return [*self._outer, "ip", "netns", "exec", self._namespace(machine)]

    def run(self, machine: str, command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on a machine to its end: `subprocess.run` with its options, and with texts instead of bytes."""
        return subprocess.run([*self.prefix(machine), *map(str, command)], text=True, check=False, **options)

    def start(self, machine: str, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start a command on a machine: `subprocess.Popen` with its options, and with texts instead of bytes."""
        return subprocess.Popen([*self.prefix(machine), *map(str, command)], text=True, **options)

    def cut(self, *machines: str) -> None:
        """Cut these machines' cables: nothing passes, and what is under way is lost, but nobody is told."""
        self.command("cut", *machines)

    def mend(self, *machines: str) -> None:
        """Undo `cut`."""
        self.command("mend", *machines)

    def part(self, *sets: Iterable[str]) -> None:
        """Let machines of different sets not reach each other; a machine of no set reaches all."""
        self.command("part", *(",".join(names) for names in sets))

    def close(self, source: str, destination: str) -> None:
        """Let nothing pass from the one to the other; the way back stays open."""
        self.command("close", source, destination)

    def heal(self) -> None:
        """Undo every `part` and `close`."""
        self.command("heal")

    def reshape(self, machine: str, shape: Shape, way: Way | None = None) -> None:
        """Let a machine's cable do something else from now on: in both directions unless one is named."""
        self.command("shape", machine, way.value if way else "both", *shape_words(shape))

    def shape_between(self, source: str, destination: str, shape: Shape) -> None:
        """Let the way from the one to the other do this too, besides what their cables do."""
        self.command("between", source, destination, *shape_words(shape))

    def plug(self, machine: str, *, is_in: bool) -> None:
        """Pull a machine's cable, or put it in again: like `cut` and `mend`, but its card notices."""
        self.command("plug" if is_in else "unplug", machine)

    def switch_card(self, machine: str, *, is_on: bool) -> None:
        """Switch a machine's network card on or off, as its user could: ``ip link set down``."""
        if said := _ip(self._outer, "-n", self._namespace(machine), "link", "set", CARD, "up" if is_on else "down"):
            raise InvariantError(f"the network card of {machine} could not be switched: {said}")

    def counts(self) -> dict[str, dict[str, int]]:
        """What has become of each machine's packets: the numbers of `yoke.testing.fabric.Counts` by name."""
        found: dict[str, dict[str, int]] = json.loads(self.command("counts"))
        return found

    def command(self, *words: str) -> str:
        """Let the switch obey a command of `yoke.testing.control`; it has taken effect when this returns, with what the switch answers.

        Raises
        ------
        UserError
            if it cannot be obeyed.
        InvariantError
            if the switch has ended, or does not answer.
        """
        verdict, _, rest = self._ask(" ".join(words)).partition(" ")
        if verdict == "error":
            raise UserError(rest)
        if verdict != "ok":
            raise InvariantError(f"the switch has failed: {verdict} {rest}")
        return rest

    def _namespace(self, machine: str) -> str:
        if machine not in self._namespaces:
            raise UserError(f"there is no machine {machine!r} in this network; expected one of {', '.join(self._namespaces)}")
        return self._namespaces[machine]


@contextlib.contextmanager
def network(
    machines: Sequence[str], profile: Profile = WIRED, *, seed: int = 0, spin_us: float = 0.0, is_realtime: bool = False, subnet: str = SUBNET
) -> Iterator[Network]:
    """Machines with a network like ``profile`` between them, for as long as the context lasts; then they are gone, with all that still runs on them.

    The first has the address ``subnet`` .1, and so on. Without root, a user namespace of our own is tried. What earlier runs left because they were killed
    is taken away first.

    Parameters
    ----------
    machines : their names: letters, digits and hyphens.
    seed : decides which packets are lost, and all other draws.
    spin_us, is_realtime : for measurements; see `yoke.testing.switch`.

    Raises
    ------
    NetworkUnavailable
        if this system does not let us.
    UserError
        if a name does not fit, or there are two of it, or too many.
    """
    places = _places(machines, subnet)
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(_house())
        for name in _names(outer):
            if (left := _OURS.match(name)) and not Path("/proc", left[1]).exists():
                _remove(outer, name)
        for place in places:
            stack.callback(_remove, outer, place.namespace)
            if said := _ip(outer, "netns", "add", place.namespace):
                raise NetworkUnavailable(f"network namespaces are not allowed here: {said}")
        flags = ["--seed", str(seed), "--spin-us", str(spin_us), *(["--realtime"] if is_realtime else [])]
        ask = stack.enter_context(_switch([*outer, sys.executable, "-m", "yoke.testing.switch", *flags, *map(str, places)]))
        made = Network(places, outer, ask)
        for place, cable in zip(places, profile.cables_for(len(places)), strict=True):
            made.reshape(place.name, cable)
        yield made


def _places(machines: Sequence[str], subnet: str) -> list[Place]:
    """Where each machine will be: in a namespace whose name is nobody else's."""
    if not 1 <= len(machines) <= MAX_MACHINES or len(set(machines)) < len(machines):
        raise UserError(f"a network has the machines {', '.join(machines)!r}; expected 1 to {MAX_MACHINES}, each with a name of its own")
    if wrong := [name for name in machines if not _NAME.fullmatch(name)]:
        raise UserError(f"a machine is called {wrong[0]!r}; expected letters, digits and hyphens")
    run = f"yoke-{os.getpid()}-{next(_numbers)}"
    return [Place(name=name, namespace=f"{run}-{name}", address=f"{subnet}.{index}/24") for index, name in enumerate(machines, start=1)]


@contextlib.contextmanager
def _house() -> Iterator[list[str]]:
    """The words before a command that let it make and enter namespaces: none for root."""
    if sys.platform != "linux":
        raise NetworkUnavailable(f"network namespaces need Linux; this is {sys.platform}")
    is_root = os.geteuid() == 0
    for program in ("ip",) if is_root else ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            raise NetworkUnavailable(f"network namespaces need the command {program}, which is not installed here")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise NetworkUnavailable(f"{DEVICE} cannot be read and written by this user; expected a kernel with tun, and root or a file mode that lets you")
    if is_root:
        yield []
        return
    with _listener(_HOUSE) as (holder, ask):
        if (said := ask("")) != READY:
            raise NetworkUnavailable(f"without root, network namespaces need user namespaces, which are not allowed here: {said}")
        yield ["nsenter", f"--target={holder}", "--user", "--preserve-credentials", "--net", "--mount", "--wd=.", "--"]


@contextlib.contextmanager
def _switch(command: Sequence[str]) -> Iterator[Callable[[str], str]]:
    with _listener(command) as (_, ask):
        said = ask("")
        if said.startswith("error "):
            raise NetworkUnavailable(said.removeprefix("error "))
        if said != READY:
            raise InvariantError(f"the switch has failed: {said}")
        yield ask


@contextlib.contextmanager
def _listener(command: Sequence[str]) -> Iterator[tuple[int, Callable[[str], str]]]:
    """A process that ends when its input does: its id, and what sends it a line (or nothing) and returns the next line that it prints."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    lock = threading.Lock()

    def ask(line: str) -> str:
        if process.stdin is None or process.stdout is None:
            raise InvariantError("a process was started with pipes and has none")
        with lock, contextlib.suppress(BrokenPipeError):  # what it said at its end is there to be read
            if line:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            if not select.select([process.stdout], [], [], REPLY_S)[0]:
                raise InvariantError(f"{command[0]} did not answer {line!r} within {REPLY_S:g} s")
            said = process.stdout.readline()
        if not said:
            raise InvariantError(f"{' '.join(command)} ended with exit code {process.wait(END_S)} instead of answering {line!r}")
        return said.rstrip("\n")

    try:
        yield process.pid, ask
    finally:
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _names(outer: Sequence[str]) -> list[str]:
    """All network namespaces that have a name."""
    listed = subprocess.run([*outer, "ip", "netns", "list"], capture_output=True, text=True, check=False, timeout=END_S)
    return [line.split()[0] for line in listed.stdout.splitlines() if line]


def _remove(outer: Sequence[str], namespace: str) -> None:
    """Take a namespace away, and end what still runs in it."""
    if namespace not in _names(outer):
        return
    deadline_s = time.monotonic() + END_S
    while pids := _pids(outer, namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            raise InvariantError(f"the processes {pids} in the namespace {namespace!r} do not end")
    if said := _ip(outer, "netns", "del", namespace):
        raise InvariantError(f"the namespace {namespace!r} could not be removed: {said}")


def _pids(outer: Sequence[str], namespace: str) -> list[int]:
    listed = subprocess.run([*outer, "ip", "netns", "pids", namespace], capture_output=True, text=True, check=False, timeout=END_S)
    return [int(word) for word in listed.stdout.split()]


def _ip(outer: Sequence[str], *words: str) -> str:
    """Run ``ip``; what it has to complain about, nothing if it has done its work."""
    done = subprocess.run([*outer, "ip", *words], capture_output=True, text=True, check=False, timeout=END_S)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""

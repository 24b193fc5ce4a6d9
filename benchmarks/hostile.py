"""Two real ports under fire: a door and a data listener, each in a process of its own, while a member's two connections go on exchanging. Linux.

Three windows are measured: quiet; the attackers busy with a decoy (another door and listener), which is what they cost by merely taking processor time; and
the attackers busy with the real ports. Prints latency in each, what was thrown and how it was taken, and memory.

usage: python benchmarks/hostile.py [--throws 100000] [--attackers 2] [--window-s 10]
"""

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.net.channel import receive_message
from yoke.net.codec import HELLO_LIMITS
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, TcpChannel, connect
from yoke.node.admission import knock
from yoke.node.door import Door, Guest
from yoke.node.membership import Membership
from yoke.testing.hostile import Attacker, Target

MESSAGE_BYTES = 4096
PAUSE_S = 0.005  # between exchanges: a token's time


def identity(home: Path, name: str) -> Identity:
    return Identity.load_or_create(home / name)


# The ports, each in a process of its own: they tell their number, and answer questions until the pipe closes


def door_process(home: Path, name: str, pipe: Connection) -> None:
    first = identity(home, name)
    faults: list[str] = []

    async def echo(guest: Guest) -> None:
        reader, writer = guest.stream
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                writer.write(await reader.readexactly(MESSAGE_BYTES))
        writer.close()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(repr(context)))
        echoes = set()

        async def welcome(guest: Guest) -> None:
            echoes.add(asyncio.create_task(echo(guest)))

        async with Door(first, Membership(home / f"{name}-members", first.id, name), ("127.0.0.1", 0), welcome, lambda _: False) as door:
            pipe.send((door.port, door.invite(uses=100)))
            while await loop.run_in_executor(None, is_asked, pipe):
                gc.collect()
                pipe.send({**asdict(door.counts), "faults of ours": len(faults)})

    asyncio.run(serve())


def data_process(home: Path, name: str, pipe: Connection) -> None:
    members = [identity(home, who).certificate_der for who in (name, "friend", "traitor")]
    listener = Listener("127.0.0.1", 0, identity(home, name), members)
    friend, counts = identity(home, "friend").id, Counter[str]()

    def take(channel: TcpChannel) -> None:
        data = bytearray(MESSAGE_BYTES)
        try:
            if channel.peer != friend:
                channel.set_timeout(5.0)
                receive_message(channel, HELLO_LIMITS)
                counts["member's messages in order"] += 1
            while channel.peer == friend:
                channel.receive_into(memoryview(data))
                channel.send(data)
        except RemoteProtocolError:
            counts["member's messages refused"] += 1
        except NodeGone:
            counts["member hung up"] += 1
        finally:
            channel.close()

    def accept() -> None:
        with contextlib.suppress(NodeGone):
            while (channel := listener.accept()) is not None:
                threading.Thread(target=take, args=(channel,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    pipe.send((listener.address[1], None))
    while is_asked(pipe):
        gc.collect()
        pipe.send({**counts, "strangers refused": listener.refused, "threads": threading.active_count()})
    listener.close()


def is_asked(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True


# The friend, who measures, and the attackers


def friend_process(home: Path, door: tuple[int, Any], data: tuple[int, None], pipe: Connection) -> None:
    own, first = identity(home, "friend"), identity(home, "real")
    channel = connect(("127.0.0.1", data[0]), first.id, own, [first.certificate_der], deadline_s=10)
    buffer = bytearray(MESSAGE_BYTES)

    def exchange() -> None:
        channel.send(buffer)
        channel.receive_into(memoryview(buffer))

    async def converse() -> None:
        reader, writer = await knock(door[1], own)

        async def exchange_control() -> None:
            writer.write(buffer)
            await reader.readexactly(MESSAGE_BYTES)

        pipe.send("ready")
        while (until_s := await asyncio.to_thread(asked_for, pipe)) is not None:
            control, other = await asyncio.gather(latencies(exchange_control, until_s), asyncio.to_thread(blocking_latencies, exchange, until_s))
            pipe.send({"control": control, "data": other})
        writer.close()

    asyncio.run(converse())


def asked_for(pipe: Connection) -> float | None:
    try:
        return float(pipe.recv())
    except EOFError:
        return None


async def latencies(exchange: Callable[[], Any], window_s: float) -> list[float]:
    found, end = [], time.perf_counter() + window_s
    while time.perf_counter() < end:
        began = time.perf_counter()
        await exchange()
        found.append(time.perf_counter() - began)
        await asyncio.sleep(PAUSE_S)
    return found


def blocking_latencies(exchange: Callable[[], Any], window_s: float) -> list[float]:
    found, end = [], time.perf_counter() + window_s
    while time.perf_counter() < end:
        began = time.perf_counter()
        exchange()
        found.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)
    return found


def attacker_process(home: Path, target: Target, seed: int, n_throws: int, pipe: Connection) -> None:
    attacker = Attacker(target, identity(home, "stranger"), identity(home, "traitor"), seed=seed, sources=20_000, wait_s=0.02)
    kinds = list(attacker.kinds)
    for index in range(n_throws):
        attacker.throw(kinds[index % len(kinds)])
    attacker.stop()
    pipe.send((attacker.counts, attacker.heard_bytes))


@dataclass
class Running:
    """A process and this end of its pipe."""

    process: BaseProcess
    pipe: Connection
    first: Any = None

    @classmethod
    def start(cls, work: Callable[..., None], *arguments: object) -> "Running":
        """Run ``work`` with the arguments and the other end of the pipe."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def ask(self, question: object = None) -> Any:
        """A question's answer."""
        self.pipe.send(question)
        return self.pipe.recv()

    @property
    def memory_bytes(self) -> int:
        """What the process has in memory now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


def attack(home: Path, name: str, ports: dict[str, Running], n_throws: int, n_attackers: int) -> list[Running]:
    first = identity(home, name)
    target = Target(coordinator=first.id, door_port=ports["door"].first[0], data_port=ports["data"].first[0], certificates=(first.certificate_der,))
    return [Running.start(attacker_process, home, target, seed, n_throws // n_attackers) for seed in range(n_attackers)]


def report(title: str, found: dict[str, list[float]]) -> None:
    for plane, values in found.items():
        cuts = statistics.quantiles(values, n=1000)
        figures = "  ".join(f"{name} {1000 * value:8.2f}" for name, value in (("p50", cuts[499]), ("p99", cuts[989]), ("max", max(values))))
        print(f"{title:<28} {plane:<8} {figures}  ms  ({len(values)} exchanges of {MESSAGE_BYTES} bytes)")


def open_ports(home: Path, name: str) -> dict[str, Running]:
    ports = {"door": Running.start(door_process, home, name), "data": Running.start(data_process, home, name)}
    for port in ports.values():
        port.first = port.pipe.recv()
    return ports


def under_fire(home: Path, name: str, ports: dict[str, Running], friend: Running, n_throws: int, options: argparse.Namespace) -> dict[str, int]:
    """Measure for as long as an attack lasts: the most memory that each port's process had."""
    began = time.perf_counter()
    attackers = attack(home, name, ports, n_throws, options.attackers)
    fire: dict[str, list[float]] = {}
    peak = {what: port.memory_bytes for what, port in ports.items()}
    while not all(attacker.pipe.poll() for attacker in attackers):
        for plane, values in friend.ask(2.0).items():
            fire.setdefault(plane, []).extend(values)
        peak = {what: max(peak[what], port.memory_bytes) for what, port in ports.items()}
    took_s = time.perf_counter() - began
    thrown = Counter[str]()
    for attacker in attackers:
        counts, _ = attacker.pipe.recv()
        thrown += counts
    report(f"attackers at the {name} ports", fire)
    print(f"  {thrown.total()} thrown in {took_s:.0f} s: " + ", ".join(f"{kind} {number}" for kind, number in sorted(thrown.items())))
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--throws", type=int, default=100_000)
    parser.add_argument("--attackers", type=int, default=2)
    parser.add_argument("--window-s", type=float, default=10.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        for name in ("real", "decoy", "friend", "stranger", "traitor"):
            identity(home, name)
        real, decoy = open_ports(home, "real"), open_ports(home, "decoy")
        friend = Running.start(friend_process, home, real["door"].first, real["data"].first)
        friend.pipe.recv()
        report("quiet", friend.ask(options.window_s))

        under_fire(home, "decoy", decoy, friend, max(2000, options.throws // 20), options)
        before = {name: (port.ask(), port.memory_bytes)[1] for name, port in real.items()}
        peak = under_fire(home, "real", real, friend, options.throws, options)
        for name, port in real.items():
            counts = port.ask()
            growth = f"before {before[name] / 1e6:.1f}, peak {peak[name] / 1e6:.1f}, after {port.memory_bytes / 1e6:.1f} MB"
            print(f"{name}: {growth}; " + ", ".join(f"{what} {number}" for what, number in counts.items()))
        for running in (friend, *real.values(), *decoy.values()):
            running.pipe.close()
            running.process.join(10)


if __name__ == "__main__":
    main()

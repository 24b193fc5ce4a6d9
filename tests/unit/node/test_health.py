"""Each verdict by an example: one thing is wrong with an otherwise healthy machine, and one finding says so and what to do."""

import re
from dataclasses import replace

import pytest

from yoke.node.health import Facts, Ggml, Level, Network, Package, Processor, Room, Software, findings, is_well
from yoke.node.reach import Call, Interface, Outcome, PortUse
from yoke.node.surroundings import Battery

LLAMA = Package(name="llama-cpp-python", wanted="==0.3.36", found="0.3.36", is_right=True)
SOFTWARE = Software(
    python=(3, 12, 1),
    bits=64,
    yoke="1.0",
    packages=(LLAMA,),
    ggml=Ggml(version="0.25.3", devices=("CPU (a chip)",), features=frozenset({"AVX2", "FMA"})),
)
PROCESSOR = Processor(machine="x86_64", flags=frozenset({"avx2"}), n_cores=4, n_allowed=4, others_cores=0.1)
ROOM = Room(
    available_bytes=16 << 30,
    swapped_bytes=0,
    state_dir="/home/ann/yoke",
    state_dir_exists=True,
    is_writable=True,
    state_dir_mode=0o700,
    key_mode=0o600,
    free_disk_bytes=100 << 30,
)
NETWORK = Network(
    hostname="attic",
    addresses=("192.168.1.10",),
    interface=Interface(name="eth0", is_wireless=False, mbit_per_s=1000),
    host="127.0.0.1",
    port=8080,
    port_use=PortUse.FREE,
)
HEALTHY = Facts(software=SOFTWARE, processor=PROCESSOR, room=ROOM, network=NETWORK, battery=None, virtual_machine="")


def software(**changes):
    return replace(HEALTHY, software=replace(SOFTWARE, **changes))


def processor(**changes):
    return replace(HEALTHY, processor=replace(PROCESSOR, **changes))


def room(**changes):
    return replace(HEALTHY, room=replace(ROOM, **changes))


def network(**changes):
    return replace(HEALTHY, network=replace(NETWORK, **changes))


def call(outcome, **changes):
    return Call(**{"host": "10.0.0.5", "port": 7000, "outcome": outcome, "seconds": 0.02} | changes)


def test_nothing_is_wrong_with_a_healthy_machine():
    found = findings(HEALTHY)
    assert {finding.level for finding in found} == {Level.OK}
    assert not any(finding.remedy for finding in found)
    assert {"python", "packages", "ggml", "processor", "cores", "load", "memory", "state", "disk", "link", "name", "port"} == {f.subject for f in found}
    assert is_well(found)


WRONG = {
    "old python": (software(python=(3, 10, 4)), Level.BAD, "python", "3.10.4"),
    "a python of 32 bits": (software(bits=32), Level.BAD, "python", "32 bits"),
    "yoke is not installed": (software(packages=None), Level.WARN, "packages", "not installed"),
    "a package is missing": (software(packages=(replace(LLAMA, found=None, is_right=False),)), Level.BAD, "packages", "is missing"),
    "a package is too old": (software(packages=(replace(LLAMA, found="0.2", is_right=False),)), Level.BAD, "packages", "version 0.2, needed is llama-cpp"),
    "ggml fails": (software(ggml=Ggml(error="it was built for another processor")), Level.BAD, "ggml", "another processor"),
    "an old processor": (processor(flags=frozenset({"sse4_2"})), Level.WARN, "processor", "no AVX2"),
    "ggml without avx2": (software(ggml=replace(SOFTWARE.ggml, features=frozenset({"SSE3"}))), Level.WARN, "processor", "built without AVX2"),
    "ggml without avx512": (processor(flags=frozenset({"avx2", "avx512f"})), Level.WARN, "processor", "without AVX-512"),
    "few cores allowed": (processor(n_allowed=1), Level.WARN, "cores", "1 of 4"),
    "others compute": (processor(others_cores=2.0, busiest=(("game", 1.9),)), Level.WARN, "load", r"2.0 of 4 cores busy: game \(1.9\)"),
    "on battery": (replace(HEALTHY, battery=Battery(percent=55, is_plugged=False)), Level.WARN, "battery", "55 % full"),
    "powersave": (processor(governor="powersave", driver="acpi-cpufreq"), Level.WARN, "power", "powersave"),
    "told to save power": (processor(governor="powersave", driver="intel_pstate", preference="power"), Level.WARN, "power", "told to save"),
    "held back": (processor(limit_share=0.5), Level.WARN, "power", "held to 50 %"),
    "hot by its own limit": (processor(hottest_c=86.0, hot_c=85.0), Level.WARN, "heat", "86 degrees"),
    "hot by ours": (processor(hottest_c=97.0), Level.WARN, "heat", "limit 95"),
    "little memory": (room(available_bytes=900_000_000), Level.WARN, "memory", "0.9 GB"),
    "no memory": (room(available_bytes=100_000_000), Level.BAD, "memory", "too little"),
    "swapping": (room(swapped_bytes=3_000_000_000), Level.WARN, "swap", "3.0 GB"),
    "a foreign state directory": (room(is_writable=False), Level.BAD, "state", "cannot be written"),
    "an open state directory": (room(state_dir_mode=0o777), Level.BAD, "state", "others may write"),
    "an open key": (room(key_mode=0o644), Level.BAD, "state", "others may read"),
    "a broken profile": (room(profile_error="it holds no profile"), Level.WARN, "profile", "no profile"),
    "little disk": (room(free_disk_bytes=1_000_000_000), Level.WARN, "disk", "1.0 GB"),
    "no disk": (room(free_disk_bytes=1_000_000), Level.BAD, "disk", "0.0 GB"),
    "a slow disk": (room(disk_read_bytes_per_s=30e6), Level.WARN, "disk", "30 MB/s"),
    "no network": (network(interface=None), Level.WARN, "link", "no network"),
    "radio": (network(interface=Interface(name="wlan0", is_wireless=True, mbit_per_s=0)), Level.WARN, "link", "wlan0 is Wi-Fi"),
    "an old cable": (network(interface=Interface(name="eth0", is_wireless=False, mbit_per_s=100)), Level.WARN, "link", "100 Mbit/s"),
    "a name that leads nowhere": (network(addresses=()), Level.WARN, "name", "leads nowhere"),
    "a resolver that is silent": (network(addresses=None), Level.WARN, "name", "not answered for in time"),
    "a port that is taken": (network(port_use=PortUse.OTHER), Level.WARN, "port", "another program"),
    "a forbidden port": (network(port=80, port_use=PortUse.FORBIDDEN), Level.BAD, "port", "may not listen at port 80"),
    "a foreign address": (network(host="10.9.9.9", port_use=PortUse.NOT_HERE), Level.BAD, "port", "no address of this machine"),
    "a foreign clock": (network(server_skew_s=300.0), Level.WARN, "clock", "300 s behind"),
    "another key": (network(calls=(call(Outcome.ANOTHER_KEY),)), Level.BAD, "coordinator", "another node answers at 10.0.0.5 port 7000"),
    "no coordinator": (network(calls=(call(Outcome.NOT_YOKE),)), Level.BAD, "coordinator", "is no coordinator"),
    "nobody listens": (network(calls=(call(Outcome.REFUSED),)), Level.BAD, "coordinator", "nothing listens"),
    "a firewall": (network(calls=(call(Outcome.SILENT),)), Level.BAD, "coordinator", "nobody answers"),
    "no way": (network(calls=(call(Outcome.NO_WAY, detail="no route"),)), Level.BAD, "coordinator", r"no way leads to .* \(no route\)"),
    "no such name": (network(calls=(call(Outcome.NO_SUCH_NAME),)), Level.BAD, "coordinator", "leads nowhere"),
    "a slow coordinator": (network(calls=(call(Outcome.REACHED, seconds=0.9),)), Level.WARN, "coordinator", "900 ms"),
    "a coordinator of the past": (network(calls=(call(Outcome.REACHED, skew_s=-90.0),)), Level.WARN, "clock", "90 s ahead"),
}


@pytest.mark.parametrize(("facts", "level", "subject", "words"), WRONG.values(), ids=WRONG)
def test_one_thing_that_is_wrong_is_named_with_a_remedy(facts, level, subject, words):
    found = findings(facts)
    (wrong,) = [finding for finding in found if finding.level is not Level.OK]
    assert (wrong.level, wrong.subject) == (level, subject)
    assert re.search(words, wrong.sentence), wrong.sentence
    assert wrong.remedy
    assert is_well(found) is (level is Level.WARN)


@pytest.mark.parametrize(
    "facts",
    [
        replace(HEALTHY, battery=Battery(percent=20, is_plugged=True)),
        replace(HEALTHY, battery=Battery(percent=20, is_plugged=None)),
        replace(HEALTHY, virtual_machine="KVM"),
        replace(HEALTHY, virtual_machine=None),
        processor(governor="powersave", driver="intel_pstate"),
        processor(machine="aarch64", flags=frozenset({"asimd"})),
        processor(flags=None),
        processor(hottest_c=60.0, hot_c=85.0),
        software(ggml=replace(SOFTWARE.ggml, features=frozenset())),
        room(state_dir_exists=False, state_dir_mode=None, key_mode=None),
        room(disk_read_bytes_per_s=500e6),
        network(port_use=PortUse.YOKE, server_skew_s=0.4),
        network(interface=Interface(name="en0", is_wireless=None, mbit_per_s=0)),
        network(calls=(call(Outcome.REFUSED), call(Outcome.REACHED, host="10.0.0.6", skew_s=2.0), call(Outcome.SILENT))),
    ],
)
def test_what_is_usual_is_no_reason_to_worry(facts):
    assert {finding.level for finding in findings(facts)} == {Level.OK}


def test_a_coordinator_that_no_address_leads_to_is_missed_at_each():
    found = findings(network(calls=(call(Outcome.REFUSED), call(Outcome.SILENT, host="attic.local"))))
    wrong = [finding.sentence for finding in found if finding.level is Level.BAD]
    assert wrong == ["nothing listens at 10.0.0.5 port 7000", "nobody answers at attic.local port 7000"]


def test_the_version_that_is_there_is_the_one_to_compile():
    found = findings(software(ggml=replace(SOFTWARE.ggml, features=frozenset({"SSE3"}))))
    assert any("llama-cpp-python==0.3.36" in finding.remedy for finding in found)

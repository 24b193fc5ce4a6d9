"""What the system tells of itself: rules by examples, and the readings of the machine that runs the test."""

import os

import psutil
import pytest

from yoke.node.surroundings import Battery, Others, Usage, available_bytes, battery, disk_read_bytes_per_s, judge_virtual, sentences, usage, virtual_machine


@pytest.mark.parametrize(
    ("machine", "flags", "shown", "expected"),
    [
        ("x86_64", {"avx2"}, "dell inc. latitude", ""),
        ("x86_64", {"avx2"}, "amazon ec2 m5.metal", ""),
        ("x86_64", {"hypervisor"}, "qemu standard pc", "QEMU"),
        ("AMD64", {"hypervisor"}, "microsoft corporation virtual machine", "Hyper-V"),
        ("x86_64", {"hypervisor"}, "", "unknown kind"),
        ("x86_64", {"hypervisor"}, "microsoft corporation surface", "unknown kind"),
        ("x86_64", None, "", None),
        ("aarch64", {"asimd"}, "", None),
        ("aarch64", {"asimd"}, "qemu kvm virtual machine", "QEMU"),
        ("arm64", None, "", None),
    ],
)
def test_a_virtual_machine_is_known_by_its_flag_or_its_name(machine, flags, shown, expected):
    assert judge_virtual(machine, None if flags is None else frozenset(flags), shown) == expected


def test_notes_tell_of_battery_and_virtual_machine():
    assert sentences(None, "") == sentences(None, None) == sentences(Battery(percent=50, is_plugged=True), "") == ()
    assert sentences(Battery(percent=49.6, is_plugged=False), "KVM") == (
        "it runs on battery, which is 50 % full",
        "it is a virtual machine (KVM): others may use its cores and memory",
    )


def test_readings_of_this_machine_are_possible_ones():
    power, kind = battery(), virtual_machine()
    assert power is None or 0 <= power.percent <= 100
    assert kind is None or isinstance(kind, str)
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_a_disk_is_tried_without_leaving_a_trace(tmp_path):
    rate = disk_read_bytes_per_s(tmp_path)
    assert rate is None or rate > 1e5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="there is no file system in memory here")
def test_memory_is_not_passed_off_as_a_disk():
    assert disk_read_bytes_per_s("/dev/shm") is None


def test_others_are_all_but_ourselves():
    counts = iter([Usage(100.0, 10.0, 50.0), Usage(106.0, 13.0, 52.0), Usage(106.0, 17.0, 54.0)])
    others = Others(lambda: next(counts))
    assert others.cores() == 1.5
    assert others.cores() == 0.0, "two clocks that disagree make nobody work backwards"


def test_what_this_process_used_is_part_of_what_all_used():
    now = usage()
    assert now.own_s > 0
    assert now.all_s > 0

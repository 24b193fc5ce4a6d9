"""What was measured between two machines is known to the next server, as long as both are where they were."""

from pathlib import Path

import pytest

from yoke.core.node import NodeId
from yoke.node.linkbook import FILE_NAME, MAX_AGE_S, MAX_LINKS, LinkBook

A, B = NodeId("a" * 64), NodeId("b" * 64)
HOSTS = ("10.0.0.1", "10.0.0.2")


class Calendar:
    """A clock whose epoch is set by hand."""

    now = 1e9

    def epoch(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture
def clock() -> Calendar:
    return Calendar()


def test_a_measurement_is_found_by_the_next_one(tmp_path: Path, clock: Calendar) -> None:
    LinkBook(tmp_path, clock).keep((A, B), HOSTS, 1e-3, 1e8, 2e8)
    found = LinkBook(tmp_path, clock).find((A, B), HOSTS)
    assert found is not None
    assert (found.rtt_s, found.there_bytes_per_s, found.back_bytes_per_s) == (1e-3, 1e8, 2e8)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o077 == 0


def test_not_at_other_addresses_nor_for_ever(tmp_path: Path, clock: Calendar) -> None:
    book = LinkBook(tmp_path, clock)
    book.keep((A, B), HOSTS, 1e-3, 1e8, 2e8)
    assert book.find((A, B), ("10.0.0.1", "192.168.1.7")) is None
    assert book.find((B, A), HOSTS) is None
    clock.now += MAX_AGE_S + 1
    assert book.find((A, B), HOSTS) is None
    clock.now -= 2 * MAX_AGE_S
    assert book.find((A, B), HOSTS) is None, "measured in the future: the clock was wrong"


@pytest.mark.parametrize("data", [b"", b"[", b"[1]", b'[{"nodes": ["a", "b"]}]', b"[" * 100_000, b"\xff\xfe"])
def test_a_broken_file_is_no_fault(tmp_path: Path, clock: Calendar, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    book = LinkBook(tmp_path, clock)
    assert book.find((A, B), HOSTS) is None
    book.keep((A, B), HOSTS, 1e-3, 1e8, 2e8)
    assert LinkBook(tmp_path, clock).find((A, B), HOSTS) is not None


def test_a_directory_that_cannot_be_written_costs_nothing_but_measuring_again(tmp_path: Path, clock: Calendar) -> None:
    book = LinkBook(tmp_path / "missing", clock)
    book.keep((A, B), HOSTS, 1e-3, 1e8, 2e8)
    assert book.find((A, B), HOSTS) is not None
    assert not (tmp_path / "missing").exists()


def test_the_oldest_are_forgotten(tmp_path: Path, clock: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoke.node.linkbook.MAX_LINKS", 3)
    assert MAX_LINKS > 1000
    book = LinkBook(tmp_path, clock)
    others = [NodeId(f"{number:064x}") for number in range(5)]
    for other in others:
        clock.now += 1
        book.keep((A, other), HOSTS, 1e-3, 1e8, 2e8)
    assert [book.find((A, other), HOSTS) is not None for other in others] == [False, False, True, True, True]

"""What is measured once is kept, and measured again when it no longer holds. The backend here counts what it is asked; chips and speeds are invented."""

import json
import os
import stat
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.backends.ops import ATTENTION, Chip
from yoke.core.errors import BackendError, SettingError
from yoke.core.node import Rate
from yoke.node import profile
from yoke.node.profile import (
    DISTURBED_AGE_S,
    FILE_NAME,
    MAX_AGE_S,
    Ask,
    Book,
    Entry,
    Key,
    find,
    introduction,
    read_book,
    take_profile,
    thread_counts,
    with_entry,
    write_book,
)

CPU = Chip(name="CPU", description="a chip", free_bytes=8 << 30, threads=3, is_host=True)
GPU = Chip(name="GPU0", description="a card", free_bytes=4 << 30, threads=1, is_host=False)
KEY = Key(machine="x86_64", cores=4, memory_gib=16, backend="counting", version="1.0", threads=3, chips=(("CPU", "a chip"),))
ENTRY = Entry(key=KEY, measured_at=1000.0, rates={"CPU": (Rate(weight_type="Q4_0", threads=3, matvec_bytes_per_s=1e9, matmul_flop_per_s=1e10),)})


class CountingBackend:
    """Invented chips. ``asked`` is what was measured, in order."""

    name = "counting"

    def __init__(self, *chips, version="1.0", lacks=()):
        self._chips, self.version, self._lacks, self.asked = chips, version, lacks, []

    def chips(self):
        return self._chips

    def measure(self, device, weight_type, thread_counts, budget_s):
        self.asked.append((device, weight_type, tuple(thread_counts)))
        if (device, weight_type) in self._lacks:
            return ()
        return tuple(Rate(weight_type=weight_type, threads=n, matvec_bytes_per_s=n * 1e9, matmul_flop_per_s=n * 1e11) for n in thread_counts)


class StillClock:
    """A time that only moves when it is told to."""

    def __init__(self, now=1e9):
        self.now = now

    def monotonic(self):
        return self.now

    def epoch(self):
        return self.now


@pytest.fixture(autouse=True)
def others(monkeypatch):
    """What other programs compute, in cores: nothing, unless a test says so."""
    busy = {"cores": 0.0}

    class Others:
        def cores(self):
            return busy["cores"]

    monkeypatch.setattr(profile, "Others", Others)
    return busy


@pytest.fixture
def clock():
    return StillClock()


WITHOUT_DISK = Ask(weight_types=("Q4_0", "F16"), disk=False)


def test_what_was_measured_is_not_measured_again(tmp_path, clock):
    backend = CountingBackend(CPU)
    first = take_profile(backend, tmp_path, WITHOUT_DISK, clock=clock)
    assert backend.asked == [("CPU", kind, (3, 1, 2)) for kind in ("Q4_0", "F16", ATTENTION)]
    assert first.measured == ("CPU Q4_0", "CPU F16", f"CPU {ATTENTION}")
    again = take_profile(CountingBackend(CPU), tmp_path, WITHOUT_DISK, clock=clock)
    assert again.measured == ()
    assert [device.rates for device in again.devices] == [device.rates for device in first.devices]


def test_a_device_runs_at_the_first_type_that_was_asked_for(tmp_path, clock):
    (device,) = take_profile(CountingBackend(CPU), tmp_path, WITHOUT_DISK, clock=clock).devices
    assert (device.name, device.threads, device.matvec_bytes_per_s) == ("CPU", 3, 3e9)
    assert (device.rates[0].weight_type, device.rates[0].threads) == ("Q4_0", 3)
    (other,) = take_profile(CountingBackend(CPU), tmp_path, replace(WITHOUT_DISK, weight_types=("F16",)), clock=clock).devices
    assert other.rates[0].weight_type == "F16"
    assert {(rate.weight_type, rate.threads) for rate in other.rates} == {(kind, n) for kind in ("Q4_0", "F16", ATTENTION) for n in (1, 2, 3)}


def test_an_introduction_measures_one_type_with_one_number_of_threads(tmp_path, clock):
    backend = CountingBackend(CPU, GPU)
    take_profile(backend, tmp_path, introduction("Q8_0"), clock=clock)
    assert backend.asked == [("CPU", "Q8_0", (3,)), ("CPU", ATTENTION, (3,)), ("GPU0", "Q8_0", (1,)), ("GPU0", ATTENTION, (1,))]


def test_what_an_introduction_left_out_is_measured_later_and_kept_beside_it(tmp_path, clock):
    take_profile(CountingBackend(CPU), tmp_path, introduction("Q8_0"), clock=clock)
    backend = CountingBackend(CPU)
    take_profile(backend, tmp_path, WITHOUT_DISK, clock=clock)
    assert ("CPU", ATTENTION, (3, 1, 2)) in backend.asked, "fewer threads were not measured yet"
    backend = CountingBackend(CPU)
    assert take_profile(backend, tmp_path, introduction("Q8_0"), clock=clock).measured == ()


@pytest.mark.parametrize(
    "other",
    [
        CountingBackend(CPU, version="1.1"),
        CountingBackend(replace(CPU, description="another chip")),
        CountingBackend(replace(CPU, threads=2)),
        CountingBackend(CPU, GPU),
    ],
    ids=["library", "chip", "threads", "one more chip"],
)
def test_another_library_chip_or_number_of_threads_is_measured_anew_and_the_old_profile_stays(tmp_path, clock, other):
    take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    assert take_profile(other, tmp_path, introduction(), clock=clock).measured
    assert take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock).measured == ()


def test_an_old_profile_is_measured_anew(tmp_path, clock):
    take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    clock.now += MAX_AGE_S + 1
    assert take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock).measured == ("CPU Q4_0", f"CPU {ATTENTION}")


def test_what_was_measured_beside_other_programs_is_kept_for_an_hour(tmp_path, clock, others):
    others["cores"] = 64.0
    busy = take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    assert busy.devices
    assert any("other programs kept 64.0" in note for note in busy.notes)
    others["cores"] = 0.0
    again = take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    assert (again.measured, again.notes) == ((), busy.notes)
    clock.now += DISTURBED_AGE_S + 1
    calm = take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    assert calm.measured
    assert not any("other programs" in note for note in calm.notes)


def test_a_device_that_cannot_compute_with_the_type_is_left_out(tmp_path, clock):
    found = take_profile(CountingBackend(CPU, GPU, lacks=[("GPU0", "Q4_0")]), tmp_path, introduction(), clock=clock)
    assert [device.name for device in found.devices] == ["CPU"]


def test_a_machine_that_cannot_compute_with_the_type_says_so(tmp_path, clock):
    with pytest.raises(BackendError, match=r"no device of counting 1\.0 can compute with weights in Q4_0"):
        take_profile(CountingBackend(CPU, lacks=[("CPU", "Q4_0")]), tmp_path, introduction(), clock=clock)


def test_progress_names_what_is_measured_and_never_goes_back(tmp_path, clock):
    told = []
    take_profile(CountingBackend(CPU), tmp_path, Ask(weight_types=("Q4_0", "F16")), tell=lambda what, share: told.append((what, share)), clock=clock)
    assert [what for what, _ in told] == ["CPU Q4_0", "CPU F16", f"CPU {ATTENTION}", "disk"]
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1


def test_a_broken_profile_is_measured_anew_and_somebody_is_told(tmp_path, clock):
    (tmp_path / FILE_NAME).write_text("{")
    found = take_profile(CountingBackend(CPU), tmp_path, introduction(), clock=clock)
    assert found.measured
    assert any("measured anew" in note and "holds no profile" in note for note in found.notes)
    assert read_book(tmp_path / FILE_NAME).entries


def test_the_file_is_its_owners_alone_and_no_draft_is_left(tmp_path):
    write_book(tmp_path / "deep" / FILE_NAME, Book(format=profile.FORMAT, entries=(ENTRY,)))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [FILE_NAME]
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "deep" / FILE_NAME).stat().st_mode) == 0o600


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot keep this machine's profile in"):
        write_book(tmp_path / "file" / FILE_NAME, Book(format=profile.FORMAT))


def written(tmp_path, change):
    """A file that is right but for one change of its JSON."""
    write_book(tmp_path / FILE_NAME, Book(format=profile.FORMAT, entries=(ENTRY,)))
    data = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(change(data) or data))
    return tmp_path / FILE_NAME


def rate_of(data):
    return data["entries"][0]["rates"]["CPU"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(more=1),
        lambda data: data.update(entries=5),
        lambda data: data["entries"][0].pop("key"),
        lambda data: data["entries"][0].update(measured_at="today"),
        lambda data: data["entries"][0]["key"].update(threads="three"),
        lambda data: rate_of(data).update(matvec_bytes_per_s=-1.0),
        lambda data: rate_of(data).update(matvec_bytes_per_s=1e300),
        lambda data: rate_of(data).update(matmul_flop_per_s=None),
        lambda data: rate_of(data).update(threads=0),
        lambda data: data["entries"][0].update(disk_read_bytes_per_s=0),
        lambda data: data.update(entries=data["entries"] * 17),
        lambda data: [data],
    ],
)
def test_a_file_that_says_anything_else_is_not_believed(tmp_path, change):
    with pytest.raises(SettingError, match=FILE_NAME):
        read_book(written(tmp_path, change))


def test_a_file_of_another_format_counts_as_none(tmp_path):
    assert read_book(written(tmp_path, lambda data: {"format": 2, "rates": "in other words"})).entries == ()
    assert read_book(tmp_path / "none.json").entries == ()


@pytest.mark.skipif(os.name != "posix", reason="files have modes on POSIX alone")
def test_a_file_that_others_may_write_is_not_believed(tmp_path):
    path = written(tmp_path, lambda data: None)
    path.chmod(0o622)
    with pytest.raises(SettingError, match="others may write to"):
        read_book(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_bytes(b" " * (profile.MAX_FILE_BYTES + 1))
    path.chmod(0o600)
    with pytest.raises(SettingError, match="no plain file of at most"):
        read_book(path)


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_a_book_or_a_named_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(data)
    path.chmod(0o600)
    try:
        found = read_book(path)
    except SettingError:
        return
    assert isinstance(found, Book)


def test_the_book_keeps_the_newest_of_each_machine_and_not_too_many():
    book = Book(format=profile.FORMAT)
    for version in range(profile.MAX_ENTRIES + 5):
        entry = msgspec.structs.replace(ENTRY, key=msgspec.structs.replace(KEY, version=str(version)))
        book = with_entry(with_entry(book, entry), msgspec.structs.replace(entry, measured_at=2000.0))
    assert len(book.entries) == profile.MAX_ENTRIES
    assert {entry.measured_at for entry in book.entries} == {2000.0}
    assert find(book, KEY, 2000.0) is None
    newest = book.entries[0]
    assert find(book, newest.key, 2000.0 + MAX_AGE_S) == newest
    assert find(book, newest.key, 2000.1 + MAX_AGE_S) is None
    assert find(book, newest.key, 1999.0) is None, "a profile of the future is no profile"


def test_the_chosen_number_of_threads_is_measured_first():
    assert thread_counts(CPU, every_count=True) == (3, 1, 2)
    assert thread_counts(CPU, every_count=False) == (3,)
    assert thread_counts(GPU, every_count=True) == (1,)
    assert thread_counts(replace(CPU, threads=24), every_count=True) == (24, 1, 2, 4, 8, 16)

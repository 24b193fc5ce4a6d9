"""What is kept in the state directory, and that nothing else is believed."""

import json
import os
import stat

import pytest

from yoke.core.errors import RequestError, SettingError
from yoke.core.node import NodeId
from yoke.net.identity import Identity
from yoke.node.membership import MAX_FILE_BYTES, Joined, Membership, forget, remember, remembered
from yoke.node.roster import Applicant, Refused, Why


class SetClock:
    """A clock that stands where it is put."""

    now_s = 1_000_000.0

    def monotonic(self):
        return self.now_s

    def epoch(self):
        return self.now_s


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    home = tmp_path_factory.mktemp("keys")
    return [Identity.load_or_create(home / str(number)) for number in range(4)]


@pytest.fixture
def clock():
    return SetClock()


@pytest.fixture
def open_membership(tmp_path, people, clock):
    return lambda directory=tmp_path: Membership(directory, people[0].id, "hall", clock)


def applicant(identity, certificate=None, host="10.0.0.9"):
    return Applicant(id=identity.id, certificate=certificate or identity.certificate_der, host=host)


def invite(membership, **options):
    return membership.invite(("10.0.0.1", "fd00::1"), 4433, **options)


def test_members_invites_and_port_are_there_after_a_restart(open_membership, people, clock):
    membership = open_membership()
    first = invite(membership, uses=2, valid_s=60.0, label="party")
    membership.keep_port(4433)
    membership.admit_by_secret(applicant(people[1]), first.secret)
    assert membership.introduce(people[1].id, "attic") == "attic"

    again = open_membership()
    assert [(member.id, member.name, member.certificate) for member in again.members] == [(people[1].id, "attic", people[1].certificate_der)]
    assert [(left.label, left.uses_left) for left in again.invites] == [("party", 1)]
    assert again.port == 4433
    assert again.admit_by_key(applicant(people[1])).name == "attic"
    assert again.admit_by_secret(applicant(people[2]), first.secret).id == people[2].id
    clock.now_s += 61.0
    assert again.invites == ()


def test_invite_says_where_and_whom_and_its_secret_is_not_in_the_file(open_membership, people, tmp_path):
    made = invite(open_membership())
    assert (made.node_id, made.hosts, made.port) == (people[0].id, ("10.0.0.1", "fd00::1"), 4433)
    text = (tmp_path / "members.json").read_text()
    assert made.secret.hex() not in text
    assert len({invite(open_membership()).secret for _ in range(10)}) == 10


def test_file_is_for_its_owner_alone_and_no_draft_is_left(open_membership, tmp_path):
    invite(open_membership())
    assert stat.S_IMODE((tmp_path / "members.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["members.json"]


def test_removal_holds_after_a_restart(open_membership, people):
    membership = open_membership()
    made = invite(membership, uses=5)
    membership.admit_by_secret(applicant(people[1]), made.secret)
    name = membership.introduce(people[1].id, "attic")
    assert membership.remove(name).id == people[1].id
    assert not membership.is_member(people[1].id)
    again = open_membership()
    for knock in (lambda: again.admit_by_key(applicant(people[1])), lambda: again.admit_by_secret(applicant(people[1]), made.secret)):
        with pytest.raises(Refused) as caught:
            knock()
        assert caught.value.why is Why.REMOVED
    with pytest.raises(Refused):
        again.introduce(people[1].id, "attic")
    with pytest.raises(RequestError, match="no machine named"):
        again.remove(name)


def test_another_process_that_changes_the_file_is_heeded_at_once(open_membership, people):
    """A server runs while somebody removes a machine: it must neither let it in again nor write it back."""
    serving, other = open_membership(), open_membership()
    serving.admit_by_code(applicant(people[1]))
    name = serving.introduce(people[1].id, "attic")
    other.remove(name)
    with pytest.raises(Refused):
        serving.admit_by_key(applicant(people[1]))
    serving.admit_by_code(applicant(people[2]))
    assert [member.id for member in other.members] == [people[2].id]


def test_machines_that_belong_for_now_are_not_written_down(open_membership, people, tmp_path):
    membership = open_membership()
    passing = invite(membership, uses=2, is_lasting=False)
    membership.admit_by_secret(applicant(people[1]), passing.secret)
    membership.introduce(people[1].id, "local-1")
    assert os.listdir(tmp_path) == []
    invite(open_membership())  # another process writes
    assert membership.admit_by_key(applicant(people[1])).name == "local-1"
    assert open_membership().members == ()


def test_membership_without_a_directory_keeps_nothing(open_membership, people, tmp_path):
    membership = open_membership(None)
    membership.admit_by_secret(applicant(people[1]), invite(membership).secret)
    assert len(membership.members) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("certificate", ["another's", b"no certificate"])
def test_certificate_that_is_not_the_keys_is_refused_and_uses_nothing_up(open_membership, people, certificate):
    membership = open_membership()
    made = invite(membership)
    wrong = applicant(people[1], people[2].certificate_der if certificate == "another's" else certificate)
    with pytest.raises(Refused) as caught:
        membership.admit_by_secret(wrong, made.secret)
    assert caught.value.why is Why.FORGED
    assert membership.members == ()
    assert membership.admit_by_secret(applicant(people[1]), made.secret)


def test_certificate_of_a_stranger_is_not_looked_at(open_membership, people):
    """Who was not invited reaches no parser: the refusal is of the secret."""
    with pytest.raises(Refused) as caught:
        open_membership().admit_by_secret(applicant(people[1], b"\x30" * 2000), bytes(10))
    assert caught.value.why is Why.NOT_INVITED


def test_coordinators_own_key_does_not_join_its_own_cluster(open_membership, people):
    membership = open_membership()
    with pytest.raises(Refused) as caught:
        membership.admit_by_secret(applicant(people[0]), invite(membership).secret)
    assert caught.value.why is Why.CONNECTED


@pytest.mark.parametrize("options", [{"uses": 0}, {"uses": 1001}, {"valid_s": 0.5}, {"valid_s": 1e9}, {"valid_s": float("nan")}, {"label": "x" * 41}])
def test_invite_out_of_bounds_is_refused(open_membership, options):
    with pytest.raises(RequestError, match="expected 1 to 1000 machines"):
        invite(open_membership(), **options)


def broken(tmp_path, data, case):
    """The file as somebody might have spoilt it, from one that is right."""
    (member,) = data["members"]
    match case:
        case "not JSON":
            return "{"
        case "another shape":
            return "[]"
        case "another version":
            data["version"] = 2
        case "unknown field":
            data["more"] = 1
        case "id":
            member["id"] = member["id"].upper()
        case "name":
            member["name"] = "a\x1b[31mb"
        case "another's certificate":
            member["certificate"] = "AAAA"
        case "one name twice":
            data["members"].append({**member, "id": "0" * 64})
        case "uses":
            data["invites"][0]["uses_left"] = 0
        case "too many":
            data["removed"] = [{"id": f"{number:064x}", "name": "x", "removed_at": 0.0} for number in range(300)]
        case "deep":
            return "[" * 100_000
        case "huge":
            return " " * (MAX_FILE_BYTES + 1)
    return json.dumps(data)


@pytest.mark.parametrize(
    "case",
    [
        *("not JSON", "another shape", "another version", "unknown field", "id", "name", "another's certificate"),
        *("one name twice", "uses", "too many", "deep", "huge"),
    ],
)
def test_broken_file_is_said_to_be_broken_and_not_overwritten(open_membership, people, tmp_path, case):
    membership = open_membership()
    membership.admit_by_code(applicant(people[1]))
    invite(membership)
    path = tmp_path / "members.json"
    text = broken(tmp_path, json.loads(path.read_text()), case)
    path.write_text(text)
    with pytest.raises(SettingError, match=r"members\.json .*move the file away"):
        open_membership()
    with pytest.raises(SettingError):
        membership.admit_by_code(applicant(people[2]))
    assert path.read_text() == text


def test_what_broken_makes_else_is_right(open_membership, people, tmp_path):
    membership = open_membership()
    membership.admit_by_code(applicant(people[1]))
    invite(membership)
    path = tmp_path / "members.json"
    path.write_text(broken(tmp_path, json.loads(path.read_text()), "none of them"))
    assert len(open_membership().members) == 1


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_file_that_others_may_read_is_refused(open_membership, tmp_path):
    invite(open_membership())
    (tmp_path / "members.json").chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        open_membership()


def test_disk_that_takes_nothing_admits_nobody(open_membership, people, tmp_path):
    """An admission counts only once it is written: else a use would be given twice after a crash."""
    directory = tmp_path / "state"
    membership = open_membership(directory)
    directory.write_text("a file where the directory should be")
    with pytest.raises(SettingError, match="cannot"):
        membership.admit_by_code(applicant(people[1]))
    directory.unlink()
    assert membership.members == ()


JOINED = Joined(cluster=NodeId("ab" * 32), hosts=("10.0.0.1",), port=4433, joined_at=5.0)


def test_joined_cluster_is_remembered_until_it_is_forgotten(tmp_path):
    assert remembered(tmp_path / "new") is None
    remember(tmp_path / "new", JOINED)
    assert remembered(tmp_path / "new") == JOINED
    assert stat.S_IMODE((tmp_path / "new" / "joined.json").stat().st_mode) == 0o600
    forget(tmp_path / "new")
    forget(tmp_path / "new")
    assert remembered(tmp_path / "new") is None


@pytest.mark.parametrize("change", [{"cluster": "zz"}, {"hosts": []}, {"hosts": ["a b"]}, {"port": 0}, {"port": 70000}, {"version": 3}, {"hosts": ["h"] * 9}])
def test_broken_memory_of_a_cluster_is_said_to_be_broken(tmp_path, change):
    remember(tmp_path, JOINED)
    path = tmp_path / "joined.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SettingError, match=r"move the file away .then join with an invite"):
        remembered(tmp_path)

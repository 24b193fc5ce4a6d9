"""Who belongs to the cluster, as a value: the time is an argument."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from yoke.core.errors import RequestError
from yoke.core.node import NodeId
from yoke.node.roster import MAX_INVITES, MAX_MEMBERS, MAX_NAME_CHARS, MAX_REMOVED, Applicant, Refused, Roster, Why, clean_name

SECRET, OTHER = bytes(range(10)), bytes(10)


def applicant(number: int, host: str = "10.0.0.9") -> Applicant:
    return Applicant(id=NodeId(f"{number:064x}"), certificate=b"certificate", host=host)


def invited(roster: Roster | None = None, secret: bytes = SECRET, uses: int = 1, expires_at: float = 100.0, **more: object) -> Roster:
    return (roster or Roster()).invited(secret, uses=uses, expires_at=expires_at, now=0.0, **more)  # type: ignore[arg-type]


def refusal(decide: object, *arguments: object) -> Why:
    with pytest.raises(Refused) as caught:
        decide(*arguments)  # type: ignore[operator]
    return caught.value.why


def test_invite_makes_a_member_once():
    roster = invited().admitted_by_secret(applicant(1), SECRET, 5.0)
    assert [(member.id, member.host, member.joined_at) for member in roster.members] == [(applicant(1).id, "10.0.0.9", 5.0)]
    assert roster.invites == ()
    assert refusal(roster.admitted_by_secret, applicant(2), SECRET, 5.0) is Why.NOT_INVITED


def test_invite_for_three_is_used_three_times():
    roster = invited(uses=3)
    for number in range(3):
        roster = roster.admitted_by_secret(applicant(number), SECRET, 0.0)
    assert refusal(roster.admitted_by_secret, applicant(3), SECRET, 0.0) is Why.NOT_INVITED
    assert len(roster.members) == 3


def test_invite_ends_at_its_time():
    roster = invited(expires_at=100.0)
    assert roster.admitted_by_secret(applicant(1), SECRET, 99.9).members
    assert refusal(roster.admitted_by_secret, applicant(1), SECRET, 100.0) is Why.NOT_INVITED


def test_wrong_secret_uses_nothing_up():
    roster = invited()
    assert refusal(roster.admitted_by_secret, applicant(1), OTHER, 0.0) is Why.NOT_INVITED
    assert roster.admitted_by_secret(applicant(1), SECRET, 0.0).members


def test_member_that_shows_its_old_invite_again_is_let_in_and_uses_nothing_up():
    """It may not have heard that it was let in."""
    roster = invited(uses=2).admitted_by_secret(applicant(1), SECRET, 0.0)
    again = roster.admitted_by_secret(applicant(1, "10.0.0.77"), SECRET, 1000.0)
    assert again.invites == roster.invites
    assert [member.host for member in again.members] == ["10.0.0.77"]


def test_member_comes_back_with_its_key_alone_and_a_stranger_does_not():
    roster = invited().admitted_by_secret(applicant(1), SECRET, 0.0)
    assert roster.admitted_by_key(applicant(1, "10.0.0.77")).members[0].host == "10.0.0.77"
    assert refusal(roster.admitted_by_key, applicant(2)) is Why.UNKNOWN


def test_removal_refuses_the_key_and_ends_every_invite_that_the_removed_machine_may_know():
    roster = invited(uses=5).admitted_by_secret(applicant(1), SECRET, 0.0)
    roster = invited(roster, secret=OTHER)
    roster = roster.without(roster.members[0].name, 7.0)
    assert roster.members == roster.invites == ()
    assert [(gone.id, gone.removed_at) for gone in roster.removed] == [(applicant(1).id, 7.0)]
    assert refusal(roster.admitted_by_key, applicant(1)) is Why.REMOVED
    assert refusal(roster.admitted_by_secret, applicant(1), SECRET, 8.0) is Why.REMOVED
    assert refusal(roster.admitted_by_secret, applicant(2), SECRET, 8.0) is Why.NOT_INVITED, "a new key does not help with an old invite"


@pytest.mark.parametrize("way", ["secret", "code"])
def test_removed_machine_comes_back_when_it_is_invited_anew(way):
    roster = invited().admitted_by_secret(applicant(1), SECRET, 0.0)
    roster = roster.without(roster.members[0].name, 1.0)
    anew = invited(roster, secret=OTHER)
    roster = anew.admitted_by_secret(applicant(1), OTHER, 2.0) if way == "secret" else roster.admitted_by_code(applicant(1), 2.0)
    assert (len(roster.members), roster.removed) == (1, ())
    assert roster.admitted_by_key(applicant(1)) == roster


def test_removing_nobody_names_those_that_are_there():
    roster = invited().admitted_by_secret(applicant(1), SECRET, 0.0).named(applicant(1).id, "attic", "hall")
    with pytest.raises(RequestError, match="no machine named 'cellar' is a member; those that are: attic"):
        roster.without("cellar", 0.0)


def test_two_machines_of_one_hostname_are_told_apart_and_stay_so():
    roster = Roster()
    for number in range(3):
        roster = roster.admitted_by_code(applicant(number), 0.0).named(applicant(number).id, "vm", "vm")
    assert [member.name for member in roster.members] == ["vm-2", "vm-3", "vm-4"], "the coordinator is vm"
    roster = roster.without("vm-2", 0.0).named(applicant(2).id, "vm", "vm")
    assert [member.name for member in roster.members] == ["vm-3", "vm-4"]
    assert roster.named(applicant(2).id, "attic", "vm").members[1].name == "attic"


def test_names_that_differ_in_capitals_only_are_told_apart():
    roster = Roster().admitted_by_code(applicant(1), 0.0).named(applicant(1).id, "VM", "vm")
    assert roster.members[0].name == "VM-2"


def test_coordinator_that_is_renamed_takes_its_name_back():
    roster = Roster().admitted_by_code(applicant(1), 0.0).named(applicant(1).id, "vm", "hall")
    assert roster.named(applicant(1).id, "vm", "vm").members[0].name == "vm-2"


@given(st.text(max_size=200))
def test_names_from_elsewhere_are_fit_for_terminals_tables_and_addresses(text):
    name = clean_name(text)
    assert 0 < len(name) <= MAX_NAME_CHARS
    assert all(c.isalnum() or c in "_.-" or not c.isascii() for c in name)
    assert name.isprintable()
    assert clean_name(name) == name


@pytest.mark.parametrize(
    ("text", "name"), [("attic", "attic"), ("Jo's  PC\x1b[31m", "Jo-s-PC-31m"), ("../../etc", "etc"), ("", "node"), ("\u202e", "node"), ("Büro-2", "Büro-2")]
)
def test_odd_names(text, name):
    assert clean_name(text) == name


def test_labelled_invite_replaces_the_one_before_and_others_are_bounded():
    roster = invited(invited(label="first"), secret=OTHER, label="first")
    assert len(roster.invites) == 1
    assert refusal(roster.admitted_by_secret, applicant(1), SECRET, 0.0) is Why.NOT_INVITED
    for number in range(MAX_INVITES - 1):
        roster = invited(roster, secret=number.to_bytes(10, "big"))
    with pytest.raises(RequestError, match="64 invites are open"):
        invited(roster)
    roster.invited(SECRET, uses=1, expires_at=300.0, now=100.0)  # those have expired


def test_members_and_memories_of_the_removed_are_bounded():
    roster = Roster()
    for number in range(MAX_MEMBERS):
        roster = roster.admitted_by_code(applicant(number), 0.0)
    assert refusal(roster.admitted_by_code, applicant(MAX_MEMBERS), 0.0) is Why.FULL
    for number in range(MAX_REMOVED + 5):
        roster = roster.without(roster.members[0].name, 0.0).admitted_by_code(applicant(MAX_MEMBERS + number), 0.0)
    assert len(roster.removed) == MAX_REMOVED
    assert refusal(roster.admitted_by_key, applicant(0)) is Why.UNKNOWN, "forgotten, and refused all the same"


def test_what_does_not_last_is_not_written_and_survives_the_reading_of_the_rest():
    roster = Roster().admitted_by_code(applicant(1), 0.0).named(applicant(1).id, "vm", "hall")
    ours = invited(roster, is_lasting=False).admitted_by_secret(applicant(2), SECRET, 0.0).named(applicant(2).id, "attic", "hall")
    ours = invited(ours, secret=OTHER, is_lasting=False)
    assert ours.lasting == roster
    theirs = roster.admitted_by_code(applicant(3), 0.0).named(applicant(3).id, "attic", "hall")
    both = theirs.with_passing(ours)
    assert [(member.name, member.is_lasting) for member in both.members] == [("vm", True), ("attic", True), ("attic-2", False)]
    assert both.invites == ours.invites
    assert both.lasting == theirs


def test_roster_with_one_key_or_name_twice_cannot_be_built():
    roster = Roster().admitted_by_code(applicant(1), 0.0).admitted_by_code(applicant(2), 0.0)
    first, second = roster.members
    for twice in (replace(second, name=first.name.upper()), replace(second, id=first.id)):
        with pytest.raises(ValueError, match="two members with equal"):
            replace(roster, members=(first, twice))


class Life(RuleBasedStateMachine):
    """Any order of invites, knocks, names and removals: against a plain book-keeping of who may come."""

    def __init__(self) -> None:
        super().__init__()
        self.roster, self.now = Roster(), 0.0
        self.uses: dict[bytes, list[float]] = {}  # secret: [uses left, end]
        self.inside: set[NodeId] = set()

    def tell(self, change: object, *arguments: object) -> bool:
        try:
            self.roster = change(*arguments)  # type: ignore[operator]
        except Refused:
            return False
        return True

    @rule(secret=st.integers(1, 3), uses=st.integers(1, 3), valid_s=st.integers(1, 50))
    def invite(self, secret, uses, valid_s):
        data = secret.to_bytes(10, "big") + len(self.uses).to_bytes(4, "big")
        self.roster = self.roster.invited(data, uses=uses, expires_at=self.now + valid_s, now=self.now)
        self.uses[data] = [uses, self.now + valid_s]

    @rule(number=st.integers(1, 4), data=st.data())
    def show_a_secret(self, number, data):
        secret = data.draw(st.sampled_from([*self.uses, b"wrong"]))
        node, left = applicant(number).id, self.uses.get(secret, [0, 0.0])
        may = node in self.inside or (left[0] > 0 and self.now < left[1])
        assert self.tell(self.roster.admitted_by_secret, applicant(number), secret, self.now) == may
        if may and node not in self.inside:
            left[0] -= 1
            self.inside.add(node)

    @rule(number=st.integers(1, 4))
    def show_a_key(self, number):
        assert self.tell(self.roster.admitted_by_key, applicant(number)) == (applicant(number).id in self.inside)

    @rule(number=st.integers(1, 4), name=st.sampled_from(["vm", "VM", "hall", "vm-2", "attic"]))
    def introduce(self, number, name):
        self.roster = self.roster.named(applicant(number).id, name, "hall")

    @rule(data=st.data())
    def remove(self, data):
        if self.roster.members:
            gone = data.draw(st.sampled_from(self.roster.members))
            self.roster = self.roster.without(gone.name, self.now)
            self.inside.discard(gone.id)
            self.uses.clear()

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def members_are_those_who_came_and_have_names_of_their_own(self):
        assert {member.id for member in self.roster.members} == self.inside
        names = [member.name.casefold() for member in self.roster.members if member.wanted]
        assert len(set(names)) == len(names)
        assert "hall" not in names


TestLife = Life.TestCase

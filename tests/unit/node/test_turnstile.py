"""How often strangers may knock; the time is an argument."""

from hypothesis import given
from hypothesis import strategies as st

from yoke.net.strangers import source
from yoke.node.turnstile import GUESSES, KNOCKS, KNOCKS_PER_S, MAX_SOURCES, WRONG_COST, Turnstile


def n_knocks(turnstile: Turnstile, host: str, now_s: float, most: int = 10_000) -> int:
    """How often ``host`` may knock at one moment."""
    return next((n for n in range(most) if not turnstile.may_knock(host, now_s)), most)


def test_an_address_may_knock_so_often_at_once_and_then_at_a_steady_pace():
    turnstile = Turnstile()
    assert n_knocks(turnstile, "10.0.0.1", 100.0) == KNOCKS
    assert n_knocks(turnstile, "10.0.0.1", 103.0) == 3 * KNOCKS_PER_S
    assert n_knocks(turnstile, "10.0.0.1", 1e6) == KNOCKS


def test_one_address_does_not_hold_up_another():
    turnstile = Turnstile()
    n_knocks(turnstile, "10.0.0.1", 0.0)
    assert turnstile.may_knock("10.0.0.2", 0.0)


def test_wrong_guesses_cost_their_address_more_and_all_of_them_together_end_the_guessing_for_a_while():
    turnstile = Turnstile()
    turnstile.wrong("10.0.0.1", 0.0)
    assert n_knocks(turnstile, "10.0.0.1", 0.0) == KNOCKS - WRONG_COST
    for index in range(int(GUESSES) - 1):
        assert turnstile.may_guess(0.0)
        turnstile.wrong(f"10.0.1.{index}", 0.0)
    assert not turnstile.may_guess(0.5)
    assert turnstile.may_guess(2.0)
    assert turnstile.may_knock("10.0.0.3", 0.0), "who has not guessed may knock, and come in with a key"


def test_addresses_that_are_remembered_are_bounded_and_the_busy_one_is_not_forgotten():
    turnstile = Turnstile()
    assert n_knocks(turnstile, "10.0.0.1", 0.0) == KNOCKS
    for index in range(3 * MAX_SOURCES):
        turnstile.may_knock(f"11.{index >> 16}.{index >> 8 & 255}.{index & 255}", 0.0)
        if not index % (MAX_SOURCES // 2):
            assert not turnstile.may_knock("10.0.0.1", 0.0)
    assert len(turnstile) == MAX_SOURCES


def test_one_machines_ipv6_addresses_are_one_source():
    assert source("2001:db8::1") == source("2001:db8::ffff:1") != source("2001:db8:0:1::1")
    assert source("::ffff:10.0.0.1") == source("10.0.0.1") == "10.0.0.1"
    assert source("fe80::1%eth0") == source("fe80::2")
    assert source("no address") == "no address"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.sampled_from(["knock", "wrong"])), max_size=60))
def test_whatever_happens_and_whenever_nobody_gets_more_than_the_burst_and_the_pace(events):
    """Also when the clock jumps back."""
    turnstile, allowed = Turnstile(), 0
    for now_s, kind in events:
        if kind == "knock":
            allowed += turnstile.may_knock("10.0.0.1", now_s)
        else:
            turnstile.wrong("10.0.0.1", now_s)
    times = [now_s for now_s, _ in events] or [0.0]
    assert allowed <= KNOCKS + KNOCKS_PER_S * (max(times) - times[0]) + 1

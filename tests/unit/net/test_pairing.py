"""The code and the exchange, without a network."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import AdmissionError, RemoteProtocolError, UserError
from yoke.core.node import NodeId
from yoke.net.pairing import CODE_S, CONFIRMATION_BYTES, MESSAGE_BYTES, TRIES, Codes, Exchange, check_confirmation, read_code

NEWCOMER, HOST, STRANGER = NodeId("a" * 64), NodeId("b" * 64), NodeId("c" * 64)
CODE = "042917"


def confirmations(newcomer: Exchange, host: Exchange, seen=b"seen", seen_there=b"seen"):
    """What each side shows and expects, after their messages have crossed."""
    shown, expected = newcomer.finish(host.message, seen)
    shown_there, expected_there = host.finish(newcomer.message, seen_there)
    return shown, expected_there, shown_there, expected


def do_agree(newcomer, host, **seen):
    shown, expected_there, shown_there, expected = confirmations(newcomer, host, **seen)
    assert len(shown) == len(shown_there) == CONFIRMATION_BYTES
    assert (shown == expected_there) == (shown_there == expected)
    return shown == expected_there


def test_same_code_and_same_ids_agree_with_a_different_confirmation_each_way():
    newcomer, host = Exchange(CODE, NEWCOMER, HOST, is_host=False), Exchange(CODE, NEWCOMER, HOST, is_host=True)
    assert len(newcomer.message) == len(host.message) == MESSAGE_BYTES
    shown, expected_there, shown_there, expected = confirmations(newcomer, host)
    check_confirmation(shown, expected_there)
    check_confirmation(shown_there, expected)
    assert shown != shown_there


@pytest.mark.parametrize(
    ("digits", "newcomer", "host", "seen"),
    [("042918", NEWCOMER, HOST, b"seen"), (CODE, STRANGER, HOST, b"seen"), (CODE, NEWCOMER, STRANGER, b"seen"), (CODE, NEWCOMER, HOST, b"seen otherwise")],
    ids=["another code", "another newcomer", "another host", "another transcript"],
)
def test_whatever_differs_between_the_sides_is_noticed_by_both(digits, newcomer, host, seen):
    ours, theirs = Exchange(CODE, NEWCOMER, HOST, is_host=False), Exchange(digits, newcomer, host, is_host=True)
    assert not do_agree(ours, theirs, seen_there=seen)


def test_wrong_confirmation_is_refused_with_what_to_do():
    with pytest.raises(AdmissionError, match="type the code again, or ask for a new one"):
        check_confirmation(bytes(32), b"\x01" + bytes(31))


def test_messages_of_an_earlier_exchange_do_not_help():
    """Whoever has recorded a whole exchange that went well, and plays the newcomer's part of it again."""
    newcomer, host = Exchange(CODE, NEWCOMER, HOST, is_host=False), Exchange(CODE, NEWCOMER, HOST, is_host=True)
    recorded = newcomer.message
    shown, *_ = confirmations(newcomer, host)
    again = Exchange(CODE, NEWCOMER, HOST, is_host=True)
    _, expected = again.finish(recorded, b"seen")
    assert shown != expected


def test_message_sent_back_is_refused():
    host = Exchange(CODE, NEWCOMER, HOST, is_host=True)
    with pytest.raises(RemoteProtocolError):
        host.finish(host.message, b"")


@given(st.binary(max_size=40) | st.binary(min_size=32, max_size=32))
def test_random_bytes_are_refused_or_lead_to_no_agreement(message):
    host = Exchange(CODE, NEWCOMER, HOST, is_host=True)
    try:
        shown, expected = host.finish(message, b"")
    except RemoteProtocolError:
        return
    assert len(message) == MESSAGE_BYTES
    assert shown != expected


ORDER_8 = "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"


@pytest.mark.parametrize("message", ["01" + 31 * "00", 32 * "00", "ec" + 30 * "ff" + "7f", ORDER_8], ids=["order 1", "order 4", "order 2", "order 8"])
def test_points_of_small_order_are_refused(message):
    """They would make the key guessable without the code."""
    with pytest.raises(RemoteProtocolError):
        Exchange(CODE, NEWCOMER, HOST, is_host=True).finish(bytes.fromhex(message), b"")


def test_code_is_six_digits_shown_in_two_halves():
    code = Codes(lambda bound: 42917 if bound == 10**6 else -1).open(0.0)
    assert (code.digits, str(code)) == ("042917", "042 917")
    assert read_code(str(code)) == code.digits


def test_code_ends_after_its_time():
    codes = Codes()
    assert codes.begin(0.0) is None
    codes.open(10.0)
    assert codes.current(10.0 + CODE_S - 1) is not None
    assert codes.current(10.0 + CODE_S) is None
    assert codes.begin(10.0 + CODE_S) is None


def test_code_ends_after_three_tries_begun_at_once_or_not():
    codes = Codes()
    code = codes.open(0.0)
    assert [codes.begin(0.0) is not None for _ in range(TRIES + 2)] == [True] * TRIES + [False, False]
    assert codes.current(0.0) is None
    assert codes.redeem(code), "the last of the tries may still go well"


def test_code_is_good_for_one_machine():
    codes = Codes()
    codes.open(0.0)
    first, second = codes.begin(0.0), codes.begin(0.0)
    assert [codes.redeem(first), codes.redeem(second)] == [True, False]
    assert codes.begin(0.0) is None


@pytest.mark.parametrize("end", [lambda codes: codes.close(), lambda codes: codes.open(1.0)], ids=["closed", "replaced"])
def test_exchange_whose_code_ended_meanwhile_does_not_count(end):
    numbers = itertools.count()
    codes = Codes(lambda _: next(numbers))
    codes.open(0.0)
    begun = codes.begin(0.0)
    end(codes)
    assert not codes.redeem(begun)


def test_codes_are_drawn_from_all_six_digit_numbers():
    codes = Codes()
    drawn = [int(codes.open(0.0).digits) for _ in range(300)]
    assert len(set(drawn)) > 290
    assert min(drawn) < 100_000 < 900_000 < max(drawn)


@pytest.mark.parametrize(("text", "digits"), [("042 917\n", "042917"), ("042-917", "042917"), (" 0 4 2 9 1 7 ", "042917")])
def test_code_is_read_as_people_type_it(text, digits):
    assert read_code(text) == digits


@pytest.mark.parametrize("text", ["", "12345", "1234567", "12345a", "١٢٣٤٥٦", "²23456"])
def test_what_is_no_code_is_said_to_be_none(text):
    with pytest.raises(UserError, match="expected the 6 digits"):
        read_code(text)

"""The text of an answer as it grows: whole characters, and nothing of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from yoke.run.answer import AnswerText


def said(stop: tuple[str, ...], pieces: list[bytes]) -> tuple[str, bool, list[str]]:
    answer, texts = AnswerText(stop), []
    for piece in pieces:
        texts.append(answer.feed(piece))
        if answer.is_stopped:
            break
    texts.append(answer.finish())
    return "".join(texts), answer.is_stopped, texts


def expected(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first."""
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    return (text[: ends[0][1]], True) if ends else (text, False)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    text = draw(st.text(alphabet="ab é€🐂", max_size=25))
    data = text.encode()
    edges = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return text, [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]


@given(cut=cut_texts(), stop=st.lists(st.text(alphabet="ab é€🐂", min_size=1, max_size=5), max_size=4).map(tuple))
def test_text_ends_before_the_stop_string_that_is_complete_first_however_it_is_cut(cut: tuple[str, list[bytes]], stop: tuple[str, ...]) -> None:
    text, pieces = cut
    assert said(stop, pieces)[:2] == expected(text, stop)


@given(cut=cut_texts())
def test_without_stop_strings_every_whole_character_comes_at_once(cut: tuple[str, list[bytes]]) -> None:
    text, pieces = cut
    answer, fed, heard = AnswerText(()), b"", ""
    for piece in pieces:
        fed += piece
        heard += answer.feed(piece)
        assert heard == fed.decode(errors="ignore")
    assert heard + answer.finish() == text


@given(pieces=st.lists(st.binary(max_size=6), max_size=10))
def test_any_bytes_become_text_as_a_whole_decoder_would_read_them(pieces: list[bytes]) -> None:
    assert said((), pieces)[0] == b"".join(pieces).decode(errors="replace")


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    answer = AnswerText(("\n\nUser:",))
    assert [answer.feed(p) for p in (b"Yes.", b"\n", b"\nU", b"se it")] == ["Yes.", "", "", "\n\nUse it"]
    assert (answer.is_stopped, answer.finish()) == (False, "")


def test_stop_string_over_three_pieces_leaves_what_is_before_it() -> None:
    assert said(("STOP",), [b"one S", b"TO", b"P two"]) == ("one ", True, ["one ", "", "", ""])


def test_held_text_comes_at_the_end() -> None:
    assert said(("STOP",), [b"one ST"]) == ("one ST", False, ["one ", "ST"])


def test_incomplete_character_becomes_a_replacement_at_the_end() -> None:
    assert said((), ["€".encode()[:2]]) == ("\ufffd", False, ["", "\ufffd"])


def test_replacement_at_the_end_may_complete_a_stop_string() -> None:
    assert said(("a\ufffd",), [b"xa", b"\xe2"])[:2] == ("x", True)

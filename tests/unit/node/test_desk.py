"""What the asker has heard is enough to go on elsewhere, and nobody hears anything twice."""

from collections.abc import Callable

import pytest

from yoke.core.errors import NodeGone, RemoteProtocolError, RequestError
from yoke.core.request import Finished, FinishReason, Piece, Request, Started
from yoke.node.desk import Desk
from yoke.run.intake import Resume

DONE = Finished(reason=FinishReason.LENGTH, prompt_tokens=2, completion_tokens=2, queue_s=0.0, prefill_s=0.1, decode_s=0.1)


def request(name: str = "r") -> Request:
    return Request(id=name, model="m", text="x")


def piece(*tokens: int) -> Piece:
    return Piece(text="t", tokens=tokens, sampled_at_s=0.0)


def test_answer_that_has_begun_goes_on_after_its_last_token() -> None:
    desk = Desk()
    ticket = desk.open(request())
    assert ticket.resume is None
    desk.accept("r", (7, 8))
    assert ticket.resume is None, "accepted, but the asker has heard nothing yet: begin again"
    for event in (Started(prompt_tokens=2), piece(3), piece(4, 5)):
        desk.tell("r", event)
    assert ticket.resume == Resume(prompt=(7, 8), drawn=(3, 4, 5))
    assert [ticket.events.get_nowait() for _ in range(3)] == [Started(prompt_tokens=2), piece(3), piece(4, 5)]


@pytest.mark.parametrize("end", [DONE, NodeGone("attic is gone")])
def test_ended_answer_is_not_resumed_and_hears_no_more(end: Finished | NodeGone) -> None:
    desk = Desk()
    ticket = desk.open(request())
    desk.tell("r", end)
    desk.tell("r", piece(1))
    desk.accept("r", (1,))
    assert list(desk) == []
    assert ticket.events.qsize() == 1
    desk.close(ticket)
    assert desk.open(request()).prompt == ()


def test_id_is_one_answers_at_a_time() -> None:
    desk = Desk()
    first = desk.open(request())
    with pytest.raises(RequestError, match="being answered already"):
        desk.open(request())
    assert list(desk) == [first], "the one that was there goes on"


def test_error_for_all_ends_all() -> None:
    desk = Desk()
    tickets = [desk.open(request(f"r{i}")) for i in range(3)]
    gone = NodeGone("too few are left")
    desk.tell_all(gone)
    assert len(desk) == 0
    assert [ticket.events.get_nowait() for ticket in tickets] == [gone] * 3


@pytest.mark.parametrize(
    "lie",
    [
        lambda desk: desk.accept("r", ()),
        lambda desk: desk.accept("r", (1, 100)),
        lambda desk: desk.accept("r", (1,) * 10),
        lambda desk: desk.tell("r", piece(-1)),
        lambda desk: desk.tell("r", piece(*range(9))),
        lambda desk: desk.tell("unread", Started(prompt_tokens=2)),
    ],
    ids=["no prompt", "no token", "no room", "no token drawn", "too many drawn", "begun unread"],
)
def test_what_another_engine_could_not_go_on_from_is_refused(lie: Callable[[Desk], None]) -> None:
    desk = Desk()
    desk.vocabulary, desk.context = 100, 10
    ticket = desk.open(request())
    desk.open(request("unread"))
    desk.accept("r", (1, 99))
    desk.tell("r", Started(prompt_tokens=2))
    with pytest.raises(RemoteProtocolError):
        lie(desk)
    desk.tell("r", piece(*range(8)))
    assert ticket.resume == Resume(prompt=(1, 99), drawn=tuple(range(8)))

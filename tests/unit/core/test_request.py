"""A request that cannot be answered is refused where it is made, and says which field is at fault."""

import math
from typing import Any

import pytest

from yoke.core.errors import RequestError
from yoke.core.request import MAX_SEED, MAX_STOP_LENGTH, MAX_STOP_STRINGS, Finished, FinishReason, Message, Request, Role, Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 101.0), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_k", 2**31), ("top_p", 1.1),
        ("top_p", -0.1), ("min_p", 2.0), ("seed", -1), ("seed", MAX_SEED + 1),
    ],
)  # fmt: skip
def test_sampling_is_within_bounds(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name} is ") as caught:
        Sampling(**{name: value})
    assert (caught.value.field, caught.value.http_status) == (name, 400)


def test_bounds_themselves_are_allowed() -> None:
    Sampling(temperature=100.0, top_k=2**31 - 1, top_p=0.0, min_p=1.0, seed=MAX_SEED)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "prompt"),
        ({"text": "a", "tokens": (1,)}, "prompt"),
        ({"text": "a", "messages": (Message(role=Role.USER, content="a"),)}, "prompt"),
        ({"messages": ()}, "messages"),
        ({"text": "a", "max_tokens": 0}, "max_tokens"),
        ({"text": "a", "stop": ("",)}, "stop"),
        ({"text": "a", "stop": ("x" * (MAX_STOP_LENGTH + 1),)}, "stop"),
        ({"text": "a", "stop": ("x",) * (MAX_STOP_STRINGS + 1)}, "stop"),
    ],
)
def test_wrong_requests_name_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(id="1", model="m", **values)
    assert caught.value.field == field


@pytest.mark.parametrize("values", [{"text": ""}, {"tokens": ()}, {"messages": (Message(role=Role.SYSTEM, content=""),)}])
def test_one_prompt_of_any_kind_is_a_request(values: dict[str, Any]) -> None:
    assert Request(id="1", model="m", **values).sampling.temperature == 0.0


def test_speeds_leave_out_the_first_token_and_survive_no_time() -> None:
    finished = Finished(reason=FinishReason.LENGTH, prompt_tokens=100, completion_tokens=11, queue_s=1.0, prefill_s=2.0, decode_s=5.0)
    assert (finished.prefill_tokens_per_s, finished.decode_tokens_per_s) == (50.0, 2.0)
    at_once = Finished(reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1, queue_s=0.0, prefill_s=0.0, decode_s=0.0)
    assert (at_once.prefill_tokens_per_s, at_once.decode_tokens_per_s) == (0.0, 0.0)

"""Frames, requests, nodes, tensors and errors: bounds of the shared vocabulary."""

import inspect
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core import errors
from yoke.core.errors import InvariantError, ModelError, RequestError, UserError, YokeError
from yoke.core.frame import MAX_BATCH_TOKENS, MAX_CELLS, MAX_SLOTS, Batch, Output
from yoke.core.node import Device, Link, Node, NodeId
from yoke.core.request import MAX_SEED, MAX_STOP_LENGTH, MAX_STOP_STRINGS, Finished, FinishReason, Message, Request, Role, Sampling
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType


def batch(n: int = 2, **changes: Any) -> Batch:
    values: dict[str, Any] = {"tokens": (1,) * n, "slots": (0,) * n, "positions": tuple(range(n)), "cells": tuple(range(n))}
    return Batch(**(values | changes))


def test_batches_up_to_the_limits_are_built() -> None:
    assert len(batch(MAX_BATCH_TOKENS).tokens) == MAX_BATCH_TOKENS
    batch(slots=(0, MAX_SLOTS - 1), cells=(0, MAX_CELLS - 1), freed_slots=(MAX_SLOTS - 1,), outputs=(Output(row=1, sampling=Sampling()),))


@pytest.mark.parametrize(
    ("n", "changes", "told"),
    [
        (0, {}, "batch of 0 tokens"),
        (MAX_BATCH_TOKENS + 1, {}, "expected 1 to"),
        (2, {"slots": (0,)}, "1 slots"),
        (2, {"positions": (0, 1, 2)}, "3 positions"),
        (2, {"cells": ()}, "0 cells"),
        (2, {"tokens": (0, -1)}, "negative"),
        (2, {"positions": (-1, 0)}, "negative"),
        (2, {"slots": (0, MAX_SLOTS)}, "slot"),
        (2, {"slots": (-1, 0)}, "slot"),
        (2, {"freed_slots": (MAX_SLOTS,)}, "slot"),
        (2, {"freed_slots": (-1,)}, "slot"),
        (2, {"cells": (3, 3)}, "distinct"),
        (2, {"cells": (0, MAX_CELLS)}, "cells"),
        (2, {"cells": (-1, 0)}, "cells"),
        (2, {"outputs": (Output(row=2, sampling=Sampling()),)}, "output row"),
        (2, {"outputs": (Output(row=-1, sampling=Sampling()),)}, "output row"),
    ],
)
def test_impossible_batches_are_refused(n: int, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvariantError, match=told):
        batch(n, **changes)


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 100.0}, {"top_k": 2**31 - 1}, {"top_p": 0.0}, {"top_p": 1}, {"min_p": 1.0}, {"seed": MAX_SEED}, {"temperature": 1e-300}],
)
def test_sampling_takes_values_up_to_its_bounds(values: dict[str, Any]) -> None:
    Sampling(**values)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed"])
@pytest.mark.parametrize("value", [-1, -0.001, 10**400, -(10**400), math.nan, math.inf, -math.inf, 2**63])
def test_sampling_refuses_what_is_out_of_bounds_by_field(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name} is .*expected a number from 0") as caught:
        Sampling(**{name: value})
    assert caught.value.field == name


def test_sampling_refuses_numbers_too_long_to_be_written() -> None:
    with pytest.raises(RequestError, match="seed is a huge number"):
        Sampling(seed=10**5000)


def test_a_request_has_exactly_one_prompt() -> None:
    message = Message(role=Role.USER, content="hi")
    assert Request(id="a", model="m", text="").text == ""
    for prompts in ({}, {"text": "a", "tokens": (1,)}, {"text": "a", "messages": (message,)}):
        with pytest.raises(RequestError, match="exactly one prompt") as caught:
            Request(id="a", model="m", **prompts)  # type: ignore[arg-type]
        assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"text": None, "messages": ()}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -(10**30)}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * (MAX_STOP_LENGTH + 1),)}, "stop"),
        ({"stop": ("x",) * (MAX_STOP_STRINGS + 1)}, "stop"),
    ],
)
def test_impossible_requests_name_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**({"id": "a", "model": "m", "text": "hi"} | values))
    assert caught.value.field == field
    Request(id="a", model="m", text="hi", stop=("x" * MAX_STOP_LENGTH,) * MAX_STOP_STRINGS, max_tokens=1)


def test_speeds_of_an_answer_are_zero_when_no_time_passed() -> None:
    finished = Finished(reason=FinishReason.STOP, prompt_tokens=10, completion_tokens=3, queue_s=0.0, prefill_s=0.5, decode_s=0.0)
    assert (finished.prefill_tokens_per_s, finished.decode_tokens_per_s) == (20.0, 0.0)


@pytest.mark.parametrize("values", [{"free_bytes": -1}, {"matvec_bytes_per_s": 0.0}, {"matvec_bytes_per_s": math.nan}, {"threads": 0}])
def test_impossible_devices_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="device CPU"):
        Device(**({"name": "CPU", "description": "", "backend": "ggml", "free_bytes": 1, "matvec_bytes_per_s": 1.0} | values))


@pytest.mark.parametrize("bad", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 65])
def test_node_id_is_64_lower_case_hexadecimal_digits(bad: str) -> None:
    device = Device(name="CPU", description="", backend="ggml", free_bytes=1, matvec_bytes_per_s=1.0)
    Node(id=NodeId("a" * 64), name="attic", device=device, measured_at=0.0)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        Node(id=NodeId(bad), name="attic", device=device, measured_at=0.0)


@pytest.mark.parametrize(("rtt_s", "rate"), [(-1.0, 1.0), (math.nan, 1.0), (0.0, 0.0), (0.0, math.nan)])
def test_impossible_links_are_refused(rtt_s: float, rate: float) -> None:
    with pytest.raises(UserError, match="link"):
        Link(source=NodeId("a" * 64), target=NodeId("b" * 64), rtt_s=rtt_s, bandwidth_bytes_per_s=rate)


@given(kind=st.sampled_from(TensorType), rows=st.integers(1, 50), blocks=st.integers(1, 8))
def test_tensor_takes_the_bytes_of_its_blocks(kind: TensorType, rows: int, blocks: int) -> None:
    info = TensorInfo(name="w", type=kind, shape=(rows, blocks * kind.block))
    assert info.n_bytes == rows * blocks * kind.block_bytes
    StoredTensor(info=info, data=bytes(info.n_bytes))
    with pytest.raises(ModelError, match="bytes"):
        StoredTensor(info=info, data=bytes(info.n_bytes + 1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (-1, 32), (1, 1, 1, 1, 32), (2, 31)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError):
        TensorInfo(name="w", type=TensorType.Q8_0, shape=shape)


def error_classes() -> list[type[YokeError]]:
    return [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, YokeError)]


def test_docstring_draws_every_error_at_its_place() -> None:
    """The tree is read line by line: an entry's parent is the last one that stands further left."""
    drawn: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").split("\n\n")[1].splitlines():
        if found := re.match(r"^([│├└─ ]*)([A-Z]\w+)(?: |$)", line):
            indent, name = len(found[1]), found[2]
            path = [(i, n) for i, n in path if i < indent]
            drawn[name] = path[-1][1] if path else None
            path.append((indent, name))
    real = {c.__name__: None if c is YokeError else c.__bases__[0].__name__ for c in error_classes()}
    assert drawn == real


@pytest.mark.parametrize("kind", error_classes())
def test_exit_code_and_status_follow_from_whose_fault_it_is(kind: type[YokeError]) -> None:
    expected = next(
        codes
        for root, codes in {"UserError": (2, 400), "NodeError": (3, 503), "InvariantError": (70, 500), "YokeError": (1, 500)}.items()
        if issubclass(kind, getattr(errors, root))
    )
    error = kind("what happened")
    assert ((error.exit_code, error.http_status), str(error)) == (expected, "what happened")


def test_request_error_carries_field_and_status_of_its_own() -> None:
    error = RequestError("no such model", field="model", status=404)
    assert (error.field, error.http_status, RequestError.http_status) == ("model", 404, 400)

import json

import pytest

from yoke.api.bodies import COMPLETION_MAX_TOKENS, find_model, parse_chat, parse_completion
from yoke.core.errors import RequestError
from yoke.core.request import Message, ModelCard, Role

CARD = ModelCard(name="tiny", context=128, vocabulary=256, has_chat_template=True, created_at=0)
OTHER = ModelCard(name="other/big", context=128, vocabulary=256, has_chat_template=True, created_at=0)
HELLO = [{"role": "user", "content": "hello"}]


def chat(cards=(CARD,), **fields):
    return parse_chat(json.dumps({"messages": HELLO, **fields}).encode(), "id", cards)


def completion(**fields):
    return parse_completion(json.dumps({"prompt": "once", **fields}).encode(), "id", (CARD,))


def refusal(parse, **fields):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value


def test_defaults_are_openais():
    call = chat()
    assert call.request.model == "tiny"
    assert call.request.messages == (Message(role=Role.USER, content="hello"),)
    assert call.request.max_tokens is None
    assert (call.request.sampling.temperature, call.request.sampling.top_p, call.request.sampling.top_k) == (1.0, 1.0, 0)
    assert (call.stream, call.include_usage, call.timings, call.request.ignore_eos) == (False,) * 4
    assert completion().request.max_tokens == COMPLETION_MAX_TOKENS


def test_a_missing_seed_is_drawn_anew():
    assert chat().request.sampling.seed != chat().request.sampling.seed
    assert chat(seed=7).request.sampling.seed == 7


def test_every_supported_field_arrives():
    call = chat(
        model="tiny", max_tokens=3, stop=["a", "b"], temperature=0, top_p=0.5, seed=1, top_k=4, min_p=0.1, ignore_eos=True,
        stream=True, stream_options={"include_usage": True}, yoke_timings=True, user="someone", unheard_of={"x": 1},
    )  # fmt: skip
    request = call.request
    assert (request.max_tokens, request.stop, request.ignore_eos) == (3, ("a", "b"), True)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k, sampling.min_p) == (0.0, 0.5, 1, 4, 0.1)
    assert call.stream
    assert call.include_usage
    assert call.timings


def test_null_means_absent():
    names = "model max_tokens max_completion_tokens stop temperature top_p seed top_k min_p ignore_eos stream stream_options yoke_timings tools n logprobs"
    call = chat(**dict.fromkeys(names.split()))
    assert call.request.sampling.temperature == 1.0
    assert call.request.stop == ()


def test_content_is_a_string_or_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "ann"}, {"role": "assistant", "content": ""}]
    assert chat(messages=messages).request.messages == (
        Message(role=Role.SYSTEM, content="be brief"),
        Message(role=Role.USER, content="a\nb"),
        Message(role=Role.ASSISTANT, content=""),
    )


def test_both_names_of_the_token_limit():
    assert chat(max_completion_tokens=5).request.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).request.max_tokens == 5
    assert refusal(chat, max_completion_tokens=5, max_tokens=6).field == "max_completion_tokens"


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [("x", "x", None), ("", "", None), (["x"], "x", None), ([1, 2], None, (1, 2)), ([[1, 2]], None, (1, 2))],
)
def test_prompts(prompt, text, tokens):
    request = completion(prompt=prompt).request
    assert (request.text, request.tokens) == (text, tokens)


@pytest.mark.parametrize("prompt", [[], [[]], ["a", "b"], [[1], [2]], [1, "a"], [-1], [256], [10**30], None, {}, [True], [1.0], 5])
def test_refused_prompts(prompt):
    assert refusal(completion, prompt=prompt).field.startswith("prompt")


UNSUPPORTED = [
    ("tools", [{"type": "function"}]), ("tool_choice", "auto"), ("functions", [{}]), ("response_format", {"type": "json_object"}), ("logprobs", True),
    ("logprobs", 0), ("logprobs", 5), ("top_logprobs", 2), ("n", 2), ("n", True), ("n", 10**40), ("best_of", 2), ("echo", True), ("suffix", "x"),
    ("logit_bias", {"50256": -100}), ("presence_penalty", 0.5), ("frequency_penalty", -0.5), ("modalities", ["text", "audio"]), ("repetition_penalty", 1.1),
    ("grammar", "root ::= x"), ("chat_template", "{{ x }}"), ("min_tokens", 4), ("reasoning_effort", "high"), ("web_search_options", {}),
]  # fmt: skip


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(parse, name, value):
    error = refusal(parse, **{name: value})
    assert error.field == name
    assert name in str(error)
    assert "not supported" in str(error)


HARMLESS = {
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "n": 1, "best_of": 1, "echo": False, "suffix": "",
    "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "modalities": ["text"], "repetition_penalty": 1.0, "parallel_tool_calls": True,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_values_that_ask_for_nothing_pass(name):
    chat(**{name: HARMLESS[name]})
    completion(**{name: HARMLESS[name]})


WRONG = [
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0]"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"temperature": -1}, "temperature"), ({"temperature": 1e9}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"top_p": -0.1}, "top_p"), ({"min_p": 2}, "min_p"), ({"top_k": -5}, "top_k"),
    ({"top_k": 1.5}, "top_k"), ({"top_k": 10**400}, "top_k"), ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_tokens": "many"}, "max_tokens"), ({"stop": [""]}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"), ({"stop": "x" * 257}, "stop"), ({"stop": [5]}, "stop[0]"), ({"stream": "yes"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"model": 5}, "model"), ({"ignore_eos": 1}, "ignore_eos"), ({"yoke_timings": "x"}, "yoke_timings"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "field"), WRONG, ids=[f"{next(iter(f))}-{i}" for i, (f, _) in enumerate(WRONG)])
def test_wrong_values_name_their_field(fields, field):
    error = refusal(chat, **fields)
    assert error.field == field
    assert error.http_status == 400
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "byte 0"),
        (b'{"messages": ', "byte 13"),
        (b'{"messages": x}', "byte 13"),
        (b'{"messages": []} {}', "byte 18"),
        (b"[]", "expected `object`"),
        (b"\xff\xfe", "byte 0 is 0xff"),
        (b'{"messages": [], "x": "\xe9"}', "byte 23 is 0xe9"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"messages": [], "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"temperature": NaN}', "byte 16"),
        (b"{}", "messages"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "seed"),
        (b'{"n": ' + b"9" * 5000 + b', "messages": []}', "out of range"),
        (b'{"messages": "\\ud800"}', "inside a character"),
    ],
)
def test_malformed_bodies_name_the_place(body, words):
    with pytest.raises(RequestError, match=words):
        parse_chat(body, "id", (CARD,))


def test_models_are_found_by_name_or_by_being_alone():
    assert find_model("other/big", (CARD, OTHER)) is OTHER
    assert find_model("", (CARD,)) is CARD
    assert find_model(None, (OTHER,)) is OTHER
    for name, cards, status in [("gone", (CARD,), 404), (None, (), 503), (None, (CARD, OTHER), 400)]:
        with pytest.raises(RequestError) as caught:
            find_model(name, cards)
        assert (caught.value.http_status, caught.value.field) == (status, "model")

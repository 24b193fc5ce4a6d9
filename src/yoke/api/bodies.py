"""Bodies of the OpenAI dialect, turned into one core request each. Pure: bytes in, a value or a RequestError out; knows no HTTP.

A field that would change the answer and is not supported is refused by name, never ignored. Fields that only label one (``user``, ``metadata``) are.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from yoke.core.errors import RequestError
from yoke.core.request import Message, ModelCard, Request, Role, Sampling

# OpenAI's own default for /v1/completions; chat has none and writes to the end of the context.
COMPLETION_MAX_TOKENS = 16

_Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

# Fields that would change the answer, each with the values (besides null) that ask for nothing and are let through.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1, 1.0),
    "web_search_options": (),
}
_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A body understood: the core request, and how the answer is to be sent."""

    request: Request
    stream: bool
    include_usage: bool
    timings: bool


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a chat, as it is sent."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None


class CommonBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints share. Null means the same as absent."""

    model: str | None = None
    max_tokens: _Int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: _Int | None = None
    top_k: _Int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    yoke_timings: bool | None = None


class ChatBody(CommonBody, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: _Int | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[int | str | list[int]]


BodyT = TypeVar("BodyT", bound=CommonBody)

_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_chat(body: bytes, request_id: str, cards: Sequence[ModelCard]) -> Call:
    """The call that a body of ``/v1/chat/completions`` makes.

    Raises
    ------
    RequestError
        if the body is malformed, out of bounds, asks for what is not supported, or names a model that is not among ``cards``.
    """
    asked = _decode(_CHAT, body)
    card = find_model(asked.model, cards)
    max_tokens = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    if asked.max_tokens not in {None, max_tokens}:
        raise RequestError(
            f"max_tokens is {asked.max_tokens} but max_completion_tokens is {max_tokens}; they mean the same: send one of them",
            field="max_completion_tokens",
        )
    messages = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(asked.messages))
    request = Request(
        id=request_id,
        model=card.name,
        messages=messages,
        max_tokens=max_tokens,
        sampling=_sampling(asked),
        stop=_stop(asked.stop),
        ignore_eos=asked.ignore_eos is True,
    )
    return _call(request, asked)


def parse_completion(body: bytes, request_id: str, cards: Sequence[ModelCard]) -> Call:
    """The call that a body of ``/v1/completions`` makes; raises as `parse_chat` does."""
    asked = _decode(_COMPLETION, body)
    card = find_model(asked.model, cards)
    text, tokens = _prompt(asked.prompt, card)
    request = Request(
        id=request_id,
        model=card.name,
        text=text,
        tokens=tokens,
        max_tokens=COMPLETION_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
        sampling=_sampling(asked),
        stop=_stop(asked.stop),
        ignore_eos=asked.ignore_eos is True,
    )
    return _call(request, asked)


def find_model(name: str | None, cards: Sequence[ModelCard]) -> ModelCard:
    """The card called ``name``; without a name, the only one.

    Raises
    ------
    RequestError
        with status 404 if no card has the name, 503 if nothing is loaded, 400 if a name is needed to choose.
    """
    if not cards:
        raise RequestError("no model is loaded yet; ask again later", field="model", status=503)
    if name:
        for card in cards:
            if card.name == name:
                return card
        loaded = ", ".join(card.name for card in cards)
        raise RequestError(f"model {name[:200]!r} is not loaded; loaded: {loaded}", field="model", status=404)
    if len(cards) > 1:
        raise RequestError(f"model is missing and several are loaded; choose one of {', '.join(card.name for card in cards)}", field="model")
    return cards[0]


def _decode(decoder: msgspec.json.Decoder[BodyT], body: bytes) -> BodyT:
    try:
        # Checked as a whole first: msgspec does not look into strings that it skips.
        text = body.decode()
        asked = decoder.decode(text)
        fields = _FIELDS.decode(text)
        for name in sorted(fields.keys() & _UNSUPPORTED.keys()):
            _check_unsupported(name, msgspec.json.decode(fields[name]))
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = re.sub(r"^\.|`$", "", path) or _missing_field(message)
        raise RequestError(f"{field or 'the body'}: {message[:1].lower()}{message[1:]}", field=field) from None
    except msgspec.DecodeError as error:
        # msgspec calls an unpaired surrogate escape truncated as well, and gives no place for either.
        found = str(error).removeprefix("JSON is malformed: ")
        if "(byte " not in found:
            found = f"it ends too early, or inside a character (byte {len(body)})"
        raise RequestError(f"the body is not valid JSON: {found}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply; expected a plain object") from None
    return asked


def _missing_field(message: str) -> str | None:
    found = re.search(r"missing required field `(\w+)`", message)
    return found[1] if found else None


def _check_unsupported(name: str, value: object) -> None:
    # Types count: for Python False equals 0, but logprobs 0 asks for something and logprobs false does not.
    harmless = _UNSUPPORTED[name]
    if value is None or any(type(value) is type(off) and value == off for off in harmless):
        return
    hint = f", or send {msgspec.json.encode(harmless[0]).decode()}" if harmless else ""
    raise RequestError(f"{name} is not supported yet; leave it out{hint}", field=name)


def _message(message: ChatMessage, where: str) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(f"{where}.role is {message.role[:40]!r}; expected one of {', '.join(_ROLES)}", field=f"{where}.role")
    for name in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if getattr(message, name):
            raise RequestError(f"{where}.{name} is not supported yet; leave it out", field=f"{where}.{name}")
    if message.content is None:
        raise RequestError(f"{where}.content is missing; expected a string or a list of text parts", field=f"{where}.content")
    if isinstance(message.content, str):
        return Message(role=role, content=message.content)
    texts = []
    for index, part in enumerate(message.content):
        field = f"{where}.content[{index}]"
        if part.type != "text":
            raise RequestError(f"{field} is of type {part.type[:40]!r}, which is not supported yet; expected text", field=field)
        if part.text is None:
            raise RequestError(f"{field}.text is missing; expected a string", field=f"{field}.text")
        texts.append(part.text)
    return Message(role=role, content="\n".join(texts))


def _prompt(prompt: str | list[int | str | list[int]], card: ModelCard) -> tuple[str | None, tuple[int, ...] | None]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0] if isinstance(prompt[0], str) else list(prompt[0])
    if isinstance(prompt, str):
        return prompt, None
    tokens = tuple(token for token in prompt if isinstance(token, int))
    if len(tokens) != len(prompt):
        raise RequestError("prompt holds several prompts; send one request for each", field="prompt")
    if not tokens:
        raise RequestError("prompt is an empty list; expected a string or token ids", field="prompt")
    if min(tokens) < 0 or max(tokens) >= card.vocabulary:
        raise RequestError(f"prompt holds a token id outside 0..{card.vocabulary - 1}", field="prompt")
    return None, tokens


def _sampling(asked: CommonBody) -> Sampling:
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        min_p=asked.min_p or 0.0,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _call(request: Request, asked: CommonBody) -> Call:
    return Call(
        request=request,
        stream=asked.stream is True,
        include_usage=asked.stream_options is not None and asked.stream_options.include_usage is True,
        timings=asked.yoke_timings is True,
    )

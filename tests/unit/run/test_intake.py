"""From a request to a submission: template, tokens, limits."""

from typing import Any

import pytest

from yoke.core.errors import RequestError
from yoke.core.request import Message, Request, Role, Sampling
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.run.chat import ChatTemplate
from yoke.run.intake import MAX_PROMPT_CHARACTERS_PER_TOKEN, Intake

SPEC = ModelSpec(
    name="tiny",
    architecture="llama",
    n_blocks=1,
    width=8,
    n_heads=1,
    n_kv_heads=1,
    head_dim=8,
    columns=8,
    vocabulary=300,
    context=64,
    norm_epsilon=1e-5,
    rope=Rope(style=RopeStyle.HALVES, dims=8),
)


class Letters:
    """A token for each byte; 256 begins a text, 257 is the special token that is written ``<|x|>``."""

    n_tokens = 300

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        parts = text.split("<|x|>") if parse_special else [text]
        tokens = list(parts[0].encode())
        for part in parts[1:]:
            tokens += [257, *part.encode()]
        return [256, *tokens] if add_special else tokens

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return token == 257


def prepare(context: int = 16, template: str | None = "<|x|>{{ messages[0].content }}", **values: Any) -> Any:
    chat = ChatTemplate(template, bos="", eos="") if template is not None else None
    return Intake(SPEC, Letters(), chat, context).prepare(Request(id="r", model="tiny", **values), 2.5)


def test_everything_that_the_engine_needs_is_passed_on() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    made = prepare(text="ab", sampling=sampling, stop=("x",), ignore_eos=True, max_tokens=5)
    assert (made.id, made.tokens, made.max_tokens, made.stop, made.ignore_eos, made.submitted_at_s) == ("r", (256, 97, 98), 5, ("x",), True, 2.5)
    assert made.sampling == sampling


def test_users_text_never_becomes_special_tokens_but_the_templates_does() -> None:
    assert 257 not in prepare(text="<|x|>a").tokens
    assert prepare(messages=(Message(role=Role.USER, content="a"),)).tokens == (257, 97)


def test_answer_is_cut_to_what_the_context_leaves() -> None:
    assert prepare(context=16, tokens=(1,) * 10).max_tokens == 6
    assert prepare(context=16, tokens=(1,) * 10, max_tokens=100).max_tokens == 6
    assert prepare(context=16, tokens=(1,) * 15, max_tokens=10**30).max_tokens == 1


@pytest.mark.parametrize(
    ("values", "field", "told"),
    [
        ({"tokens": ()}, "prompt", "empty"),
        ({"tokens": (1,) * 16}, "prompt", "16 tokens long; the context holds 16"),
        ({"tokens": (300,)}, "prompt", "outside the vocabulary of 300"),
        ({"tokens": (-1,)}, "prompt", "outside the vocabulary"),
        ({"tokens": (10**400,)}, "prompt", "outside the vocabulary"),
        ({"text": "x" * (16 * MAX_PROMPT_CHARACTERS_PER_TOKEN + 1)}, "prompt", "holds fewer than"),
        ({"messages": (Message(role=Role.USER, content="hi"),), "template": None}, "messages", "no chat template"),
        ({"messages": (Message(role=Role.USER, content="hi"),), "template": ""}, "prompt", "empty"),
        ({"messages": (Message(role=Role.USER, content="x" * 2000),)}, "prompt", "2005 characters"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_by_field(values: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        prepare(**values)
    assert caught.value.field == field

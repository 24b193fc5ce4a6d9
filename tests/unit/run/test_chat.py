"""A foreign chat template runs in a sandbox: it renders, refuses, or is refused."""

import pytest

from yoke.core.errors import ModelError, RequestError
from yoke.core.request import Message, Role
from yoke.run import chat
from yoke.run.chat import ChatTemplate

MESSAGES = (Message(role=Role.SYSTEM, content="Be brief."), Message(role=Role.USER, content="Hi {{ 7 * 7 }}"))
CHATML = """{{ bos_token }}
{%- for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def render(source: str) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(MESSAGES)


def test_template_is_rendered_up_to_the_assistants_turn_and_content_is_never_a_template() -> None:
    assert render(CHATML) == "<s><|system|>Be brief.</s><|user|>Hi {{ 7 * 7 }}</s><|assistant|>"


def test_loop_controls_that_models_use_work() -> None:
    assert render("{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}") == "user"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'role': 'x'}) %}",
        "{{ messages[0].clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.listdir('/') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_cannot_reach_out_of_their_sandbox(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses these messages") as caught:
        render(source)
    assert caught.value.field == "messages"
    assert render("{{ messages|length }}{{ messages[0].role }}") == "2system"


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ ''|attr('__class__') }}"])
def test_dangerous_attributes_are_nothing_even_to_print(source: str) -> None:
    assert render(source) == ""


def test_template_may_refuse_the_messages_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages[0].content|int + none }}",
        "{{ messages|dictsort }}",
        "{{ 3|xmlattr }}",
        "{{ nothing.at.all }}",
        "{{ nothing() }}",
        "{{ messages[0].content * (10 ** 18) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x'.encode('klingon') }}",
        "{{ 'x'.index('y') }}",
    ],
)
def test_template_that_fails_is_a_refusal_and_not_a_crash(source: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        render(source)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ ", "{% for m in messages %}", "{{ x|no_such_filter }}", "{% generate %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"]
)
def test_broken_template_is_the_models_fault(source: str) -> None:
    with pytest.raises(ModelError, match="chat template cannot be read"):
        ChatTemplate(source, bos="", eos="")


def test_prompt_that_a_template_blows_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDERED_CHARACTERS", 10)
    assert render("{{ 'x' * 10 }}") == "x" * 10
    with pytest.raises(RequestError, match="11 characters; expected at most 10"):
        render("{{ 'x' * 11 }}")

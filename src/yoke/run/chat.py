"""The model's own chat template, rendered in a sandbox."""

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from yoke.core.errors import ModelError, RequestError
from yoke.core.request import Message

MAX_RENDERED_CHARACTERS = 64 * 1024 * 1024

_FAILURES = (jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What a foreign template may raise while it renders: its own refusals, and whatever Python's methods and Jinja's filters raise on odd arguments."""


class ChatTemplate:
    """A Jinja template as tokenizers carry it (huggingface.co/docs/transformers/chat_templating).

    Raises
    ------
    ModelError
        if the template is not valid Jinja.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        self._special = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: tuple[Message, ...]) -> str:
        """The prompt text, up to where the assistant's answer begins.

        Raises
        ------
        RequestError
            if the template refuses these messages, or fails on them.
        """
        turns = [{"role": str(message.role), "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._special)
        except _FAILURES as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", field="messages") from error
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise RequestError(f"the chat template makes a prompt of {len(text)} characters; expected at most {MAX_RENDERED_CHARACTERS}", field="messages")
        return text


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

"""Chat templates: messages -> text with control tokens, in the sandbox of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dh_jax.errors import ConfigError, DataError

Render = Callable[..., str]  # (messages, tools, **variables) -> text


def template_renderer(
    template: str | None, special_tokens: Mapping[str, str], *, clock: bool = False
) -> Render:
    """A function that renders one conversation; see `TokenizerWrapper.apply_chat_template`.

    Messages and tools must be plain data, as JSON gives it: they reach the template as they are.
    It is transformers' own environment, taken compiled: cleaning every message again, which its
    public function does, costs as much as rendering.

    Args:
        template: Jinja text.
        special_tokens: role to token, which templates read.
        clock: whether the template can ask for today's date. Training data must be the same
            tomorrow; templates then take a fixed date, or are refused.

    Raises:
        ConfigError: there is no template, or transformers or Jinja is missing.
    """
    if template is None:
        raise ConfigError(
            "the tokenizer has no chat template; use an instruction-tuned model's tokenizer "
            "or put chat_template.jinja beside its tokenizer.json"
        )
    try:
        from jinja2 import TemplateError, Undefined
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError as error:
        raise ConfigError(
            f"chat templates need transformers and jinja2: pip install transformers jinja2 "
            f"({error})"
        ) from error
    try:
        compiled = _compile_jinja_template(template)
    except TemplateError as error:
        raise ConfigError(f"the chat template is malformed: {error}") from error

    always: dict[str, Any] = {**special_tokens, "documents": None, "add_generation_prompt": False}
    if not clock:
        always["strftime_now"] = Undefined(name="strftime_now")

    def render(
        messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **variables: Any
    ) -> str:
        given = [_clean(message) for message in messages]
        arguments = {**always, **variables, "messages": given, "tools": tools or None}
        try:
            return str(compiled.render(arguments))
        except (TemplateError, TypeError) as error:  # TypeError: a null where text is joined
            raise DataError(f"the chat template refuses the conversation: {error}") from error

    return render


def _clean(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: an absent value is left out, since they ask whether a
    key is there (but content, beside tool calls, may be null), and reasoning has two names."""
    cleaned = {k: v for k, v in message.items() if v is not None or k == "content"}
    if "reasoning_content" in cleaned:
        cleaned.setdefault("thinking", cleaned["reasoning_content"])
    return cleaned

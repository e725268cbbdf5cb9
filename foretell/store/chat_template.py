"""Chat messages to a prompt, by the model's own Jinja template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from foretell.errors import ForetellError, InvalidRequestError, ModelFormatError

MAX_TEMPLATE_CHARACTERS: Final = 1 << 20


class ChatTemplate:
    """One compiled template. Compiled on first use: most starts of a model never chat."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: Any = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text; it spells out its special tokens, so encode it with ``add_special_tokens=False``.

        Raises InvalidRequestError (messages the template refuses, or a rendering beyond the limits) or
        ModelFormatError (the template is no valid Jinja).
        """
        from jinja2 import TemplateError

        from foretell.store.chat_limits import METER, Meter

        _check_messages(messages)
        template = self._template()
        variables = {
            **self._special_tokens,
            "documents": None,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        token = METER.set(Meter())
        try:
            return "".join(template.generate(variables))
        except ForetellError:
            raise
        except TemplateError as error:
            why = (str(error.message or "").splitlines() or [type(error).__name__])[0]
            raise InvalidRequestError(f"the model's chat template refuses these messages: {why}") from None
        except (Exception, RecursionError) as error:  # whatever a template makes its values do
            why = (str(error).splitlines() or [""])[0][:200]
            raise InvalidRequestError(
                f"the model's chat template fails on these messages ({type(error).__name__}: {why}); "
                "check the roles and contents"
            ) from None
        finally:
            METER.reset(token)

    def _template(self) -> Any:
        if self._compiled is None:
            from jinja2 import TemplateSyntaxError

            from foretell.store.chat_sandbox import SandboxedEnvironment

            if len(self.source) > MAX_TEMPLATE_CHARACTERS:
                raise ModelFormatError(
                    f"the model's chat template has {len(self.source):,} characters, more than "
                    f"{MAX_TEMPLATE_CHARACTERS:,}; use --raw"
                )
            try:
                self._compiled = SandboxedEnvironment().compile_metered(self.source)
            except (TemplateSyntaxError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
                why = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise ModelFormatError(f"the model's chat template is no valid Jinja ({why}); use --raw") from None
        return self._compiled


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"message {position} is no object with a role; send role and content")

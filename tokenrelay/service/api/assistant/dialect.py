"""What the served model's chat template speaks: how it is told of tools, and how its answers are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tokenrelay.model.structured.tool_calls import ToolCallFormat
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.assistant.reasoning import TAGS, detected_reasoning_format
from tokenrelay.service.api.assistant.tool_formats import FORMATS, ToolFormat, detected_tool_format

AUTO, NONE = "auto", "none"
_TOOLS_IN_A_MESSAGE = ("message['tools']", 'message["tools"]', "message.tools")


@dataclass(frozen=True)
class Dialect:
    """Of one model. ``tool_format`` and ``reasoning_format`` are names; "": it has none."""

    tool_format: str
    reasoning_format: str
    knows_tools: bool  # the template has a place for them …
    tools_in_system_message: bool  # … which is the system message
    variables: frozenset[str]  # what the template can be told
    special_tokens: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_format: str = AUTO, reasoning_format: str = AUTO) -> Dialect:
        """The template's own, unless a format is named."""
        template = tokenizer.chat_template
        source = template.source or ""
        detected = detected_reasoning_format(source)
        in_message = any(place in source for place in _TOOLS_IN_A_MESSAGE)
        return cls(
            detected_tool_format(source) if tool_format == AUTO else tool_format,
            detected if reasoning_format == AUTO else "" if reasoning_format == NONE else reasoning_format,
            in_message or "tools" in template.variables,
            in_message and "tools" not in template.variables,
            template.variables,
            tokenizer.special_tokens,
        )

    @property
    def tools(self) -> ToolFormat:
        return FORMATS[self.tool_format]

    @cached_property
    def forced_calls(self) -> ToolCallFormat:
        """How a grammar writes calls: what spells a special token is that token."""
        written = self.tools.written
        fixed = "\0".join(
            (written.opening, written.before_name, written.before_arguments, written.after_arguments, written.closing)
        )
        return replace(written, special_ids={s: i for s, i in self.special_tokens.items() if s in fixed})

    def speaks_in_special_tokens(self, *, calls: bool, reasoning: bool) -> bool:
        """Whether some of what is to be read from the text are special tokens, which must be left in it then."""
        signs = [*self.tools.openings, "[ARGS]", "[CALL_ID]"] if calls else []
        if reasoning:
            signs += TAGS.get(self.reasoning_format, ("<|channel|>", "<|message|>"))
        return any(sign in self.special_tokens for sign in signs)

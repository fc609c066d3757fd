"""Grammars that force tool calls, written as a family of models was trained to write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenrelay.model.structured.grammars import lark, quoted, with_json_options

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallFormat:
    """The fixed text around calls. One call is ``before_name``, the name, ``before_arguments``, the arguments as JSON,
    ``after_arguments``. ``separator`` stands between calls, ``opening`` and ``closing`` around all of them.

    ``special_ids`` are the tokens that some of the text stands for: where it spells one, the token must come.
    """

    before_name: str
    before_arguments: str
    after_arguments: str
    separator: str = "\n"
    opening: str = ""
    closing: str = ""
    special_ids: Mapping[str, int] | None = None


HERMES = ToolCallFormat(  # Qwen's too
    before_name='<tool_call>\n{"name": "', before_arguments='", "arguments": ', after_arguments="}\n</tool_call>"
)


@dataclass(frozen=True, slots=True)
class Tool:
    """``parameters`` is the JSON schema of the arguments; None: there are none."""

    name: str
    parameters: Mapping[str, Any] | None = None


def tool_calls(tools: Sequence[Tool], tool_format: ToolCallFormat, *, parallel: bool) -> str:
    """Calls of some of ``tools``, which must not be empty: one, or with ``parallel`` one or more, and no other text."""
    text = [_start(tool_format, parallel), f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    text += [f"call_{i}: {_call(tool, tool_format)}" for i, tool in enumerate(tools)]
    return lark("\n".join(text))


def _start(tool_format: ToolCallFormat, parallel: bool) -> str:
    more = f"({_literal(tool_format.separator, tool_format)} call)*" if parallel else ""
    opening, closing = (_literal(text, tool_format) for text in (tool_format.opening, tool_format.closing))
    return f"start: {opening} call {more} {closing}"


def _call(tool: Tool, tool_format: ToolCallFormat) -> str:
    schema = with_json_options(NO_PARAMETERS if tool.parameters is None else tool.parameters)
    before = _literal(tool_format.before_name + tool.name + tool_format.before_arguments, tool_format)
    return (
        f"{before} %json {json.dumps(schema, ensure_ascii=False)} {_literal(tool_format.after_arguments, tool_format)}"
    )


def _literal(text: str, tool_format: ToolCallFormat) -> str:
    """``text`` in Lark, its special tokens by number; the empty text is nothing."""
    special_ids = tool_format.special_ids or {}
    spellings = sorted(special_ids, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, spellings))})", text) if spellings else [text]
    return " ".join(f"<[{special_ids[part]}]>" if part in special_ids else quoted(part) for part in parts if part)

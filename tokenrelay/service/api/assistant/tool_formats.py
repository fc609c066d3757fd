"""How families of models write calls of tools: what begins and ends them, and how a grammar makes them write some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenrelay.model.structured.tool_calls import HERMES, ToolCallFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """``openings`` begin calls anywhere in the text, ``closings`` may end them, ``separators`` stand between them.

    ``bare``: calls may also begin the text, with no opening. ``named``: a name may stand in front of its arguments.
    ``code``: calls may be written as in Python. ``short_ids``: the template wants ids of nine characters.
    ``written`` is the form that is forced, and explained to models whose template knows no tools.
    """

    openings: tuple[str, ...]
    closings: tuple[str, ...] = ()
    separators: tuple[str, ...] = (",", ";")
    bare: bool = False
    named: bool = False
    code: bool = False
    short_ids: bool = False
    written: ToolCallFormat


def _list_of_calls(opening: str, closing: str = "]") -> ToolCallFormat:
    return ToolCallFormat(
        opening=opening,
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing=closing,
    )


FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(openings=("<tool_call>",), closings=("</tool_call>",), written=HERMES),
    "llama3": ToolFormat(
        openings=("<|python_tag|>",),
        bare=True,
        written=ToolCallFormat(
            before_name='{"name": "', before_arguments='", "parameters": ', after_arguments="}", separator="; "
        ),
    ),
    "mistral": ToolFormat(
        openings=("[TOOL_CALLS]",), named=True, short_ids=True, written=_list_of_calls("[TOOL_CALLS][")
    ),
    "gemma": ToolFormat(
        openings=("```tool_code", "```tool_call", "```json"),
        closings=("```",),
        bare=True,
        code=True,
        written=ToolCallFormat(
            before_name='```tool_code\n{"name": "', before_arguments='", "parameters": ', after_arguments="}\n```"
        ),
    ),
    "granite": ToolFormat(
        openings=("<|tool_call|>", "<tool_call>"),
        closings=("</tool_call>", "<|/tool_call|>"),
        written=_list_of_calls("<|tool_call|>["),
    ),
    "phi4": ToolFormat(
        openings=("functools", "<|tool_call|>"),
        closings=("<|/tool_call|>",),
        written=_list_of_calls("functools["),
    ),
}

_SIGNS = (  # in a template, the first that is found decides
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3"),
    ("<|start_header_id|>", "llama3"),
    ("functools", "phi4"),
    ("<|/tool_call|>", "phi4"),
    ("<|tool|>", "phi4"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("tool_code", "gemma"),
    ("<start_of_turn>", "gemma"),
)


def detected_tool_format(template: str | None) -> str:
    """The name of the format that a model's chat template speaks of; Hermes if it speaks of none."""
    return next((name for sign, name in _SIGNS if sign in (template or "")), "hermes")

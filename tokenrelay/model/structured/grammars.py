"""What a request may ask its text to be, written as the string in ``SamplingParams.grammar``: llguidance's JSON.

Nothing is compiled here, so a string may still turn out to be unusable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from tokenrelay.model.structured.errors import GrammarError

MAX_WHITESPACE = 32  # characters at one place of a JSON text: without a bound, small models write blanks for ever

_JSON_OPTIONS = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}"}
_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)  # how GBNF's rules begin, and Lark's do not
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|#.*')
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_LEADING_BAR = re.compile(r"(\s*\n\s*)\|")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Mapping[str, Any] | str) -> str:
    """JSON that the schema allows, its properties in the schema's order. The schema may be given as JSON text.

    llguidance's own options may come with it, as ``x-guidance``.
    """
    return _serialized(json_schema=with_json_options(_parsed(schema) if isinstance(schema, str) else schema))


def regex(pattern: str) -> str:
    """Text that the whole of the regex matches. (Rust's syntax: no look-around, no back-references)"""
    return _serialized(lark_grammar=f"start: /{regex_to_lark(pattern)}/")


def choice(choices: Sequence[str]) -> str:
    """One of the texts."""
    return _serialized(lark_grammar=f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}")


def lark(grammar: str) -> str:
    """Text of a context-free grammar, in llguidance's variant of Lark. It begins with the rule ``start``."""
    return _serialized(lark_grammar=grammar)


def ebnf(grammar: str) -> str:
    """Text of a grammar in llama.cpp's GBNF, which begins with the rule ``root``, or in Lark."""
    return lark(_lark_of_gbnf(grammar) if _RULE.search(grammar) else grammar)


MAKERS: Mapping[str, Callable[[Any], str]] = {
    "json_schema": json_schema,
    "regex": regex,
    "choice": choice,
    "ebnf": ebnf,
    "ready": str,  # what this package has made already
}


def with_json_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our options of llguidance, as far as it has no own."""
    own = schema.get("x-guidance", {})
    if not isinstance(own, Mapping) or "whitespace_flexible" in own:  # this would be overridden by a pattern
        return dict(schema)
    return {**schema, "x-guidance": {**_JSON_OPTIONS, **own}}


def quoted(text: str) -> str:
    """``text`` as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _serialized(**grammar: Any) -> str:
    try:
        return json.dumps({"grammars": [grammar]}, ensure_ascii=False)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None


def _parsed(schema: str) -> dict[str, Any]:
    try:
        parsed = json.loads(schema)
    except json.JSONDecodeError as error:
        raise GrammarError(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError):  # a number of thousands of digits
        raise GrammarError("it is nested too deeply, or has a number that is too long") from None
    if not isinstance(parsed, dict):
        raise GrammarError("it must be a JSON object")
    return parsed


def _lark_of_gbnf(grammar: str) -> str:
    plain = _QUOTED.sub(lambda match: _plain_escapes(match[0]), grammar)
    try:
        return gbnf_to_lark(_LEADING_BAR.sub(r" |\1", plain))  # the converter wants bars at the ends of lines
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # llguidance raises bare Exceptions
        raise GrammarError(str(error)) from None


def _plain_escapes(part: str) -> str:
    """A literal or a character class of GBNF, with no escapes but those that llguidance's converter translates. A
    comment becomes nothing."""
    if part.startswith('"'):
        return quoted(_ESCAPE.sub(_character, part[1:-1]))
    return _ESCAPE.sub(_in_class, part) if part.startswith("[") else ""


def _character(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2] or escape[3]
    if digits is None:
        return _CONTROLS.get(escape[4], escape[4])
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise GrammarError(f"{escape[0]} is not a character")
    return chr(code)


def _in_class(escape: re.Match[str]) -> str:
    character = _character(escape)
    if escape[4] is not None and escape[4] in '"\\[]nrt':
        return escape[0]
    return character if ord(character) >= 0x80 else f"\\x{ord(character):02x}"

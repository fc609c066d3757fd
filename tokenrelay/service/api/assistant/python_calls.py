"""Calls written as in Python, ``name(city="Paris", days=2)``: names and arguments as JSON. Nothing is evaluated."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<key>[A-Za-z_]\w{0,63})\s*=(?!=)
    | (?P<word>True|False|None)\b
    | (?P<number>-?(?:0|[1-9]\d{0,63})(?:\.\d{1,64})?(?:[eE][+-]?\d{1,3})?)
    | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<mark>[\[\]{}(),:])
    )""",
    re.VERBOSE | re.DOTALL,
)
_CALL = re.compile(r"\s*(?:print\(\s*)?(?P<name>[A-Za-z_][\w.]{0,127})\(")
_GAP = re.compile(r"[\s,;\[\]]*")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_QUOTE_OR_ESCAPE = re.compile(r"""\\(?P<escaped>.)|(?P<quote>")""", re.DOTALL)
_SAME_IN_JSON = set('"\\/bfnrtu')


class PythonCall(NamedTuple):
    name: str
    arguments: str  # JSON


def python_calls(code: str) -> list[PythonCall]:
    """All of the calls that ``code`` consists of; none if it is anything else."""
    calls: list[PythonCall] = []
    at = _skip(code, 0)
    while at < len(code):
        match = _CALL.match(code, at)
        found = match and _arguments(code, match.end())
        if not match or not found:
            return []
        arguments, at = found
        calls.append(PythonCall(match["name"], arguments))
        at = _skip(code, at + code.startswith(")", at) * ("print(" in match[0]))
    return calls


def _skip(code: str, at: int) -> int:
    gap = _GAP.match(code, at)
    return gap.end() if gap else at


def _arguments(code: str, at: int) -> tuple[str, int] | None:
    """The JSON object of the arguments that begin here, and where their bracket has closed."""
    pieces, depth = ["{"], 1
    while depth and (token := _TOKEN.match(code, at)):
        at = token.end()
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token["mark"] or "", 0)
        if token["key"] and depth > 1:
            return None
        pieces.append("}" if not depth else _as_json(token))
    text = "".join(pieces)
    return (text, at) if not depth and _is_object(text) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _as_json(token: re.Match[str]) -> str:
    if token["key"]:
        return f'"{token["key"]}": '
    if token["word"]:
        return _WORDS[token["word"]]
    if token["string"]:
        return f'"{_QUOTE_OR_ESCAPE.sub(_escape, token["string"][1:-1])}"'
    return {"(": "[", ")": "]", ",": ", ", ":": ": "}.get(token["mark"] or "", token["mark"] or token["number"])


def _escape(found: re.Match[str]) -> str:
    if found["quote"]:
        return '\\"'
    return found[0] if found["escaped"] in _SAME_IN_JSON else found["escaped"]

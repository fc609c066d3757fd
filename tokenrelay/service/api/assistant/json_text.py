"""JSON inside a model's text, consumed as it comes. The text may end anywhere, and be anything."""

from __future__ import annotations

import json
import re

from tokenrelay.service.api.assistant.reader import Parsing, Reader

MAX_NAME = 256  # characters of a key, or of a name
MAX_DEPTH = 128  # of an object

_BLANKS = re.compile(r"[ \t\r\n]*")
_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BETWEEN = re.compile(r'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+"|\{\}|\[\])*+', re.DOTALL)  # whole flat values
_CLOSING = {"{": "}", "[": "]"}


class Malformed(Exception):
    """The text is not what it began as."""


def blanks(reader: Reader) -> Parsing[str]:
    """Consume white space; the next character, or "" at the end."""
    while True:
        reader.run(_BLANKS)
        if not reader.at_end or reader.ended:
            return (yield from reader.peek())
        yield


def expect(reader: Reader, character: str) -> Parsing[None]:
    """Consume white space and the character. Raises Malformed."""
    if (yield from blanks(reader)) != character:
        raise Malformed
    reader.take(1)


def string(reader: Reader, limit: int = MAX_NAME) -> Parsing[str]:
    """Consume white space and a string; its value. ``limit`` in characters; 0: none. Raises Malformed."""
    yield from expect(reader, '"')
    return _value((yield from _string_rest(reader, limit)))


def object_text(reader: Reader) -> Parsing[None]:
    """Consume the object that begins here. Its brackets match; what is between them is the model's affair.

    Raises Malformed where brackets do not match, or the text ends.
    """
    expected = [_CLOSING[reader.take(1)]]
    while True:
        reader.run(_BETWEEN)
        character = yield from reader.peek()
        if character == '"':
            reader.take(1)
            yield from _string_rest(reader, 0)
        elif character in _CLOSING and len(expected) < MAX_DEPTH:
            expected.append(_CLOSING[reader.take(1)])
        elif character == expected[-1]:
            reader.take(1)
            expected.pop()
            if not expected:
                return
        elif not character or character in "{}[]":
            raise Malformed


def _string_rest(reader: Reader, limit: int) -> Parsing[list[str]]:
    """Consume a string behind its first quote; its pieces without the last quote. Raises Malformed."""
    pieces: list[str] = []
    length = 0
    while (yield from reader.peek()) != '"':
        piece = reader.run(_IN_STRING)
        if (yield from reader.peek()) == "\\":
            piece += reader.take(1)
            yield from reader.peek()
            piece += reader.take(1)
        pieces.append(piece)
        length += len(piece)
        if not piece or (limit and length > limit):
            raise Malformed
    reader.take(1)
    return pieces


def _value(pieces: list[str]) -> str:
    try:
        return str(json.loads(f'"{"".join(pieces)}"', strict=False))
    except ValueError:
        raise Malformed from None

"""Calls of tools in an answer's text.

A call is told as soon as its name and the beginning of its arguments are there. What only looks like one is text. White
space around calls is dropped; nothing else is.
"""

from __future__ import annotations

import re
from hashlib import sha256

from tokenrelay.service.api.assistant.deltas import TextDelta, ToolCallDelta
from tokenrelay.service.api.assistant.json_text import MAX_NAME, Malformed, blanks, expect, object_text, string
from tokenrelay.service.api.assistant.python_calls import python_calls
from tokenrelay.service.api.assistant.reader import Parsing
from tokenrelay.service.api.assistant.stage import Stage
from tokenrelay.service.api.assistant.tool_formats import ToolFormat

_NAME = re.compile(r"[\w.-]*")


class ToolCallParser(Stage):
    """``id_stem`` and a number are the id of each call. Unless ``parallel``, all calls but the first are text."""

    def __init__(self, tool_format: ToolFormat, id_stem: str, *, parallel: bool = True) -> None:
        super().__init__()
        self.num_calls = 0
        self._format = tool_format
        self._id_stem = id_stem
        self._parallel = parallel
        self._blanks: list[str] = []  # white space that is only told if text follows
        self._in_arguments = False

    def document(self) -> Parsing[None]:
        if self._format.bare:
            yield from self._attempt(self._bare())
        while (yield from self._text()):
            yield from self._attempt(self._opened())
        if self._blanks and not self.num_calls:
            self.tell(TextDelta("".join(self._blanks)))

    def pause(self) -> None:
        arguments = self.reader.drain() if self._in_arguments else ""
        if arguments:
            self.tell(ToolCallDelta(self.num_calls - 1, "", "", arguments))

    def _text(self) -> Parsing[bool]:
        """Whatever is no call. Whether it ends with the opening of one."""
        while True:
            self.reader.before(self._format.openings)
            self._say(self.reader.drain())
            if (yield from self.reader.which(self._format.openings)):
                return True
            if self.reader.ended and self.reader.at_end:
                return False

    def _say(self, text: str) -> None:
        body = text.rstrip()
        if body:
            self.tell(TextDelta("".join([*self._blanks, body])))
            self._blanks.clear()
        self._blanks += [text[len(body) :]] * (len(body) < len(text))

    def _attempt(self, calls: Parsing[None]) -> Parsing[None]:
        try:
            yield from calls
        except Malformed:
            self.pause()
            self._in_arguments = False
            self._say(self.reader.drain())

    def _bare(self) -> Parsing[None]:
        if (yield from blanks(self.reader)) not in ("{", "["):
            raise Malformed
        yield from self._body()

    def _opened(self) -> Parsing[None]:
        opening = yield from self.reader.which(self._format.openings)
        self.reader.take(len(opening))
        yield from self._body()

    def _body(self) -> Parsing[None]:
        """What is between an opening and a closing."""
        begin, first = len(self.reader.taken), (yield from blanks(self.reader))
        if first == "[":
            self.reader.take(1)
            first = yield from blanks(self.reader)
            if first == "{" or not self._format.code:
                yield from self._list()
            else:
                yield from self._code(begin)
        elif self._format.named and first not in ("{", ""):
            yield from self._named()
        elif self._format.code and first not in ("{", ""):
            yield from self._code(begin)
        else:
            yield from self._objects()
        yield from self._closing()

    def _closing(self) -> Parsing[None]:
        yield from blanks(self.reader)
        closing = yield from self.reader.which(self._format.closings)
        self.reader.take(len(closing))
        self.reader.drain()

    def _list(self) -> Parsing[None]:
        """``{…}, {…}]``"""
        yield from self._call()
        while (yield from blanks(self.reader)) == ",":
            self.reader.take(1)
            yield from self._call()
        yield from expect(self.reader, "]")

    def _objects(self) -> Parsing[None]:
        """``{…}``, or several."""
        yield from self._call()
        while True:
            upcoming = yield from blanks(self.reader)
            if upcoming and upcoming in self._format.separators:
                self.reader.take(1)
            elif upcoming != "{":
                return
            yield from self._call()

    def _call(self) -> Parsing[None]:
        """``{"name": "…", "arguments": {…}}``, in any order; there may be an id and a type."""
        yield from expect(self.reader, "{")
        name = arguments = ""
        told = False
        while True:
            key = yield from self._key()
            if key == "name" and not name:
                name = yield from string(self.reader)
            elif key == "arguments" and name and (yield from blanks(self.reader)) == "{" and not told:
                yield from self._streamed_arguments(name)
                told = True
            elif key == "arguments" and not arguments and not told:
                arguments = yield from self._whole_arguments()
            elif key in ("id", "type"):
                yield from string(self.reader)
            else:
                raise Malformed
            if (yield from blanks(self.reader)) != ",":
                break
            self.reader.take(1)
        yield from expect(self.reader, "}")
        if not told:
            self._begin(name, arguments or "{}")
        self.reader.drain()

    def _key(self) -> Parsing[str]:
        key = yield from string(self.reader)
        yield from expect(self.reader, ":")
        return "arguments" if key == "parameters" else key

    def _streamed_arguments(self, name: str) -> Parsing[None]:
        self._begin(name)
        self._in_arguments = True
        yield from object_text(self.reader)
        self.pause()
        self._in_arguments = False

    def _whole_arguments(self) -> Parsing[str]:
        """Before the name, or as JSON in a string."""
        begin = len(self.reader.taken)
        if (yield from blanks(self.reader)) == "{":
            yield from object_text(self.reader)
            return "".join(self.reader.taken[begin:]).strip()
        arguments = yield from string(self.reader, limit=0)
        if not arguments.lstrip().startswith("{"):
            raise Malformed
        return arguments

    def _named(self) -> Parsing[None]:
        """``name[ARGS]{…}``, maybe with ``[CALL_ID]…`` between them."""
        name = yield from self._word()
        if (yield from self.reader.which(("[CALL_ID]",))):
            self.reader.take(len("[CALL_ID]"))
            yield from self._word()
        if (yield from self.reader.which(("[ARGS]",))):
            self.reader.take(len("[ARGS]"))
        if (yield from blanks(self.reader)) != "{":
            raise Malformed
        yield from self._streamed_arguments(name)

    def _word(self) -> Parsing[str]:
        pieces, length = [""], 0
        while (yield from self.reader.peek()) and (piece := self.reader.run(_NAME)):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_NAME:
                raise Malformed
        return "".join(pieces)

    def _code(self, begin: int) -> Parsing[None]:
        """Everything up to the closing."""
        while True:
            self.reader.before(self._format.closings)
            if (yield from self.reader.which(self._format.closings)) or (self.reader.ended and self.reader.at_end):
                break
        calls = python_calls("".join(self.reader.taken[begin:]))
        if not calls or len(calls) > 1 > self._parallel:
            raise Malformed
        for call in calls:
            self._begin(call.name, call.arguments)

    def _begin(self, name: str, arguments: str = "") -> None:
        """A call is certain; what led to it is no text."""
        if not name or (self.num_calls and not self._parallel):
            raise Malformed
        self.reader.drain()
        self._blanks.clear()
        self.tell(ToolCallDelta(self.num_calls, self._id(), name, ""))
        if arguments:
            self.tell(ToolCallDelta(self.num_calls, "", "", arguments))
        self.num_calls += 1

    def _id(self) -> str:
        name = f"{self._id_stem}{self.num_calls}"
        return short_id(name) if self._format.short_ids else name


def short_id(name: str) -> str:
    """Nine letters and digits, which is what Mistral's templates want; the same for the same name."""
    if len(name) == 9 and name.isascii() and name.isalnum():
        return name
    return sha256(name.encode()).hexdigest()[:9]

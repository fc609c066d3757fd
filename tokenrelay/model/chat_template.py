"""A model's chat template: messages in, prompt text out, and which stretches of it came from whom.

Templates come with models, so they run in jinja2's immutable sandbox and within a budget (``template_budget``), with
the same names and filters that transformers gives them. Knows no tokenizer: ``Markers`` only keeps special tokens'
spellings in messages apart from those that the template writes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

from tokenrelay.model.template_budget import BudgetedEnvironment, budget

_END = "\uf8fe.end.of.message.\uf8fe"  # where a message that is continued ends
_PRIVATE_USE = range(0xE000, 0xF8F0)  # characters without a meaning, so a text that holds one can do with another
_ESCAPED = re.compile(r"\\u([ef][0-9a-f]{3})")
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplateError(ValueError):
    """The messages do not fit the model's chat template (the message is the template's own), or it has none."""


class _Generation(Extension):
    """``{% generation %}`` marks what to train on; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it on the instance)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """``special_tokens`` are the names templates may use, such as ``bos_token``, with their spellings."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. ``template_kwargs`` are further names of the template, such as ``enable_thinking``.

        With ``continue_final_message`` it ends where the last message's content ends.

        Raises:
            ChatTemplateError: no template, one that refuses the messages, or a reserved name in ``template_kwargs``.
        """
        if continue_final_message:
            messages, add_generation_prompt = _with_end(messages), False
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]  # they would write "None"
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        extra = dict(template_kwargs or {})
        if reserved := sorted(extra.keys() & (given.keys() | self._special_tokens.keys() | _GLOBALS.keys())):
            raise ChatTemplateError(f"template arguments may not be called {', '.join(reserved)}")
        template = self._compiled
        try:
            with budget():
                text = template.render(self._special_tokens | extra | given)
            text.encode()  # half a surrogate pair is no text, and a ValueError
        except _TEMPLATE_FAULTS as error:
            raise ChatTemplateError(f"the model's chat template refused the messages: {error}") from error
        return _up_to_end(text) if continue_final_message else text

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set: its arguments, as far as they have a name."""
        try:
            return frozenset(find_undeclared_variables(_environment().parse(self.source or "")))
        except TemplateError:
            return frozenset()

    @cached_property
    def _compiled(self) -> Template:
        if self.source is None:
            raise ChatTemplateError(
                "this model has no chat template: send a prompt to completions, or use an instruct model"
            )
        try:
            return _environment().from_source(self.source)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template cannot be compiled: {error}") from error


class Markers:
    """Breaks special tokens' spellings in messages with a character that no message holds.

    A spelling is broken inside a string, and across strings that a template might join: where one ends with the
    beginning of a spelling, or begins with the end of one. Lengths and surrounding white space aside, templates see
    the text they expect. A special token of a single character cannot be broken, and is left.
    """

    def __init__(self, special_tokens: Iterable[str]) -> None:
        spellings = {spelling for spelling in special_tokens if len(spelling) > 1}
        rests = defaultdict(list)
        for spelling in spellings:
            rests[spelling[0]].append(re.escape(spelling[1:]))
        self._inside = re.compile("|".join(f"{re.escape(c)}(?={'|'.join(r)})" for c, r in rests.items()) or "(?!)")
        self._beginnings = {s[:n] for s in spellings for n in range(1, len(s)) if not s[0].isalnum()}
        self._ends = {s[n:] for s in spellings for n in range(1, len(s)) if not s[-1].isalnum()}
        self._first, self._last = {s[0] for s in self._beginnings}, {s[-1] for s in self._ends}
        self._longest = max(map(len, spellings), default=1)

    def choose(self, values: Any, template: str) -> str | None:
        """A marker for ``values``, or None if nothing in them needs one; ChatTemplateError if they leave none free."""
        texts = set(_strings(values))  # keys and roles once
        if not any(map(self._cuts, texts)):
            return None
        used = _beyond_ascii([template, *texts])
        for code in _PRIVATE_USE:
            if chr(code) not in used:
                return chr(code)
        raise ChatTemplateError("the messages use every private-use character of Unicode")

    def mark(self, value: Any, marker: str) -> Any:
        """A copy of ``value`` (strings in lists and mappings, keys too) with the spellings broken."""
        if isinstance(value, str):
            return self._marked(value, marker)
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marker) for item in value]
        return value

    def _marked(self, text: str, marker: str) -> str:
        bounds = [0, *self._cuts(text), len(text)]
        return marker.join(text[start:end] for start, end in pairwise(bounds))

    def _cuts(self, text: str) -> list[int]:
        """Where to insert the marker: after the first character of a spelling, or before the end of one."""
        return sorted({match.end() for match in self._inside.finditer(text)} | self._edges(text))

    def _edges(self, text: str) -> set[int]:
        """Where templates, which trim, might join it to the rest of a spelling. Few texts need more than a look."""
        first, body = len(text) - len(text.lstrip()), text.strip()
        lengths = range(1, min(self._longest, len(body) + 1))
        cuts: set[int] = set()
        if not self._first.isdisjoint(body[-self._longest :]):
            cuts |= {first + len(body) - n + 1 for n in lengths if body[-n:] in self._beginnings}
        if not self._last.isdisjoint(body[: self._longest]):
            cuts |= {first for n in lengths if body[:n] in self._ends}
        return cuts


def unmarked(text: str, marker: str) -> str:
    """``text`` without the marker, also where it is escaped: in ASCII, or in a mapping as Python writes it."""
    return text.replace(marker, "").replace(_escape(marker), "")


def _escape(marker: str) -> str:
    return f"\\u{ord(marker):04x}"


def _beyond_ascii(texts: Sequence[str]) -> set[str]:
    """What they hold, also escaped. One pass for all characters: a long message may hold each of them."""
    used: set[str] = set().union(*(text for text in texts if not text.isascii()))
    return used.union(chr(int(code, 16)) for text in texts for code in _ESCAPED.findall(text))


def _with_end(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    *earlier, last = messages
    return [*earlier, {**last, "content": f"{last['content']}{_END}"}]


def _up_to_end(text: str) -> str:
    before, end, _ = text.rpartition(_END)
    if not end:
        raise ChatTemplateError("the model's chat template does not write the last message, which is to be continued")
    return before


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's own filter, which escapes for HTML; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_GLOBALS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _environment() -> BudgetedEnvironment:
    environment = BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(_GLOBALS)
    return environment

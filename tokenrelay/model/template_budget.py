"""jinja2's immutable sandbox with a budget: a template comes with a model, and may neither hold up nor fill the server.

A step is a round of a loop or a call; counted in characters are the texts that a template puts together, kept or not,
and what filters go through. So time and memory are bounded without a clock, and the same messages always render or
never do. What only looks for something in a text is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 100_000
MAX_CHARACTERS = 1 << 27
_LENGTHENS = {"center", "ljust", "rjust", "zfill", "expandtabs"}  # str methods that take a width
_COUNTED, _CONCATENATED = "tokenrelay_counted", "tokenrelay_concatenated"


class _Budget:
    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError(f"it takes more than {MAX_STEPS} steps")

    def text(self, length: int) -> None:
        """Before a text of this length is made."""
        self.characters -= length
        if self.characters < 0:
            raise TemplateError(f"it puts together more than {MAX_CHARACTERS} characters")


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextmanager
def budget() -> Iterator[None]:
    """For the one rendering inside."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Templates of ``from_source`` render within ``budget()`` only."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters.update({name: _bounded(function) for name, function in self.filters.items()})
        self.filters[_COUNTED], self.filters[_CONCATENATED] = _counted, _concatenated

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """How jinja2 joins what a template, a macro or a block has written."""
        return "".join(_paid(parts))

    def from_source(self, source: str) -> Template:
        """Compiled, with its loops and concatenations counted. Raises jinja2's TemplateError."""
        return self.from_string(_Counting().visit(self.parse(source)))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps format
        if isinstance(owner, str):
            _budget.get().text(_most(getattr(obj, "__name__", ""), owner, args))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(left, int | float) and abs(left) <= 10 and abs(right) <= 100):
            raise TemplateError("it raises to a power that is too high")
        for text, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(other, int) and isinstance(text, str | list | tuple):
                _budget.get().text(len(text) * max(other, 0))
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _budget.get().text(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _budget.get().text(_most("%", left, right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("recursive loops are not supported")
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, _CONCATENATED, [], [], None, None, lineno=node.lineno)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.get().step()
        yield item


def _paid(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _budget.get().text(len(text))
        yield text


def _concatenated(parts: Iterable[Any]) -> str:
    texts = [str(part) for part in parts]
    _budget.get().text(sum(map(len, texts)))
    return "".join(texts)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose longest result is paid for beforehand."""

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        first = next((i for i, one in enumerate(given) if isinstance(one, str | list | tuple | range)), None)
        if first is not None:
            value = given.pop(first)
            _budget.get().text(_most(function.__name__.removeprefix("do_"), value, given))
        return function(*args, **kwargs)

    return paid


def _most(method: str, value: Any, args: Iterable[Any]) -> int:
    """An upper bound of how long the result of a text's method is."""
    args = list(args)
    widths = sum(abs(one) for one in args if isinstance(one, int) and not isinstance(one, bool))
    own = len(value)
    match method:
        case "join" if not isinstance(value, str):
            lengths = [len(str(one)) for one in (*value, *args)]
            return sum(lengths) + own * max(lengths[len(value) :], default=0)
        case "replace" | "join" | "indent" | "translate" | "wordwrap":
            lengths = [len(str(one)) for one in args]
            return own + (own + 1) * (max(lengths, default=0) + widths) + sum(lengths)
        case "format" | "%" | "format_map":
            digits = "".join(c if c.isdigit() else " " for c in str(value)).split()
            lengths = [len(str(one)) for one in args]
            return own + sum(lengths) * max(1, own) + sum(min(int(d[:12]), MAX_CHARACTERS + 1) for d in digits) + widths
        case _ if method in _LENGTHENS:
            return own * max(widths, 1) if method == "expandtabs" else own + widths
    return own

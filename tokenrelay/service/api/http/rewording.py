"""Errors about a chat completion, in the words of the request that it was translated from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tokenrelay.service.errors import InvalidRequestError

Words = Mapping[str, str]  # from a pattern of ours to what stands there in the original


@contextmanager
def told_in(words: Words) -> Iterator[None]:
    """Raises InvalidRequestError and its kinds as they came, but for the names of parameters."""
    try:
        yield
    except InvalidRequestError as error:
        error.message = _reworded(error.message, words)
        error.param = error.param and _reworded(error.param, words)
        raise


def _reworded(text: str, words: Words) -> str:
    for ours, theirs in words.items():
        text = re.sub(ours, theirs, text)
    return text

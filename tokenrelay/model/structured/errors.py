"""Why a grammar cannot be used, in a sentence that a client can act on."""

from __future__ import annotations

import re

MAX_MESSAGE = 300  # characters: llguidance repeats what it was given

_EXCERPT = re.compile(r"^\s*(\d+ \|.*|\^+)$")  # lines that show the source again, and point at it
_LARK_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_IN_REGEX = re.compile(r"regex parse error:\n    (?P<regex>.*)\n    (?P<indent> *)\^+\nerror: (?P<reason>.*)")
_TOO_COMPLEX = re.compile("too many (states|expressions|items)|Current row has", re.IGNORECASE)
_MEANINGS = {
    "NoExtensionBias": "nothing that it allows can come here",
    "panic": "it is too large, or llguidance cannot handle it",
}


class GrammarError(ValueError):
    """A schema, regex or grammar that cannot be compiled, or allows nothing. The message names the place if known."""


def explain(error: str) -> str:
    """One line of llguidance's error: without the source, which the client knows, and with the place in words."""
    error = error.removesuffix("<non-verbose/>").strip()
    for sign, meaning in _MEANINGS.items():
        if error.startswith(sign):
            return meaning
    if _TOO_COMPLEX.search(error):
        return _shortened(f"it is too complex: {error.splitlines()[0]}", MAX_MESSAGE)
    if match := _IN_REGEX.search(error):
        place = f"character {len(match['indent']) + 1} of the regex {_shortened(match['regex'], 80)}"
        return _shortened(f"{match['reason']} at {place}", MAX_MESSAGE)
    lines = [line.strip() for line in error.splitlines() if not _EXCERPT.match(line)]
    return _shortened(_LARK_PLACE.sub(r"line \1, column \2: ", " ".join(lines)), MAX_MESSAGE)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"

"""What a model thought before it answered, split from the answer."""

from __future__ import annotations

from collections.abc import Mapping

from tokenrelay.service.api.assistant.deltas import ReasoningDelta, TextDelta
from tokenrelay.service.api.assistant.json_text import blanks
from tokenrelay.service.api.assistant.reader import Parsing
from tokenrelay.service.api.assistant.stage import Stage

OPEN = ":open"  # behind a format's name: the prompt has begun the reasoning already
HARMONY = "harmony"
TAGS: Mapping[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
}

_MESSAGE = "<|message|>"
_BEGINS = ("<|start|>", "<|channel|>")
_ENDS = ("<|end|>", "<|return|>", "<|call|>")


def detected_reasoning_format(template: str | None) -> str:
    """The name of the format that a model's chat template speaks of, or ""."""
    template = template or ""
    if "<|channel|>" in template:
        return HARMONY
    return next((name for name, tags in TAGS.items() if any(tag in template for tag in tags)), "")


def opened_by(prompt: str, reasoning_format: str) -> str:
    """The format, as it continues this prompt."""
    opening, _ = TAGS.get(reasoning_format, ("", ""))
    return reasoning_format + OPEN if opening and prompt.rstrip().endswith(opening) else reasoning_format


def reasoning_parser(name: str) -> Stage:
    """The parser of a format."""
    plain = name.removesuffix(OPEN)
    return HarmonyParser() if plain == HARMONY else TaggedParser(*TAGS[plain], is_open=plain != name)


class TaggedParser(Stage):
    """Reasoning stands at the beginning, between two tags. The first may be in the prompt, the last may be missing."""

    def __init__(self, opening: str, closing: str, *, is_open: bool) -> None:
        super().__init__()
        self._opening, self._closing = opening, closing
        self._is_open = is_open

    def document(self) -> Parsing[None]:
        yield from blanks(self.reader)
        opening = yield from self.reader.which((self._opening,))
        if opening or self._is_open:
            self.reader.take(len(opening))
            yield from self._reasoning()
        while True:
            self.reader.take(self.reader.num_kept)
            if text := self.reader.drain():
                self.tell(TextDelta(text))
            if self.reader.ended:
                return
            yield

    def _reasoning(self) -> Parsing[None]:
        """Up to the answer, without the white space around it."""
        yield from blanks(self.reader)
        self.reader.drain()
        held: list[str] = []
        while True:
            self.reader.before((self._closing,))
            text = self.reader.drain()
            if body := text.rstrip():
                self.tell(ReasoningDelta("".join([*held, body])))
                held.clear()
            held.append(text[len(body) :])
            if (yield from self.reader.which((self._closing,))):
                break
            if self.reader.ended and self.reader.at_end:
                return
        self.reader.take(len(self._closing))
        yield from blanks(self.reader)
        self.reader.drain()


class HarmonyParser(Stage):
    """Messages in channels: what is in ``analysis`` is reasoning, everything else is text."""

    def document(self) -> Parsing[None]:
        kind: type[TextDelta | ReasoningDelta] = TextDelta
        while not (self.reader.ended and self.reader.at_end):
            self.reader.before((*_BEGINS, *_ENDS))
            if text := self.reader.drain():
                self.tell(kind(text))
            if end := (yield from self.reader.which(_ENDS)):
                self.reader.take(len(end))
                self.reader.drain()
                kind = TextDelta
            elif (yield from self.reader.which(_BEGINS)):
                kind = yield from self._header()

    def _header(self) -> Parsing[type[TextDelta | ReasoningDelta]]:
        """``<|start|>assistant<|channel|>analysis<|message|>``; what turns out to be none is text."""
        self.reader.take(1)
        length = 0
        while True:
            piece = self.reader.before((_MESSAGE,))
            length += len(piece)
            if (yield from self.reader.which((_MESSAGE,))):
                self.reader.take(len(_MESSAGE))
                return ReasoningDelta if "<|channel|>analysis" in self.reader.drain() else TextDelta
            if length > 200 or self.reader.ended:
                self.tell(TextDelta(self.reader.drain()))
                return TextDelta

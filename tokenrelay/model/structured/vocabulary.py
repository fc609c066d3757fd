"""A model's vocabulary as llguidance sees it: which bytes each token adds to a text, and which tokens end one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

from llguidance import LLTokenizer

from tokenrelay.model.detokenizer import TokenBytes
from tokenrelay.model.structured.errors import GrammarError

_SEAM = "\x02"  # a letter that no token continues


class TokenTable(TokenBytes, Protocol):
    """What a vocabulary is read from: a ``Tokenizer``."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """``tokens`` by id; an id without a token has no bytes, and is never allowed. A special token is no text: only a
    grammar that names it can allow it. Those that end a text are allowed exactly where the grammar may end."""

    tokens: Sequence[bytes]
    special_ids: Sequence[int]
    eos_token_ids: Sequence[int]

    @classmethod
    def of(cls, tokenizer: TokenTable, size: int | None = None) -> Self:
        """``size`` is the network's vocabulary, if it is larger than the tokenizer's."""
        size = max(size or 0, tokenizer.vocab_size)
        return cls(
            tokens=[tokenizer.token_bytes(i) for i in range(size)],
            special_ids=sorted(tokenizer.special_ids.union(tokenizer.eos_token_ids)),
            eos_token_ids=tokenizer.eos_token_ids,
        )


Encode = Callable[[str], list[int]]


def llguidance_tokenizer(vocabulary: Vocabulary, encode: Encode | None = None) -> LLTokenizer:
    """``encode`` gives the tokens in which a text that a grammar forces is written; without it, the longest ones.

    Raises:
        GrammarError: the vocabulary has no token that ends a text.
    """
    if not vocabulary.eos_token_ids:
        raise GrammarError("this model has no end-of-sequence token, which every grammar needs")
    return LLTokenizer(_Adapter(vocabulary, encode), eos_token=list(vocabulary.eos_token_ids))  # type: ignore[arg-type]


class _Adapter:
    """The attributes that llguidance asks of a tokenizer. A call must not raise, and its tokens must be the text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(vocabulary.special_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """A tokenizer may put a space before a text, or normalize it: then its tokens are not the text's."""
        for seam in ("", _SEAM):
            tokens = self._behind(seam, self._encode(seam + text)) if self._encode else None
            if tokens is not None and self._bytes(tokens) == text.encode():
                return tokens
        return self._longest(text.encode())

    def _behind(self, seam: str, tokens: list[int]) -> list[int] | None:
        """The tokens after the seam, which may have got a space before it; None if there is no cut."""
        for cut in range(4 if seam else 1):
            if self._bytes(tokens[:cut]).lstrip() == seam.encode():
                return tokens[cut:]
        return None

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(b"" if i in self._special else self.tokens[i] for i in tokens)

    def _longest(self, text: bytes) -> list[int]:
        """Again and again the longest token that the rest begins with; nothing if some byte has no token."""
        tokens, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest_token), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                return []
            tokens.append(self._ids[text[start:end]])
            start = end
        return tokens

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if token and i not in self._special}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._ids), default=0)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.special_token_ids)

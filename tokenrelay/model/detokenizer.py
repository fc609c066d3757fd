"""Token ids to text, piece by piece, without ever sending half a character.

Works on bytes: a token is a fixed run of them, so a piece costs what its own tokens cost, and the pieces together are
exactly the text of all ids. The state depends only on the ids seen, so a resumed stream feeds them again.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer must know of a tokenizer."""

    strips_leading_space: bool

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """The text of a growing list of ids.

    ``prompt_ids_tail`` are ids before the first: a character begun there is completed here, and SentencePiece's
    space before a first word is then kept, since it is not the first.
    """

    def __init__(
        self, tokenizer: TokenBytes, prompt_ids_tail: Iterable[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space
        self.append(prompt_ids_tail)

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that ``token_ids`` add; what may be the beginning of a character is held back."""
        token_bytes = self._tokenizer.token_bytes
        new = b"".join(token_bytes(i) for i in token_ids if i not in self._skipped)
        if new and self._at_start:
            self._at_start = False
            new = new.removeprefix(b" ")
        return self._decoder.decode(new)

    def flush(self) -> str:
        """The rest, at the end of the stream: a replacement character if the last one is incomplete."""
        return self._decoder.decode(b"", final=True)

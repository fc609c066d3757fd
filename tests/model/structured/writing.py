"""Writes texts as a model without a mind would: any token that the grammar allows, by chance."""

from __future__ import annotations

import random

import numpy as np

from tokenrelay.model.structured.constraint import Constraint
from tokenrelay.model.tokenizer import Tokenizer

MAX_TOKENS = 3000


def allowed(mask: np.ndarray) -> np.ndarray:
    """The token ids whose bits are set."""
    return np.flatnonzero(_bits(mask))


def _bits(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)


class Writer:
    """Prefers, now and then, to end a text or to close a bracket, so that texts have an end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        size = -(-tokenizer.vocab_size // 32) * 32
        self._ends, self._closers = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        self._ends[list(tokenizer.eos_token_ids)] = True
        for i in range(tokenizer.vocab_size):
            self._closers[i] = tokenizer.token_bytes(i)[-1:] in (b'"', b"}", b"]")

    def write(self, constraint: Constraint, seed: int) -> str:
        """A whole text; every step obeys the grammar."""
        return self.tokenizer.decode(self.ids(constraint, random.Random(seed)))

    def can_write(self, constraint: Constraint, text: str) -> bool:
        """Whether the text is one of the grammar's, from beginning to end."""
        ids = [*self.encode(text), self.tokenizer.eos_token_ids[0]]
        return constraint.num_valid(ids) == len(ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def ids(self, constraint: Constraint, chance: random.Random, max_tokens: int | None = None) -> list[int]:
        """Up to the end, which is not among them, or up to ``max_tokens``."""
        ids: list[int] = []
        while len(ids) < (max_tokens or MAX_TOKENS):
            token_id = self._choose(_bits(constraint.masks(())[0]), chance)
            constraint.accept([token_id])
            assert constraint.error == ""
            if self._ends[token_id]:
                return ids
            ids.append(token_id)
        assert max_tokens, f"no end: {self.tokenizer.decode(ids)[:500]}"
        return ids

    def _choose(self, bits: np.ndarray, chance: random.Random) -> int:
        for preferred in (self._ends, self._closers):
            if chance.random() < 0.4 and (bits & preferred).any():
                return int(chance.choice(np.flatnonzero(bits & preferred)))
        return int(chance.choice(np.flatnonzero(bits)))

"""Follows one sequence through a grammar, and says which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

from tokenrelay.model.structured.errors import explain
from tokenrelay.model.structured.vocabulary import Vocabulary

_BITS = 32


class VocabularyMasks:
    """Bit masks [words] over the network's vocabulary: ``known`` for tokens that exist, ``end`` for those that end a
    text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_ids = frozenset(vocabulary.eos_token_ids)
        self.known = _mask([i for i, token in enumerate(vocabulary.tokens) if token], len(vocabulary.tokens))
        self.end = _mask(vocabulary.eos_token_ids, len(vocabulary.tokens))


def _mask(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // _BITS) * _BITS, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class Constraint:
    """The grammar's state behind the tokens of one sequence. Nothing here raises: a matcher that gives up says so in
    ``error``, and from then on only the end of the sequence is allowed.

    ``on_error`` is called at most once.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary_masks: VocabularyMasks,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self.error = ""
        self._matcher = matcher
        self._vocabulary = vocabulary_masks
        self._on_error = on_error

    def masks(self, draft_token_ids: Sequence[int]) -> np.ndarray:
        """Which tokens may come after 0, 1, … of the drafts: int32 [1 + drafts, words], bit i of word w for token
        32 w + i. Behind a draft that may not come, only an end may."""
        masks = np.zeros((1 + len(draft_token_ids), len(self._vocabulary.known)), dtype=np.int32)
        self._fill(masks[0], self._matcher)
        self._note_error()
        matcher = self._matcher.deep_copy() if draft_token_ids else self._matcher  # rolling back is not always possible
        for position, draft in enumerate(draft_token_ids):
            if not masks[position, draft // _BITS] >> draft % _BITS & 1:
                masks[position + 1 :] = self._vocabulary.end
                break
            matcher.consume_token(draft)
            self._fill(masks[position + 1], matcher)
        return masks

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens could come next, from the first on. Where the grammar forces a text, any way to write
        it counts, and ``masks`` allow the tokenizer's own."""
        if self._matcher.is_stopped():
            return int(bool(token_ids) and token_ids[0] in self._vocabulary.eos_token_ids)
        return self._matcher.validate_tokens(list(token_ids))

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is no choice; not the end."""
        tokens = self._matcher.compute_ff_tokens()
        self._note_error()
        return tokens

    def accept(self, token_ids: Sequence[int]) -> None:
        """The sequence has grown by these."""
        for token_id in token_ids:
            self._matcher.consume_token(token_id)
        self._note_error()

    def _note_error(self) -> None:
        if not self.error and self._matcher.is_error():
            self.error = explain(self._matcher.get_error())
            self._on_error()

    def _fill(self, mask: np.ndarray, matcher: LLMatcher) -> None:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        mask &= self._vocabulary.known  # "any token" would include ids that have none

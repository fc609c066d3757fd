"""One sequence in the engine. It stores what cannot be derived; all other lengths are properties."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenrelay.model.engine.speculation import PromptLookup
from tokenrelay.model.sampling_params import FinishReason, Pooling, SamplingParams, TokenLogprobs

if TYPE_CHECKING:  # an engine without grammars does not load their library
    import numpy as np

    from tokenrelay.model.structured.constraint import Constraint


class Request:
    """A prompt, what was sampled after it, and how much of both is in the KV cache.

    Written by the caller: ``request_id``, ``params``, ``cache_salt``, ``priority`` (lower is sooner), the grammar's
    ``constraint``, the id of the ``adapter`` ("": none) and the prompt; for a resumed request also the ids another
    engine had already emitted, and mirostat's state after them. With ``pooling`` nothing is sampled: the request ends
    with the prompt's embedding.
    Written by the scheduler: everything else.
    """

    __slots__ = (
        "_block_hashes",
        "_root_hash",
        "adapter",
        "arrival",
        "block_table",
        "cache_salt",
        "constraint",
        "finish_reason",
        "hidden_sum",
        "lookup",
        "mirostat_mu",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_freed_blocks",
        "num_preemptions",
        "num_prompt_tokens",
        "params",
        "pooling",
        "priority",
        "prompt_logprobs",
        "request_id",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_token_ids: Sequence[int] = (),
        cache_salt: str = "",
        priority: int = 0,
        constraint: Constraint | None = None,
        mirostat_mu: float | None = None,
        pooling: Pooling | None = None,
        adapter: str = "",
    ) -> None:
        if not prompt_token_ids:
            raise ValueError("a prompt needs at least one token")
        self.request_id = request_id
        self.params = params
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.cache_salt = cache_salt
        self.adapter = adapter
        self.priority = priority
        self.arrival = 0  # what the scheduler numbers requests with
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.num_cached_tokens = 0  # prompt tokens that were found there and not computed, at first admission
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.num_freed_blocks = 0  # of the table's beginning, behind the attention's sinks: out of its window
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.pooling = pooling
        self.hidden_sum: np.ndarray | None = None  # over the tokens computed so far, for the mean
        self.mirostat_mu = 2 * params.mirostat_tau if mirostat_mu is None else mirostat_mu
        self.lookup: PromptLookup | None = None
        self.constraint = constraint
        if constraint is not None and output_token_ids:
            constraint.accept(output_token_ids)
        self._block_hashes: list[bytes] = []
        self._root_hash = hashlib.sha256(f"{len(adapter)}:{adapter}{cache_salt}".encode()).digest()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first, and evicted last."""
        return self.priority, self.arrival

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They need every prompt token's hidden state, and come with the first output."""
        return self.params.prompt_logprobs is not None and self.num_output_tokens == 0

    @property
    def needs_every_token(self) -> bool:
        """Whether tokens whose keys are known must be computed all the same, for their hidden states."""
        return self.wants_prompt_logprobs or self.pooling == "mean"

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first ``num_blocks`` full blocks: SHA-256 over (parent's hash, token ids), the root being
        the adapter and the tenant's salt. So equal hashes mean equal beginnings, of one tenant through one adapter.
        (vLLM's prefix caching)"""
        hashes = self._block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            hashes.append(self._hash(hashes[-1] if hashes else self._root_hash, start, block_size))
        return hashes[:num_blocks]

    def tail_hash(self, num_blocks: int, num_tokens: int, block_size: int) -> bytes:
        """Hash of the ``num_tokens`` tokens behind the first ``num_blocks`` blocks: of a block that is not full."""
        parents = self.block_hashes(num_blocks, block_size)
        return self._hash(parents[-1] if parents else self._root_hash, num_blocks * block_size, num_tokens)

    def _hash(self, parent: bytes, start: int, num_tokens: int) -> bytes:
        return hashlib.sha256(parent + array("I", self.token_ids[start : start + num_tokens]).tobytes()).digest()


class SamplingPosition:
    """Where a token is drawn: behind a request's tokens and some drafts, as if those had been accepted."""

    __slots__ = ("_drafts", "request")

    def __init__(self, request: Request, draft_token_ids: Sequence[int] = ()) -> None:
        self.request = request
        self._drafts = draft_token_ids

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.token_ids, *self._drafts] if self._drafts else self.request.token_ids

    @property
    def output_token_ids(self) -> list[int]:
        return [*self.request.output_token_ids, *self._drafts]

    @property
    def num_tokens(self) -> int:
        return self.request.num_tokens + len(self._drafts)

    @property
    def num_output_tokens(self) -> int:
        return self.request.num_output_tokens + len(self._drafts)

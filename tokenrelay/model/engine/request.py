"""One sequence in the engine. It stores what cannot be derived; all other lengths are properties."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from tokenrelay.model.sampling_params import FinishReason, SamplingParams


class Request:
    """A prompt, what was sampled after it, and how much of both is in the KV cache.

    Written by the caller: ``request_id``, ``params``, ``cache_salt``, the prompt and, for a resumed request, the
    ids another engine had already emitted. Written by the scheduler: everything else.
    """

    __slots__ = (
        "_block_hashes",
        "_root_hash",
        "block_table",
        "finish_reason",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "params",
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
    ) -> None:
        if not prompt_token_ids:
            raise ValueError("a prompt needs at least one token")
        self.request_id = request_id
        self.params = params
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.num_cached_tokens = 0  # prompt tokens that were found there and not computed, at first admission
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._block_hashes: list[bytes] = []
        self._root_hash = hashlib.sha256(cache_salt.encode()).digest()

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

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first ``num_blocks`` full blocks: SHA-256 over (parent's hash, token ids), the root being
        the tenant's salt. So equal hashes mean equal beginnings, of one tenant. (vLLM's prefix caching)"""
        hashes = self._block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            block = array("I", self.token_ids[start : start + block_size])
            parent = hashes[-1] if hashes else self._root_hash
            hashes.append(hashlib.sha256(parent + block.tobytes()).digest())
        return hashes[:num_blocks]

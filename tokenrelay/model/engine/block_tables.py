"""Every request's block table: what it shares with others, how it grows, what it gives back. No torch.

Full blocks with equal beginnings are shared. The block behind them is filled by each request on its own, so its
known beginning is copied before anything is written to it: a fork of n choices, of beams or of a conversation's next
turn costs one block copy, and no token is computed twice but the last, whose logits are needed. (copy on write:
PagedAttention, Kwon et al. 2023)
"""

from __future__ import annotations

from typing import NamedTuple

from tokenrelay.model.engine.block_pool import FREED, BlockPool
from tokenrelay.model.engine.request import Request


class KnownPrefix(NamedTuple):
    """What the cache holds of a request's tokens: full blocks, and the beginning of the one behind them."""

    blocks: list[int]
    num_tokens: int
    partial_block: int | None = None  # to be copied
    complete: bool = False  # nothing is missing but the last token


class Window(NamedTuple):
    """What attention sees: the first ``num_sinks`` tokens and the last ``size``. (size 0: everything)"""

    size: int = 0
    num_sinks: int = 0


class BlockTables:
    """The block tables over one pool; ``window`` is what every layer's attention sees."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, window: Window) -> None:
        self.pool = BlockPool(num_blocks)
        self._block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._window = window

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def fits(self, request: Request, prefix: KnownPrefix, num_batched_tokens: int) -> bool:
        """Whether all its tokens and the next, if there is one, would fit now, were nobody else to grow."""
        needed = self.num_blocks(request.num_tokens + (request.pooling is None))
        if self._window.size:
            held = self._window.size + num_batched_tokens + 2 * self._block_size
            needed = min(
                needed, max(len(prefix.blocks), self.num_blocks(self._window.num_sinks) + self.num_blocks(held))
            )
        return self.pool.num_free_without(prefix.blocks) >= needed - len(prefix.blocks)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` more computed tokens; False when there are not enough free blocks."""
        missing = self.num_blocks(request.num_computed_tokens + num_tokens) - len(request.block_table)
        blocks = self.pool.allocate(max(0, missing))
        if blocks is None:
            return False
        request.block_table += blocks
        return True

    def release(self, request: Request) -> None:
        """Give everything back; what is computed stays known until the blocks are handed out again."""
        self._remember_tail(request)
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = request.num_freed_blocks = 0

    # --- sharing --------------------------------------------------------------------------------------------------

    def _shares(self, request: Request) -> bool:
        return self._enable_prefix_caching and not request.needs_every_token

    def known_prefix(self, request: Request) -> KnownPrefix:
        """The longest one. The last token does not count: it is computed for its logits."""
        if not self._shares(request):
            return KnownPrefix([], 0)
        size = self._block_size
        blocks = self.pool.lookup(request.block_hashes((request.num_tokens - 1) // size, size))
        start = len(blocks) * size
        rest = request.num_tokens - start
        for length in range(min(size, rest), 0, -1):
            block = self.pool.find(request.tail_hash(len(blocks), length, size))
            if block is not None and (shared := min(length, rest - 1)):
                return KnownPrefix(blocks, start + shared, block, complete=length == rest)
        return KnownPrefix(blocks, start)

    def missing_hashes(self, request: Request, prefix: KnownPrefix) -> list[bytes]:
        """Hashes of the blocks that are not known, the last one's of its beginning."""
        if not self._shares(request) or prefix.complete:
            return []
        num_full = (request.num_tokens - 1) // self._block_size
        tail = request.tail_hash(num_full, request.num_tokens - num_full * self._block_size, self._block_size)
        return [*request.block_hashes(num_full, self._block_size)[len(prefix.blocks) :], tail]

    def uncomputed_hashes(self, request: Request) -> list[bytes]:
        """The same of a running request: what it has not computed yet."""
        num_computed_blocks = request.num_computed_tokens // self._block_size
        return self.missing_hashes(request, KnownPrefix(request.block_table[:num_computed_blocks], 0))

    def start(self, request: Request, prefix: KnownPrefix) -> None:
        """Take the blocks it shares. The rest, and the room for a copied beginning, comes from ``grow``."""
        self.pool.acquire(prefix.blocks)
        request.block_table = list(prefix.blocks)
        request.num_computed_tokens = prefix.num_tokens

    def computed(self, request: Request, num_computed_tokens: int) -> None:
        """A step went so far: its full blocks become known, and a prompt's last one with it; what fell out of the
        window is free."""
        size = self._block_size
        before, request.num_computed_tokens = request.num_computed_tokens, num_computed_tokens
        if self._enable_prefix_caching:
            num_full = num_computed_tokens // size
            for index, block_hash in enumerate(request.block_hashes(num_full, size)[before // size :], before // size):
                self.pool.remember(request.block_table[index], block_hash)
            if num_computed_tokens - before > 1 and request.num_uncomputed_tokens <= 1:
                self._remember_tail(request)
        if self._window.size:
            self._free_out_of_window(request)

    def _remember_tail(self, request: Request) -> None:
        num_full, length = divmod(request.num_computed_tokens, self._block_size)
        if length and self._enable_prefix_caching:
            self.pool.remember(request.block_table[num_full], request.tail_hash(num_full, length, self._block_size))

    def _free_out_of_window(self, request: Request) -> None:
        first = self.num_blocks(self._window.num_sinks)
        end = max(0, request.num_computed_tokens - self._window.size + 1) // self._block_size
        for index in range(first + request.num_freed_blocks, end):
            self.pool.release([request.block_table[index]])
            request.block_table[index] = FREED
            request.num_freed_blocks += 1

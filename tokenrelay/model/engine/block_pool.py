"""The pool of KV cache blocks: who holds which, which are free, and which still hold a known prefix.

Blocks are integers here; their keys and values live in ``transformer/kv_cache.py``. The free list is the LRU of
the prefix cache: a freed block keeps its content, and its hashes, until it is handed out again. (PagedAttention,
Kwon et al. 2023; hash-chained prefix blocks as in vLLM)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

FREED = -1  # in a block table: the block fell out of the attention's window


class BlockPoolError(AssertionError):
    """The pool's books do not balance: a bug of ours, with the arithmetic."""


class BlockPool:
    """``num_blocks`` blocks with reference counts. A block is free when its count is 0.

    A block is known by the hash of its content and, since it is filled from the front, by the hashes of its beginnings.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes_of: list[list[bytes]] = [[] for _ in range(num_blocks)]
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks held by requests, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block known by this hash. Does not take it."""
        return self._block_of.get(block_hash)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix. Does not take them: follow with ``acquire``."""
        blocks = []
        for block_hash in hashes:
            block = self.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Sequence[int]) -> int:
        """Blocks that stay free when ``blocks`` are acquired."""
        return len(self._free) - sum(self._ref_counts[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each block, which may be free with its content intact."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with unknown content, least recently used first; None when there are not as many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._ref_counts[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each. The tail of a sequence is evicted before its beginning."""
        for block in reversed(blocks):
            if block == FREED:
                continue
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if not self._hashes_of[block]:  # nothing to remember: reuse it first
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, block_hash: bytes) -> None:
        """The block, or its beginning, is computed: later prompts may share it. The first block of a hash stays the
        known one."""
        if block_hash not in self._block_of:
            self._hashes_of[block].append(block_hash)
            self._block_of[block_hash] = block

    def _forget(self, block: int) -> None:
        for block_hash in self._hashes_of[block]:
            del self._block_of[block_hash]
        self._hashes_of[block] = []

    def check_integrity(self, block_tables: Iterable[Sequence[int]] = ()) -> None:
        """Balance the books against the block tables of all live requests.

        Raises:
            BlockPoolError: a count differs from the references held, or a free block is held.
        """
        held = [0] * self.num_blocks
        for table in block_tables:
            for block in table:
                if block != FREED:
                    held[block] += 1
        if held != self._ref_counts:
            wrong = [
                (b, held[b], self._ref_counts[b]) for b in range(self.num_blocks) if held[b] != self._ref_counts[b]
            ]
            raise BlockPoolError(f"(block, references held, references counted) differ: {wrong[:8]}")
        unheld = {block for block, count in enumerate(held) if count == 0}
        if unheld != self._free.keys():
            raise BlockPoolError(f"{len(unheld)} blocks are not held, {len(self._free)} are in the free list")
        known = {block_hash: block for block, hashes in enumerate(self._hashes_of) for block_hash in hashes}
        if known != self._block_of:
            raise BlockPoolError("a known prefix points to a block that holds another")

"""What the next step computes. Pure data and integers: no torch, no clock, no I/O.

One rule instead of phases: every request has ``num_computed_tokens < num_tokens``, and each step hands out a
token budget, running requests first, then waiting ones. Chunked prefill, prefix hits, preemption and decode are
all that one loop. (the rule is vLLM v1's; mixing chunks and decodes is Sarathi-Serve, Agrawal et al. 2024)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.block_pool import BlockPool
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import FinishReason


class ScheduledRequest(NamedTuple):
    """Compute ``num_tokens`` tokens of ``request``, from its ``num_computed_tokens`` on."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last known token, so that a next one is drawn."""
        return self.num_tokens == self.request.num_uncomputed_tokens


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work, in the order of the batch."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)


class StepOutput(NamedTuple):
    """One sampled token. ``num_cached_tokens`` of the request's prompt came from the prefix cache."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int = 0


class Scheduler:
    """Owns the waiting queue, the running list and the block pool."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int, eos_token_ids: Sequence[int]) -> None:
        self.block_pool = BlockPool(num_blocks)
        self.requests: dict[str, Request] = {}  # by id: the waiting and the running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_scheduled_tokens = 0
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # of these, found
        self._config = config
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    # --- deciding -------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        output = SchedulerOutput()
        budget = self._continue_running(output, self._config.max_num_batched_tokens)
        if self.waiting and not output.preempted:  # what was just evicted must not be refilled by newcomers
            self._admit_waiting(output, budget)
        return output

    def _continue_running(self, output: SchedulerOutput, budget: int) -> int:
        position = 0
        while position < len(self.running):
            request = self.running[position]
            behind = len(self.running) - position - 1
            num_tokens = min(request.num_uncomputed_tokens, budget - behind)  # each one behind gets its token too
            if not self._make_room(request, num_tokens, output):
                break  # the request itself was the last one to evict
            output.scheduled.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
            position += 1
        return budget

    def _make_room(self, request: Request, num_tokens: int, output: SchedulerOutput) -> bool:
        """Grow the block table, evicting the youngest running requests until it fits."""
        while not self._grow(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            output.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _admit_waiting(self, output: SchedulerOutput, budget: int) -> None:
        being_computed = {h for request in self.running for h in self._missing_hashes(request)}
        for request in list(self.waiting):
            if not budget or len(self.running) == self._config.max_num_seqs:
                break
            hit = self._known_prefix(request)
            missing = self._missing_hashes(request, len(hit))
            if missing and missing[0] in being_computed:
                continue  # another request computes this very block: wait for it, and share it
            if self.block_pool.num_free_without(hit) < self._num_blocks(request.num_tokens + 1) - len(hit):
                break  # the whole prompt must fit, or it would be preempted halfway
            budget -= self._start(request, hit, budget, output)
            being_computed.update(missing)

    def _known_prefix(self, request: Request) -> list[int]:
        return self.block_pool.lookup(self._shareable_hashes(request))

    def _missing_hashes(self, request: Request, num_known: int | None = None) -> list[bytes]:
        """Hashes of the shareable blocks that are not computed; ``num_known`` of them are, or as many as it has."""
        if num_known is None:
            num_known = request.num_computed_tokens // self._config.block_size
        return self._shareable_hashes(request)[num_known:]

    def _shareable_hashes(self, request: Request) -> list[bytes]:
        """Of every full block but the one with the last token, which is computed for its logits."""
        if not self._config.enable_prefix_caching:
            return []
        block_size = self._config.block_size
        return request.block_hashes((request.num_tokens - 1) // block_size, block_size)

    def _start(self, request: Request, hit: list[int], budget: int, output: SchedulerOutput) -> int:
        """Move a request to the running with the blocks it shares; returns how many tokens it computes now."""
        self.waiting.remove(request)
        self.running.append(request)
        self.block_pool.acquire(hit)
        request.block_table = list(hit)
        request.num_computed_tokens = len(hit) * self._config.block_size
        if request.num_preemptions == 0:
            self._count_hits(request)
        num_tokens = min(request.num_uncomputed_tokens, budget)
        grown = self._grow(request, num_tokens)
        assert grown, "the room was just checked"
        output.scheduled.append(ScheduledRequest(request, num_tokens))
        return num_tokens

    def _count_hits(self, request: Request) -> None:
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.num_prefix_queries += request.num_tokens
        self.num_prefix_hits += request.num_computed_tokens

    def _preempt(self, request: Request) -> None:
        """Free its blocks and recompute it later, before anything else that waits."""
        self._release(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    # --- learning what the step gave ------------------------------------------------------------------------------

    def update(self, output: SchedulerOutput, sampled: Sequence[int | None]) -> list[StepOutput]:
        """Account for a computed step. ``sampled`` has one entry per scheduled request, None for a mere chunk."""
        results = []
        self.num_scheduled_tokens += output.num_tokens
        for (request, num_tokens), token_id in zip(output.scheduled, sampled, strict=True):
            request.num_computed_tokens += num_tokens
            self._remember_full_blocks(request, num_tokens)
            if token_id is not None:
                request.token_ids.append(token_id)
                request.finish_reason = self._finish_reason(request, token_id)
                results.append(
                    StepOutput(request.request_id, token_id, request.finish_reason, request.num_cached_tokens)
                )
            if request.finish_reason is not None:
                self.remove(request)
        return results

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        ends = token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)
        if ends and request.num_output_tokens >= params.min_tokens:
            return FinishReason.STOP
        if request.num_output_tokens >= params.max_tokens or request.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        del self.requests[request.request_id]
        self._release(request)
        (self.running if request in self.running else self.waiting).remove(request)

    # --- blocks ---------------------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self._num_blocks(request.num_computed_tokens + num_tokens) - len(request.block_table)
        blocks = self.block_pool.allocate(max(0, missing))
        if blocks is None:
            return False
        request.block_table += blocks
        return True

    def _release(self, request: Request) -> None:
        self.block_pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0

    def _remember_full_blocks(self, request: Request, num_new_tokens: int) -> None:
        """Offer the blocks that the step filled to later prompts."""
        if not self._config.enable_prefix_caching:
            return
        block_size = self._config.block_size
        first = (request.num_computed_tokens - num_new_tokens) // block_size
        num_full = request.num_computed_tokens // block_size
        hashes = request.block_hashes(num_full, block_size) if num_full > first else []
        for index in range(first, num_full):
            self.block_pool.remember(request.block_table[index], hashes[index])

    def check_integrity(self) -> None:
        """Raises BlockPoolError when the books of blocks do not balance."""
        self.block_pool.check_integrity(request.block_table for request in (*self.running, *self.waiting))

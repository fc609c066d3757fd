"""What the next step computes. Pure data and integers: no torch, no clock, no I/O.

One rule instead of phases: every request has ``num_computed_tokens < num_tokens``, and each step hands out a
token budget, running requests first, then waiting ones. Chunked prefill, prefix hits, preemption, drafts and decode
are all that one loop. (the rule is vLLM v1's; mixing chunks and decodes is Sarathi-Serve, Agrawal et al. 2024)
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.block_tables import BlockTables, KnownPrefix, Window
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.speculation import PromptLookup
from tokenrelay.model.engine.step import Sampled, ScheduledRequest, SchedulerOutput, StepOutput
from tokenrelay.model.sampling_params import FinishReason

MAX_DRAFT_ROWS = 32  # of a step, over all requests: what a stream may wait longer for others' guesses

in_order = attrgetter("order")


class Scheduler:
    """Owns the waiting queue, the running list and the block tables. Both lists are in the order of service: priority
    class, then arrival, which is the order in which the broker's fair queue handed the requests out."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        window: Window | None = None,
    ) -> None:
        self.config = config
        self.window = window or Window()
        self.block_tables = BlockTables(
            num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            window=self.window,
        )
        self.block_pool = self.block_tables.pool
        self.requests: dict[str, Request] = {}  # by id: the waiting and the running
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_arrivals = 0
        self.num_preemptions = 0
        self.num_scheduled_tokens = 0
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # of these, found
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0  # of the drafts
        self._max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.num_arrivals += 1
        request.arrival = self.num_arrivals
        sampled_by_itself = request.pooling is None and not request.params.mirostat_tau  # which needs each token's turn
        if self.config.num_speculative_tokens and sampled_by_itself:
            request.lookup = PromptLookup(self.config.num_speculative_tokens)
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=in_order)

    # --- deciding -------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        output = SchedulerOutput()
        budget = self._continue_running(output, self._budget())
        if self.waiting and not output.preempted:  # what was just evicted must not be refilled by newcomers
            budget = self._admit_waiting(output, budget)
        self._add_drafts(output, min(budget, MAX_DRAFT_ROWS))
        return output

    def _budget(self) -> int:
        """Rows of this step: a prompt that arrives beside running streams gets less, so that they keep their pace."""
        decoding = sum(request.num_uncomputed_tokens == 1 for request in self.running)
        if not decoding:
            return self.config.max_num_batched_tokens
        gentle = decoding + self.config.max_prefill_tokens_beside_decodes
        return min(self.config.max_num_batched_tokens, max(gentle, len(self.running)))

    def _continue_running(self, output: SchedulerOutput, budget: int) -> int:
        position = 0
        while position < len(self.running):
            request = self.running[position]
            behind = len(self.running) - position - 1  # each one behind gets its token too
            num_tokens = min(request.num_uncomputed_tokens, budget - behind)
            if not self._make_room(request, num_tokens, output):
                break  # the request itself was the last one to evict
            output.scheduled.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
            position += 1
        return budget

    def _make_room(self, request: Request, num_tokens: int, output: SchedulerOutput) -> bool:
        """Grow the block table, evicting running requests from the end of the order until it fits."""
        while not self.block_tables.grow(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            output.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _add_drafts(self, output: SchedulerOutput, budget: int) -> None:
        """Share what no known token needed among the requests that sample. Guesses evict nobody."""
        sampling = [index for index, entry in enumerate(output.scheduled) if entry.samples]
        for position, index in enumerate(sampling):
            entry = output.scheduled[index]
            drafts = self._drafts(entry.request, -(-budget // (len(sampling) - position)))
            if drafts and self.block_tables.grow(entry.request, entry.num_tokens + len(drafts)):
                output.scheduled[index] = entry._replace(draft_token_ids=drafts)
                budget -= len(drafts)

    def _drafts(self, request: Request, budget: int) -> Sequence[int]:
        """What the grammar forces; else what followed the last tokens before, as far as the grammar allows it."""
        if request.lookup is None:
            return ()
        room = min(request.params.max_tokens - request.num_output_tokens, self._max_model_len - request.num_tokens) - 1
        limit = min(room, budget)
        if limit <= 0:
            return ()
        if request.constraint is not None and (forced := request.constraint.forced()):
            return forced[:limit]
        drafts = request.lookup.propose(request.token_ids, limit, len(self.running))
        return drafts[: request.constraint.num_valid(drafts)] if request.constraint is not None else drafts

    def _admit_waiting(self, output: SchedulerOutput, budget: int) -> int:
        being_computed = self._being_computed()
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) == self.config.max_num_seqs:
                break
            prefix = self.block_tables.known_prefix(request)
            missing = self.block_tables.missing_hashes(request, prefix)
            if missing and missing[0] in being_computed:
                continue  # another request computes this very block: wait for it, and share it
            if not self.block_tables.fits(request, prefix, self.config.max_num_batched_tokens):
                break  # the whole prompt must fit, or it would be preempted halfway
            budget -= self._start(request, prefix, budget, output)
            being_computed.update(missing)
        return budget

    def _being_computed(self) -> set[bytes]:
        """Hashes of the blocks that prompts in progress will make known."""
        return {
            block_hash
            for request in self.running
            if request.num_uncomputed_tokens > 1
            for block_hash in self.block_tables.uncomputed_hashes(request)
        }

    def _start(self, request: Request, prefix: KnownPrefix, budget: int, output: SchedulerOutput) -> int:
        """Move a request to the running with the blocks it shares; returns how many tokens it computes now."""
        self.waiting.remove(request)
        insort(self.running, request, key=in_order)
        self.block_tables.start(request, prefix)
        if request.num_preemptions == 0:
            self._count_hits(request)
        num_tokens = min(request.num_uncomputed_tokens, budget)
        grown = self.block_tables.grow(request, num_tokens)
        assert grown, "the room was just checked"
        if prefix.partial_block is not None:
            output.block_copies.append((prefix.partial_block, request.block_table[len(prefix.blocks)]))
        output.scheduled.append(ScheduledRequest(request, num_tokens))
        return num_tokens

    def _count_hits(self, request: Request) -> None:
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.num_prefix_queries += request.num_tokens
        self.num_prefix_hits += request.num_computed_tokens

    def _preempt(self, request: Request) -> None:
        """Free its blocks and recompute it later, when its turn in the order comes."""
        self.block_tables.release(request)
        request.prompt_logprobs, request.hidden_sum = [], None
        self.running.remove(request)
        insort(self.waiting, request, key=in_order)
        request.num_preemptions += 1
        self.num_preemptions += 1

    # --- learning what the step gave ------------------------------------------------------------------------------

    def update(self, output: SchedulerOutput, sampled: Sequence[Sampled]) -> list[StepOutput]:
        """Account for a computed step. ``sampled`` has one entry per scheduled request."""
        self.num_scheduled_tokens += output.num_rows
        results = []
        for entry, drawn in zip(output.scheduled, sampled, strict=True):
            request, num_accepted = entry.request, max(0, len(drawn.token_ids) - 1)
            request.prompt_logprobs += drawn.prompt_logprobs
            request.hidden_sum = drawn.hidden_sum
            if drawn.embedding:
                results.append(self._end(request, drawn.embedding))
            if drawn.token_ids:
                results.append(self._append(request, drawn))
                self._observe(entry, num_accepted)
            num_computed = request.num_computed_tokens + entry.num_tokens + num_accepted
            self.block_tables.computed(request, min(num_computed, request.num_tokens))
            if request.finish_reason is not None:
                self.remove(request)
        return results

    def _append(self, request: Request, drawn: Sampled) -> StepOutput:
        """Take the tokens up to the one that ends the request."""
        prompt_logprobs = (None, *request.prompt_logprobs) if request.wants_prompt_logprobs else ()
        count = 0
        while count < len(drawn.token_ids) and request.finish_reason is None:
            request.token_ids.append(drawn.token_ids[count])
            request.finish_reason = self._finish_reason(request, drawn.token_ids[count])
            count += 1
        token_ids = drawn.token_ids[:count]
        if request.constraint is not None:
            request.constraint.accept(token_ids)
        if drawn.mirostat_mu is not None:
            request.mirostat_mu = drawn.mirostat_mu
        return StepOutput(
            request.request_id,
            token_ids,
            request.finish_reason,
            request.num_cached_tokens,
            drawn.logprobs[:count],
            prompt_logprobs,
            drawn.mirostat_mu,
        )

    def _end(self, request: Request, embedding: bytes) -> StepOutput:
        """A pooled request is done with its prompt."""
        request.finish_reason = FinishReason.STOP
        return StepOutput(request.request_id, (), request.finish_reason, request.num_cached_tokens, embedding=embedding)

    def _observe(self, entry: ScheduledRequest, num_accepted: int) -> None:
        if entry.draft_token_ids and entry.request.lookup is not None:
            self.num_draft_tokens += len(entry.draft_token_ids)
            self.num_accepted_tokens += num_accepted
            entry.request.lookup.observe(entry.request.num_tokens, len(entry.draft_token_ids), num_accepted)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        ends = token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos)
        if ends and request.num_output_tokens >= params.min_tokens:
            return FinishReason.STOP
        if request.num_output_tokens >= params.max_tokens or request.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        del self.requests[request.request_id]
        self.block_tables.release(request)
        (self.running if request in self.running else self.waiting).remove(request)

    def check_integrity(self) -> None:
        """Raises BlockPoolError when the books of blocks do not balance."""
        self.block_pool.check_integrity(request.block_table for request in (*self.running, *self.waiting))

"""A network without tensors that knows when the cache lies.

What it writes to a slot is the whole beginning of the sequence up to there. Before it says a next token it reads all
that attention would see, and compares. So a block shared, copied, freed or overwritten wrongly fails at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import Sampled, ScheduledRequest, SchedulerOutput

EOS = 0


class FakeNetwork:
    """Continues a sequence with one of ``vocab_size`` tokens, by all that is in it; few make drafts come true."""

    def __init__(self, block_size: int, window: Window | None = None, vocab_size: int = 50) -> None:
        self._block_size = block_size
        self._window = window or Window()
        self._vocab_size = vocab_size
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def next_token(self, token_ids: Sequence[int]) -> int:
        return hash(tuple(token_ids)) % self._vocab_size

    def undisturbed(self, request: Request, max_model_len: int) -> list[int]:
        """The oracle: what the request generates when it is alone and nothing happens."""
        token_ids = list(request.token_ids[: request.num_prompt_tokens])
        while len(token_ids) - request.num_prompt_tokens < request.params.max_tokens:
            token_ids.append(self.next_token(token_ids))
            if token_ids[-1] == EOS or len(token_ids) >= max_model_len:
                break
        return token_ids[request.num_prompt_tokens :]

    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        """Copy blocks, write what is computed, check what is read, and verify the drafts."""
        copied = [
            ((to, offset), self._slots.get((source, offset), ()))
            for source, to in output.block_copies
            for offset in range(self._block_size)
        ]
        self._slots.update(copied)
        return [self._compute(entry) for entry in output.scheduled]

    def _compute(self, entry: ScheduledRequest) -> Sampled:
        request = entry.request
        token_ids = [*request.token_ids[: request.num_computed_tokens + entry.num_tokens], *entry.draft_token_ids]
        for position in range(request.num_computed_tokens, len(token_ids)):
            self._slots[self._slot(request, position)] = tuple(token_ids[: position + 1])
            self._check_visible(request, token_ids, position)
        if not entry.samples:
            return Sampled()
        drawn: list[int] = []
        for draft in (*entry.draft_token_ids, None):
            drawn.append(self.next_token([*request.token_ids, *drawn]))
            if drawn[-1] != draft:
                break
        return Sampled(tuple(drawn))

    def _check_visible(self, request: Request, token_ids: Sequence[int], position: int) -> None:
        first = max(0, position - self._window.size + 1) if self._window.size else 0
        for seen in {*range(min(self._window.num_sinks, first)), *range(first, position)}:
            content = self._slots.get(self._slot(request, seen))
            assert content == tuple(token_ids[: seen + 1]), f"position {seen} of {request.request_id} is not its own"

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        block = request.block_table[position // self._block_size]
        assert block >= 0, f"position {position} of {request.request_id} was given back"
        return block, position % self._block_size

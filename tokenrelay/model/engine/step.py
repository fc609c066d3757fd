"""What passes between the parts of one step: decided by the scheduler, drawn by the runner, told to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    import numpy as np


class ScheduledRequest(NamedTuple):
    """Compute ``num_tokens`` tokens of ``request``, from its ``num_computed_tokens`` on, and then the drafts."""

    request: Request
    num_tokens: int
    draft_token_ids: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft_token_ids)

    @property
    def completes(self) -> bool:
        """Whether the step reaches the request's last known token."""
        return self.num_tokens == self.request.num_uncomputed_tokens

    @property
    def samples(self) -> bool:
        """Whether a next token is drawn."""
        return self.completes and self.request.pooling is None

    @property
    def num_sampled_rows(self) -> int:
        """From the last known token on, if a next one is drawn."""
        return 1 + len(self.draft_token_ids) if self.samples else 0

    @property
    def num_results(self) -> int:
        """Of so many of its last rows hidden states are asked for."""
        takes_all = self.request.pooling is not None or self.request.wants_prompt_logprobs
        return self.num_rows if takes_all else self.num_sampled_rows


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work, in the order of the batch. ``block_copies`` come first: (from, to)."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(entry.num_rows for entry in self.scheduled)


class Sampled(NamedTuple):
    """What a step gave one scheduled request: the drafts that were right and one token more, or nothing after a mere
    chunk. ``prompt_logprobs`` are of the prompt tokens that the chunk's rows predict. A pooled request gets its
    ``embedding`` at the end, and until then ``hidden_sum``, what the next chunk adds to."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    mirostat_mu: float | None = None
    embedding: bytes = b""
    hidden_sum: np.ndarray | None = None


class StepOutput(NamedTuple):
    """A request's new tokens. ``num_cached_tokens`` of its prompt came from the prefix cache.

    ``logprobs`` has one entry per token if they were asked for; ``prompt_logprobs`` comes with the first output, one
    entry per prompt token, None for the first. ``finish_reason`` belongs to the last token. ``embedding`` is all that
    a pooled request gives: float32 numbers, little endian, of the length 1.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    mirostat_mu: float | None = None
    embedding: bytes = b""

"""The sampler on its own: one token per row, for requests without drafts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import ScheduledRequest


def draw(logits: Tensor, requests: Sequence[Request], eos_token_ids: Collection[int] = ()) -> list[int]:
    """The token of each row; overwrites the logits."""
    entries = [ScheduledRequest(request, 1) for request in requests]
    return [sampled.token_ids[0] for sampled in Sampler(eos_token_ids).sample(logits, entries)]

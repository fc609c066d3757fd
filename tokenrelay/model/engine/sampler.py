"""Draws the next token of every row: a function of (logits, params, seed, position, ids) and nothing else.

The random number is counter-based: a hash of (seed, position), not the state of a generator. So a request that
another worker takes over draws the numbers the first would have drawn. Rows never mix: every reduction is along
the vocabulary, so a row's token does not depend on the batch. Mirostat alone has a state, which travels with the
request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.counter_random import uniform
from tokenrelay.model.engine.logits_processors import process
from tokenrelay.model.engine.logprobs import token_logprobs
from tokenrelay.model.engine.request import SamplingPosition
from tokenrelay.model.engine.speculation import num_accepted
from tokenrelay.model.engine.step import Sampled, ScheduledRequest
from tokenrelay.model.engine.temperature import temperatures
from tokenrelay.model.engine.truncation import is_truncated, next_mirostat_mu, truncate
from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.transfer import tensor_on

Positions = Sequence[SamplingPosition]


class Drawn(NamedTuple):
    """One token, and its probability among those that were left to draw from (1 if it was not drawn by chance)."""

    token_id: int
    probability: float = 1.0


class Sampler:
    """Samples a batch. Rows that ask for nothing special cost one argmax."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def sample(self, logits: Tensor, entries: Sequence[ScheduledRequest]) -> list[Sampled]:
        """Of each entry the drafts that were right and one token more.

        ``logits`` [S, vocabulary], fp32, holds a row per entry and draft: the row behind the last known token, then
        one behind each draft. It may be overwritten.
        """
        positions = [position for entry in entries for position in _positions(entry)]
        asked = [at.params.logprobs is not None for at in positions]
        unprocessed = logits.clone() if any(asked) else logits
        drawn = self.draw(logits, entries, positions)
        results = []
        start = 0
        for entry in entries:
            end = start + 1 + len(entry.draft_token_ids)
            token_ids = [d.token_id for d in drawn[start:end]]
            kept = 1 + num_accepted(entry.draft_token_ids, token_ids)
            rows = slice(start, start + kept)
            results.append(
                Sampled(
                    tuple(token_ids[:kept]),
                    _logprobs(unprocessed[rows], token_ids[:kept], entry),
                    mirostat_mu=_mirostat_mu(positions[start], drawn[start]),
                )
            )
            start = end
        return results

    def draw(self, logits: Tensor, entries: Sequence[ScheduledRequest], positions: Positions) -> list[Drawn]:
        """One token per row, as ``sample`` has them."""
        for row, position in enumerate(positions):
            if position.num_output_tokens < position.params.min_tokens:
                self._forbid_end(logits[row], position)
        process(logits, positions)
        _constrain(logits, entries)
        best = kernels.argmax(logits)
        rows = [row for row, position in enumerate(positions) if not position.params.greedy]
        if not rows:
            return [Drawn(token_id) for token_id in best.tolist()]
        drawn = torch.stack((best.double(), torch.ones_like(best).double()), dim=1)  # a double holds every id
        chosen = tensor_on(logits.device, rows, torch.long)
        drawn[chosen] = _draw(logits[chosen], [positions[row] for row in rows])
        return [Drawn(int(token_id), probability) for token_id, probability in drawn.tolist()]

    def _forbid_end(self, logits: Tensor, position: SamplingPosition) -> None:
        ends = list(self._eos_token_ids.union(position.params.stop_token_ids))
        logits.index_fill_(0, tensor_on(logits.device, ends, torch.long), -torch.inf)


def _positions(entry: ScheduledRequest) -> Iterator[SamplingPosition]:
    for count in range(1 + len(entry.draft_token_ids)):
        yield SamplingPosition(entry.request, entry.draft_token_ids[:count])


def _logprobs(logits: Tensor, token_ids: Sequence[int], entry: ScheduledRequest) -> tuple[TokenLogprobs, ...]:
    num_top = entry.request.params.logprobs
    return () if num_top is None else tuple(token_logprobs(logits, token_ids, num_top))


def _mirostat_mu(position: SamplingPosition, drawn: Drawn) -> float | None:
    return next_mirostat_mu(position, drawn.probability) if position.params.mirostat_tau else None


def _constrain(logits: Tensor, entries: Sequence[ScheduledRequest]) -> None:
    """Forbids, in place, what the entries' grammars do. The grammar has the last word: where nothing it allows is
    left, all of that comes equally likely."""
    start = 0
    for entry in entries:
        end = start + 1 + len(entry.draft_token_ids)
        if entry.request.constraint is not None:
            masks = entry.request.constraint.masks(entry.draft_token_ids)
            allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
            forbidden = torch.from_numpy(allowed == 0).to(logits.device)
            rows = logits[start:end].masked_fill_(forbidden, -torch.inf)
            dead = ~rows.isfinite().any(dim=-1)
            rows[dead] = torch.zeros_like(rows[dead]).masked_fill_(forbidden[dead], -torch.inf)
        start = end


def _draw(logits: Tensor, positions: Positions) -> Tensor:
    """Inverse of the cumulative distribution at the position's random number, after temperature and truncations.

    [S, 2] in double precision: token ids and their probabilities, as ``Drawn``.
    """
    logits = logits / _column(temperatures(logits, positions), logits)
    uniforms = _column([uniform(at.params.seed, at.num_tokens) for at in positions], logits).double()
    drawn = torch.ones((len(positions), 2), dtype=torch.double, device=logits.device)
    truncated = [row for row, position in enumerate(positions) if is_truncated(position)]
    if truncated:
        rows = tensor_on(logits.device, truncated, torch.long)
        descending, order = logits[rows].sort(dim=-1, descending=True, stable=True)
        truncate(descending, [positions[row] for row in truncated])
        weights = descending.softmax(dim=-1)
        ranks = _inverse_cdf(weights, uniforms[rows])
        drawn[rows] = torch.cat((order.gather(1, ranks).double(), weights.gather(1, ranks).double()), dim=1)
    whole = [row for row in range(len(positions)) if row not in truncated]
    if whole:
        rows = tensor_on(logits.device, whole, torch.long)
        weights = (logits[rows] if truncated else logits).softmax(dim=-1)
        drawn[rows, 0] = _inverse_cdf(weights, uniforms[rows]).squeeze(1).double()
    return drawn


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [S, 1] at which the cumulative ``weights`` [S, V] first exceed ``uniforms`` [S, 1] of their sum."""
    cumulative = weights.double().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp_(max=weights.shape[1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return tensor_on(like.device, values, torch.float32).unsqueeze(1)

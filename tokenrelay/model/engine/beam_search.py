"""Beam search over an engine that only knows single sequences: every beam of a round is a request for one token.

A beam's next request begins with the blocks its parent left in the prefix cache, forked by copying the last one. So a
round computes one token per beam, whatever the width, and a beam that is preempted or evicted costs time, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import MAX_LOGPROBS, FinishReason


class Hypothesis(NamedTuple):
    """A finished sequence. ``score`` is its log-probability ÷ length ** length_penalty."""

    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


class _Beam(NamedTuple):
    token_ids: tuple[int, ...]
    logprob: float


class BeamSearch:
    """Give ``start()``'s requests to the engine, and what ``process`` returns for each of their outputs, until
    ``hypotheses`` holds the ``n`` best, best first. Scores and ends are those of transformers' beam search.

    Greedy in ties: the earlier beam, then the likelier token. The distribution is the model's own: no temperature, no
    penalties.
    """

    def __init__(self, request: Request, eos_token_ids: Collection[int]) -> None:
        """``request`` is never run itself: it says prompt, salt, priority and parameters (``beam_width`` > 0)."""
        params = request.params
        self.hypotheses: list[Hypothesis] | None = None
        self._request = request
        self._ends = frozenset(() if params.ignore_eos else eos_token_ids).union(params.stop_token_ids)
        self._num_candidates = min(MAX_LOGPROBS, params.beam_width + len(self._ends))
        self._finished: list[Hypothesis] = []
        self._beams: list[_Beam] = [_Beam((), 0.0)]
        self._waiting_for: dict[str, int] = {}  # request id → beam
        self._outputs: dict[int, StepOutput] = {}
        self._num_requests = 0
        self.num_cached_tokens = 0

    @property
    def request_ids(self) -> list[str]:
        """Of the round in progress."""
        return list(self._waiting_for)

    def start(self) -> list[Request]:
        return [self._one_token(index, beam) for index, beam in enumerate(self._beams)]

    def process(self, output: StepOutput) -> list[Request]:
        """The next round's requests, when this output was the last of its round."""
        self._outputs[self._waiting_for.pop(output.request_id)] = output
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._waiting_for:
            return []
        self._advance()
        return [] if self.hypotheses is not None else self.start()

    def _one_token(self, index: int, beam: _Beam) -> Request:
        request = self._request
        request_id = f"{request.request_id}/{self._num_requests}"
        self._num_requests += 1
        self._waiting_for[request_id] = index
        params = replace(
            request.params,
            max_tokens=len(beam.token_ids) + 1,
            min_tokens=0,
            n=1,
            beam_width=0,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=(),
            logprobs=self._num_candidates,
        )
        prompt = request.token_ids[: request.num_prompt_tokens]
        return Request(
            request_id,
            prompt,
            params,
            output_token_ids=beam.token_ids,
            cache_salt=request.cache_salt,
            priority=request.priority,
            adapter=request.adapter,
        )

    def _advance(self) -> None:
        width, length = self._request.params.beam_width, len(self._beams[0].token_ids) + 1
        beams: list[_Beam] = []
        for rank, beam in enumerate(self._candidates()):
            if beam.token_ids[-1] in self._ends and length >= self._request.params.min_tokens:
                if rank < width:
                    self._finish(beam, FinishReason.STOP)
            elif len(beams) < width:
                beams.append(beam)
        self._beams, self._outputs = beams, {}
        if length == self._request.params.max_tokens:
            for beam in beams:
                self._finish(beam, FinishReason.LENGTH)
        if length == self._request.params.max_tokens or self._nothing_better():
            self.hypotheses = self._finished[: self._request.params.n]

    def _candidates(self) -> list[_Beam]:
        candidates = [
            _Beam((*beam.token_ids, token_id), beam.logprob + logprob)
            for index, beam in enumerate(self._beams)
            for token_id, logprob in self._outputs[index].logprobs[0].top
        ]
        return sorted(candidates, key=lambda beam: -beam.logprob)

    def _finish(self, beam: _Beam, reason: FinishReason) -> None:
        self._finished.append(Hypothesis(beam.token_ids, self._score(beam), reason))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._request.params.beam_width :]

    def _score(self, beam: _Beam) -> float:
        return beam.logprob / math.pow(len(beam.token_ids), self._request.params.length_penalty)

    def _nothing_better(self) -> bool:
        """Enough have finished, and the best beam, were it to end now, would not be among them."""
        if len(self._finished) < self._request.params.beam_width:
            return not self._beams
        return self._request.params.early_stopping or self._score(self._beams[0]) <= self._finished[-1].score

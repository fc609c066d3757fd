"""What a choice of weights is worth: perplexity of a text, and speed, of the engine as it serves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import SamplingParams

_PREFILLED, _DECODED = 512, 64  # tokens that speed is measured with, at most
_ROUNDS = 3  # of which the median counts


class Window(NamedTuple):
    """The tokens from ``begin`` to ``end`` are computed, those from ``scored`` on count."""

    begin: int
    end: int
    scored: int


class Speed(NamedTuple):
    """Tokens per second of one request: its prompt's, and those after it."""

    prefill: float
    decode: float


def engine_config(context: int, kv_cache_dtype: Literal["auto", "int8"] = "auto") -> EngineConfig:
    """For one request of this length at a time, every token computed for itself."""
    return EngineConfig(
        num_blocks=-(-(context + _DECODED) // 16) + 2,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        num_speculative_tokens=0,
        enable_prefix_caching=False,
    )


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Each begins ``stride`` tokens after the one before. Every token but the first counts once, with as much before it
    as its window has."""
    scored, begin = 1, 0
    while scored < num_tokens:
        end = min(begin + context, num_tokens)
        yield Window(begin, end, scored)
        scored, begin = end, begin + stride


def perplexity(
    engine: Engine, token_ids: Sequence[int], context: int, stride: int, advance: Callable[[int], object]
) -> float:
    """exp of the mean negative log-likelihood; ``advance`` is told how many tokens more were scored."""
    loss = 0.0
    for window in windows(len(token_ids), context, stride):
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
        [first, *_] = run(engine, token_ids[window.begin : window.end], params)
        scored = first.prompt_logprobs[window.scored - window.begin :]
        loss -= math.fsum(entry.logprob for entry in scored if entry is not None)
        advance(len(scored))
    return math.exp(loss / (len(token_ids) - 1))


def speed(engine: Engine, token_ids: Sequence[int], context: int) -> Speed:
    """The text's beginning as a prompt, and what the model writes after it."""
    prompt = token_ids[: min(_PREFILLED, context)]
    params = SamplingParams(max_tokens=_DECODED, temperature=0, ignore_eos=True)
    rounds = []
    for _ in range(_ROUNDS):
        start, ends = time.perf_counter(), list[float]()
        run(engine, prompt, params, partial(_note_time, ends))
        first, last = ends[-_DECODED], ends[-1]
        rounds.append(Speed(len(prompt) / (first - start), (_DECODED - 1) / (last - first)))
    return Speed(*(statistics.median(values) for values in zip(*rounds, strict=True)))


def _note_time(times: list[float]) -> None:
    times.append(time.perf_counter())


def run(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, after_step: Callable[[], object] = lambda: None
) -> list[StepOutput]:
    """One request to its end."""
    engine.add(Request("evaluated", prompt, params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        after_step()
    return outputs

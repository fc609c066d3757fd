"""What a request may ask of the sampler, and why a request ended. No torch: the API validates with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why one choice ended, in OpenAI's words where it has one."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # by the client, by id or by closing its connection


class SamplingParamsError(ValueError):
    """A sampling parameter is out of range. ``param`` names it, the message says the range."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request.

    ``seed`` is always set: a request without one gets a random seed at submission, before it is queued, so that
    a second worker draws the same numbers. ``temperature=0`` is greedy. ``top_k=0`` and ``top_p=1`` are off.

    Raises:
        SamplingParamsError: a value outside its range.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, "seed", f"must be between 0 and {MAX_SEED}")
        _require(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "must be between 0 and 100"
        )
        _require(self.top_k >= 0, "top_k", "must be at least 0 (0 turns it off)")
        _require(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        _require(self.n >= 1, "n", "must be at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        _require(all(self.stop), "stop", "must not contain an empty string")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise SamplingParamsError(param, message)

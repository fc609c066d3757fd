"""What a request may ask of the sampler, and why a request ended. No torch: the API validates with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1


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


_RANGES = {  # both ends belong to it
    "temperature": (0, 100),
    "min_p": (0, 1),
    "top_n_sigma": (0, 100),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "dynatemp_range": (0, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (0, MAX_COUNT),
    "dry_penalty_last_n": (-1, MAX_COUNT),
}
_ABOVE_ZERO = {"top_p": 1, "typical_p": 1, "dynatemp_exponent": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. All defaults but ``temperature`` change nothing.

    ``seed`` is always set: a request without one gets a random seed at submission, before it is queued, so that
    a second worker draws the same numbers. ``temperature=0`` is greedy. ``top_k=0`` and ``top_p=1`` are off.
    ``logit_bias`` holds (token id, bias), ``bad_words`` token sequences, ``dry_penalty_last_n=-1`` is all tokens.

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

    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, "seed", f"must be between 0 and {MAX_SEED}")
        _require(self.top_k >= 0, "top_k", "must be at least 0 (0 turns it off)")
        _require(self.n >= 1, "n", "must be at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        _require(all(self.stop), "stop", "must not contain an empty string")
        _require(all(self.bad_words), "bad_words", "must not contain an empty sequence")
        _require(all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "must be between -100 and 100")
        self._require_ranges()

    def _require_ranges(self) -> None:
        """Written so that NaN is in no range."""
        for name, (low, high) in _RANGES.items():
            _require(low <= getattr(self, name) <= high, name, f"must be between {low} and {high}")
        for name, high in _ABOVE_ZERO.items():
            _require(0 < getattr(self, name) <= high, name, f"must be above 0 and at most {high}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise SamplingParamsError(param, message)

"""What a request may ask of the sampler, and why a request ended. No torch: the API validates with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

Pooling = Literal["mean", "last"]  # how a prompt's hidden states become one embedding

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
MAX_LOGPROBS = 20  # alternatives per token: OpenAI's limit
MAX_BEAMS = 10  # a beam needs as many alternatives, and some for the ends among them


class FinishReason(StrEnum):
    """Why one choice ended, in OpenAI's words where it has one."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # by the client, by id or by closing its connection


class TokenLogprobs(NamedTuple):
    """How likely one token was, by the model's own distribution: before temperature, penalties and truncations."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob) of the likeliest, as many as were asked for


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
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "beam_width": (0, MAX_BEAMS),
    "length_penalty": (-10, 10),
}
_ABOVE_ZERO = {"top_p": 1, "typical_p": 1, "dynatemp_exponent": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. All defaults but ``temperature`` change nothing.

    ``seed`` is always set: a request without one gets a random seed at submission, before it is queued, so that
    a second worker draws the same numbers. ``temperature=0`` is greedy. ``top_k=0`` and ``top_p=1`` are off.
    ``logprobs`` and ``prompt_logprobs`` are numbers of alternatives; 0 gives the token's own, None nothing.
    ``grammar`` is what ``structured.py`` makes of a schema, a regex or a grammar; empty: anything goes.
    ``beam_width=0`` samples; otherwise the ``n`` best of that many beams are kept (``beam_search.py``).
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
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    grammar: str = ""
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _require(0 <= self.seed <= MAX_SEED, "seed", f"must be between 0 and {MAX_SEED}")
        _require(self.top_k >= 0, "top_k", "must be at least 0 (0 turns it off)")
        _require(self.n >= 1, "n", "must be at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        _require(all(self.stop), "stop", "must not contain an empty string")
        _require(all(self.bad_words), "bad_words", "must not contain an empty sequence")
        _require(all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "must be between -100 and 100")
        _require(self.beam_width == 0 or self.beam_width >= self.n, "n", "must be at most the beam width")
        self._require_ranges()

    def _require_ranges(self) -> None:
        """Written so that NaN is in no range."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            _require(value is None or low <= value <= high, name, f"must be between {low} and {high}")
        for name, high in _ABOVE_ZERO.items():
            _require(0 < getattr(self, name) <= high, name, f"must be above 0 and at most {high}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise SamplingParamsError(param, message)

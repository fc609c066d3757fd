"""What was seen of the requests of a run. A process that is a target prints a ``Run`` as JSON."""

from __future__ import annotations

from itertools import pairwise

import msgspec


class TargetError(ValueError):
    """A target that cannot be measured, in one line."""


class Measured(msgspec.Struct):
    """One request. Times are seconds of any one clock; ``arrivals`` are when each chunk of output came."""

    started: float
    ended: float = 0.0
    arrivals: list[float] = []
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""  # why it failed
    refused: bool = False  # … by a server that said it has no room

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Between chunks, however many tokens a chunk has."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def time_per_output_token(self) -> float:
        """After the first; unlike a gap it is comparable between servers that put several tokens into a chunk."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)


class Run(msgspec.Struct):
    """Requests under one load, warm-up excluded."""

    requests: list[Measured]
    seconds: float
    cpu_seconds: float = 0.0  # of the client; 0: not known

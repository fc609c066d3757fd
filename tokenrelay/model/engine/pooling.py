"""From the hidden states of a prompt to its embedding: a function of its tokens, whatever came in one step with them.

Hidden states of a causal network are pooled over the sequence, as the mean or the last token's, and brought to the
length 1. Every sum goes token by token in double precision, so chunks of any size give the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokenrelay.model.engine.step import Sampled, ScheduledRequest

Vector = npt.NDArray[np.float64]


def pool(entry: ScheduledRequest, hidden: Tensor) -> Sampled:
    """``hidden`` [rows, C] are the entry's normalised hidden states of this step."""
    rows = hidden if entry.request.pooling == "mean" else hidden[-1:]
    states: Vector = rows.cpu().double().numpy()
    if entry.request.pooling == "mean":
        states = _running_sum(entry.request.hidden_sum, states)
    return Sampled(embedding=unit(states[-1])) if entry.completes else Sampled(hidden_sum=states[-1].copy())


def _running_sum(before: Vector | None, states: Vector) -> Vector:
    """The sums [rows, C] behind each row. A cumulative sum has one order, unlike numpy's and torch's plain sums."""
    if before is None:
        return states.cumsum(axis=0)
    return np.vstack([before, states]).cumsum(axis=0)


def unit(vector: Vector) -> bytes:
    """The vector at the length 1, as float32 numbers, little endian. (the mean has the direction of the sum)"""
    length = math.sqrt(math.fsum(vector * vector))  # rounded once, so there is no order to depend on
    return (vector / (length or 1.0)).astype("<f4").tobytes()

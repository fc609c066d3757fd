"""Random numbers without a state: a hash of (seed, position), so that whoever takes a request over draws the same."""

from __future__ import annotations

XTC_STREAM = 2**63  # seeds are below it: a seed with this bit is nobody else's

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from 53 bits of SplitMix64's output function applied to both words. (Steele et al. 2014)"""
    return (_mix(_mix(seed) ^ position * 0x9E3779B97F4A7C15) >> 11) / 2**53


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31

"""Every target under every load, interleaved, so that a machine's moods meet all of them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from tokenrelay.bench.figures import Bounds, Figures
from tokenrelay.bench.measured import TargetError
from tokenrelay.bench.targets import Advance, Target
from tokenrelay.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, how often, and what counts as good."""

    targets: Sequence[Target]
    workloads: Sequence[Workload]
    rounds: int
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Result:
    """One target under one load in one round."""

    target: str
    round: int
    workload: Workload
    figures: Figures
    first_error: str = ""
    at: float = field(default_factory=time.time)


class Watch(Protocol):
    """Told what is being measured and how many requests that are; yields what is called for each that ended."""

    def __call__(self, title: str, total: int | None, /) -> AbstractContextManager[Advance]: ...


async def measure_all(plan: Plan, watch: Watch) -> AsyncIterator[Result]:
    """A B, B A, A B … for each load in turn."""
    for target in plan.targets:
        await target.prepare()
    for round_ in range(plan.rounds):
        for workload in plan.workloads:
            for target in in_turn(plan.targets, round_):
                title = f"round {round_ + 1}/{plan.rounds}: {target.name}, {workload.title}"
                with watch(title, None if workload.beside else workload.num_requests) as advance:
                    yield await _measure(target, round_, workload, plan.bounds, advance)


def in_turn(targets: Sequence[Target], round_: int) -> list[Target]:
    """Nobody is always first."""
    first = round_ % len(targets)
    return [*targets[first:], *targets[:first]]


async def _measure(target: Target, round_: int, workload: Workload, bounds: Bounds, advance: Advance) -> Result:
    try:
        figures, first_error = await target.measure(workload, bounds, advance)
    except TargetError as error:
        raise TargetError(f"{target.name}, {workload.title}: {error}") from error
    return Result(target.name, round_, workload, figures, first_error)

"""Results as a table, and as JSON."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Column, Table

from tokenrelay import __version__
from tokenrelay.bench.rounds import Result
from tokenrelay.bench.workload import Workload

IN_A_SWEEP = (
    *("output_tokens_per_second", "goodput_requests_per_second", "ttft_p50_ms"),
    *("gap_p50_ms", "gap_p99_ms", "e2e_p50_ms", "refused", "errors"),
    *("prefill_seconds", "alone_gap_p99_ms", "beside_gap_p99_ms", "beside_gap_worst_ms"),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(rounded(statistics.median(values)), rounded(min(values)), rounded(max(values)))

    def __str__(self) -> str:
        alone = legible(self.median)
        return alone if self.min == self.max else f"{alone} ({legible(self.min)}–{legible(self.max)})"


class Report:
    """All results of a run of the command. ``swept`` is the field of the workload that varies, if one does."""

    def __init__(self, results: Sequence[Result], swept: str) -> None:
        self.results, self.swept = results, swept
        self.targets = list(dict.fromkeys(result.target for result in results))
        self.workloads = list(dict.fromkeys(result.workload for result in results))
        self.measures = list(dict.fromkeys(figure for result in results for figure in result.figures))

    def spread(self, workload: Workload, target: str, figure: str) -> Spread | None:
        """None if nothing was measured for it."""
        values = list(self._by_round(workload, target, figure).values())
        return Spread.of(values) if values else None

    def ratio(self, workload: Workload, target: str, figure: str) -> Spread | None:
        """To the first target, round by round: what slowed the machine for a while slowed both."""
        first, own = (self._by_round(workload, name, figure) for name in (self.targets[0], target))
        values = [own[round_] / first[round_] for round_ in own if first.get(round_)]
        return Spread.of(values) if values else None

    def tables(self) -> list[Table]:
        """One per load, or all loads of a sweep in one."""
        if len(self.workloads) > 1:
            return [self._sweep()]
        return [self._measures(workload) for workload in self.workloads]

    def as_json(self, command: str) -> str:
        """One line: medians of every figure, and ratios."""
        facts = {"command": command, "version": __version__, **machine(), "swept": self.swept}
        return msgspec.json.encode(facts | {"loads": [self._load(load) for load in self.workloads]}).decode()

    def _load(self, workload: Workload) -> dict[str, Any]:
        others = self.targets[1:]
        return asdict(workload) | {
            "targets": {name: self._each(self._median, workload, name) for name in self.targets},
            "ratios": {name: self._each(self.ratio, workload, name) for name in others},
        }

    def _each(self, of: Any, workload: Workload, target: str) -> dict[str, Any]:
        found = {figure: of(workload, target, figure) for figure in self.measures}
        return {figure: value for figure, value in found.items() if value is not None}

    def _median(self, workload: Workload, target: str, figure: str) -> float | None:
        spread = self.spread(workload, target, figure)
        return spread.median if spread else None

    def _by_round(self, workload: Workload, target: str, figure: str) -> dict[int, float]:
        of = [result for result in self.results if (result.workload, result.target) == (workload, target)]
        return {result.round: result.figures[figure] for result in of if figure in result.figures}

    def _measures(self, workload: Workload) -> Table:
        ratios = [f"{name} / {self.targets[0]}" for name in self.targets[1:]]
        table = Table("measure", *self.targets, *ratios, title=workload.title)
        for figure in self.measures:
            values = [self.spread(workload, name, figure) for name in self.targets]
            against = [self.ratio(workload, name, figure) for name in self.targets[1:]]
            table.add_row(figure.replace("_", " "), *map(cell, [*values, *against]))
        return table

    def _sweep(self) -> Table:
        """One row per load and target; of most figures only the median, or it would be too wide."""
        first, *others = [figure for figure in IN_A_SWEEP if any(result.figures.get(figure) for result in self.results)]
        against = [f"/ {self.targets[0]}"] if len(self.targets) > 1 else []
        names = [figure.replace("_per_second", " /s").replace("_", " ") for figure in (first, *others)]
        headers = (self.swept.replace("_", " "), "target", names[0], *against, *names[1:])
        table = Table(*(Column(header, overflow="fold") for header in headers))
        for workload in self.workloads:
            for name in [name for name in self.targets if self.spread(workload, name, first)]:
                spread, ratio = self.spread(workload, name, first), self.ratio(workload, name, first)
                medians = [cell(self._median(workload, name, figure)) for figure in others]
                value = f"{getattr(workload, self.swept):g}"
                table.add_row(value, name, cell(spread), *[cell(ratio)] * len(against), *medians)
        return table


def rounded(value: float) -> float:
    """Nobody measures more digits."""
    return float(f"{value:.5g}")


def cell(value: Spread | float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, Spread) else legible(value)


def legible(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def as_record(result: Result, command: str) -> bytes:
    """One line of ``--json``: a target under a load in a round."""
    at = datetime.fromtimestamp(result.at, UTC).isoformat(timespec="seconds")
    facts = {"command": command, "version": __version__, **machine()}
    figures = {name: rounded(value) for name, value in result.figures.items()}
    return msgspec.json.encode(asdict(result) | facts | {"at": at, "figures": figures}) + b"\n"


def machine() -> dict[str, Any]:
    """What the client ran on; the servers too, if they are here."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {"machine": models[0] if models else platform.machine(), "cores": os.cpu_count()}

"""Targets are measured in turn, and compared round by round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tokenrelay.bench.figures import Bounds, Figures
from tokenrelay.bench.plot import draw
from tokenrelay.bench.report import Report, Spread, as_record
from tokenrelay.bench.rounds import Plan, Result, in_turn, measure_all
from tokenrelay.bench.sweep import numbers, sweep
from tokenrelay.bench.targets import Advance, Target
from tokenrelay.bench.workload import Workload

SWEEP = [Workload(clients=clients) for clients in (1, 4, 16)]


class Stub:
    """Twice as fast as its machine, which gets slower from one measurement to the next."""

    measured: list[str]

    def __init__(self, name: str, speed: float, order: list[tuple[str, int]]) -> None:
        self.name, self._speed, self._order = name, speed, order

    async def prepare(self) -> None: ...

    async def measure(self, workload: Workload, bounds: Bounds, advance: Advance) -> tuple[Figures, str]:
        self._order.append((self.name, workload.clients))
        return {"output_tokens_per_second": self._speed * workload.clients, "ttft_p50_ms": 5.0}, ""


@contextmanager
def unwatched(title: str, total: int | None) -> Iterator[Advance]:
    yield lambda: None


async def results_of(rounds: int) -> tuple[list[Result], list[tuple[str, int]]]:
    order: list[tuple[str, int]] = []
    targets: list[Target] = [Stub("ours", 3.0, order), Stub("theirs", 1.5, order)]
    results = [result async for result in measure_all(Plan(targets, SWEEP, rounds, Bounds()), unwatched)]
    return results, order


def of(target: str, round_: int, value: float, workload: Workload = SWEEP[0]) -> Result:
    return Result(target, round_, workload, {"output_tokens_per_second": value})


async def test_rounds_are_interleaved_and_nobody_is_always_first() -> None:
    _, order = await results_of(rounds=2)
    assert order[:4] == [("ours", 1), ("theirs", 1), ("ours", 4), ("theirs", 4)]
    assert order[6:8] == [("theirs", 1), ("ours", 1)]


@given(st.integers(1, 5))
def test_in_as_many_rounds_as_targets_each_is_first_once(count: int) -> None:
    targets: list[Target] = [Stub(str(i), 1.0, []) for i in range(count)]
    orders = [in_turn(targets, round_) for round_ in range(count)]
    assert {order[0].name for order in orders} == {target.name for target in targets}
    assert all(sorted(order, key=targets.index) == targets for order in orders)


def test_a_ratio_is_that_of_each_round() -> None:
    """A machine twice as slow in the second round changes the figures, and no ratio."""
    slower = [of("a", 0, 10), of("b", 0, 5), of("b", 1, 2.5), of("a", 1, 5)]
    report = Report(slower, "clients")
    ratio = report.ratio(SWEEP[0], "b", "output_tokens_per_second")
    spread = report.spread(SWEEP[0], "b", "output_tokens_per_second")
    assert ratio
    assert spread
    assert (ratio.median, ratio.min, ratio.max) == (0.5, 0.5, 0.5)
    assert (spread.median, spread.min, spread.max) == (3.75, 2.5, 5)


def test_what_was_not_measured_is_not_reported() -> None:
    report = Report([of("a", 0, 0.0), of("b", 0, 5), Result("a", 0, SWEEP[1], {"ttft_p50_ms": 7.0})], "clients")
    assert report.ratio(SWEEP[0], "b", "output_tokens_per_second") is None  # to nothing
    assert report.spread(SWEEP[1], "b", "ttft_p50_ms") is None


async def test_the_last_line_is_all_of_it() -> None:
    results, _ = await results_of(rounds=3)
    line = json.loads(Report(results, "clients").as_json("tokenrelay bench …"))
    assert line["command"] == "tokenrelay bench …"
    assert [load["clients"] for load in line["loads"]] == [1, 4, 16]
    assert [load["targets"]["ours"]["output_tokens_per_second"] for load in line["loads"]] == [3, 12, 48]
    assert line["loads"][1]["ratios"]["theirs"]["output_tokens_per_second"] == {"median": 0.5, "min": 0.5, "max": 0.5}


@pytest.mark.parametrize(
    ("spread", "shown"),
    [
        (Spread(1.23456, 1.23456, 1.23456), "1.235"),
        (Spread(2, 1, 3), "2 (1–3)"),
        (Spread(12345.6, 999.96, 23456.7), "12,346 (1000–23,457)"),
    ],
)
def test_a_spread_is_legible(spread: Spread, shown: str) -> None:
    assert str(spread) == shown


def test_a_record_is_one_round() -> None:
    record = json.loads(as_record(of("a", 2, 1 / 3), "command"))
    assert (record["target"], record["round"], record["workload"]["clients"]) == ("a", 2, 1)
    assert record["figures"] == {"output_tokens_per_second": 0.33333}


async def test_tables_hold_every_target_and_load() -> None:
    results, _ = await results_of(rounds=2)
    console = Console(width=200, record=True, quiet=True)
    for report in (Report(results, "clients"), Report([r for r in results if r.workload == SWEEP[2]], "clients")):
        for table in report.tables():
            text = "".join(segment.text for segment in console.render(table))
            assert all(word in text for word in ("ours", "theirs", "16", "48", "24", "0.5"))


@pytest.mark.parametrize("swept", [SWEEP, SWEEP[:1], [Workload(clients=4, beside=1000)]])
async def test_plots_are_pictures(swept: list[Workload], tmp_path: Path) -> None:
    panels = {"output_tokens_per_second": 9.0, "ttft_p50_ms": 5.0, "beside_gap_p99_ms": 4.0, "prefill_seconds": 1.0}
    report = Report([Result("<a&b>", 0, load, panels) for load in swept], "beside" if swept[0].beside else "clients")
    draw(tmp_path / "plot.png", report)
    draw(tmp_path / "plot.html", report)
    png, html = (tmp_path / "plot.png").read_bytes(), (tmp_path / "plot.html").read_text()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert html.startswith("<!doctype html>")
    assert html.count("<svg") == html.count("</svg>") == 1
    assert "<a&b>" not in html


def test_one_option_may_be_a_list() -> None:
    swept, loads = sweep(Workload(requests=9), {"clients": "16,1", "prompt_tokens": "64"})
    assert swept == "clients"
    assert [(load.clients, load.prompt_tokens, load.requests) for load in loads] == [(1, 64, 9), (16, 64, 9)]
    assert sweep(Workload(), {"clients": "4", "rate": "", "prompt_tokens": "128,512"})[0] == "prompt_tokens"
    assert sweep(Workload(), {"clients": "4", "rate": "0.5"})[0] == "rate"
    assert sweep(Workload(), {"clients": "4", "rate": ""})[0] == "clients"


@pytest.mark.parametrize(
    "lists",
    [{"clients": "1,2", "prompt_tokens": "1,2"}, {"rate": "1", "beside": "1"}, {"clients": "1,2", "rate": "1"}],
)
def test_options_that_exclude_each_other(lists: dict[str, str]) -> None:
    with pytest.raises(typer.BadParameter):
        sweep(Workload(), {"clients": "1", **lists})


@given(st.sets(st.integers(1, 10**6), min_size=1))
def test_numbers_are_in_order(values: set[int]) -> None:
    found = numbers("clients", ",".join(map(str, values)))
    assert set(found) == values
    assert all(earlier < later for earlier, later in pairwise(found))


@pytest.mark.parametrize(
    ("name", "text"), [("clients", "0"), ("clients", "1,,2"), ("clients", "1.5"), ("rate", "inf"), ("rate", "nan")]
)
def test_what_is_no_number(name: str, text: str) -> None:
    with pytest.raises(typer.BadParameter):
        numbers(name, text)

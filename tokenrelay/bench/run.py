"""A benchmark from its plan to its results, and what is shown while it runs."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tokenrelay.bench.report import Report, as_record
from tokenrelay.bench.rounds import Plan, Result, measure_all
from tokenrelay.bench.targets import Advance

Draw = Callable[[Report], None]


def run(plan: Plan, swept: str, records: Path | None, draw: Draw | None) -> None:
    """Measure, show a table, draw a plot, append to the records, and print one line of JSON."""
    results: list[Result] = []
    if records:
        records.open("ab").close()  # fails now rather than after the first run
    try:
        asyncio.run(_collect(plan, records, results))
    finally:  # what was measured before something failed is worth as much
        if results:
            _show(Report(results, swept))
    print(Report(results, swept).as_json(command()))
    if draw:
        draw(Report(results, swept))


async def _collect(plan: Plan, records: Path | None, results: list[Result]) -> None:
    async for result in measure_all(plan, _progress):
        results.append(result)
        if records:
            with records.open("ab") as file:
                file.write(as_record(result, command()))


def _show(report: Report) -> None:
    console = Console(stderr=True)
    for table in report.tables():
        console.print(table)
    for error in dict.fromkeys(f"{r.target}: {r.first_error}" for r in report.results if r.first_error):
        console.print("first error of a run:", error, style="red", markup=False, soft_wrap=True)


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Advance]:
    """A bar, where somebody looks; drawn seldom, for it takes its time from the server."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def command() -> str:
    """As it was given, but for the secret."""
    given = ["tokenrelay", *sys.argv[1:]]
    for i, word in enumerate(given):
        if word.startswith("--api-key="):
            given[i] = "--api-key=…"
        elif given[i - 1] == "--api-key":
            given[i] = "…"
    return " ".join(word if word.endswith("…") else shlex.quote(word) for word in given)

"""A sweep as two plots, PNG or HTML. Needs matplotlib, the extra ``bench``."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from tokenrelay.bench.report import Report

THROUGHPUT_AND_LATENCY = {"output_tokens_per_second": "output tokens/s", "ttft_p50_ms": "time to first token, p50, ms"}
STALL = {"beside_gap_p99_ms": "gap beside the prompt, p99, ms", "prefill_seconds": "prompt's time to first token, s"}
MANY_TIMES = 8  # wider sweeps have a logarithmic axis


def draw(file: Path, report: Report) -> None:
    """One line per target through the medians, with a band from the least to the most over the rounds."""
    panels = STALL if report.workloads[0].beside else THROUGHPUT_AND_LATENCY
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for target in report.targets:
            _line(axes, report, target, measure)
        _axes(axes, report, label)
    figure.axes[0].legend()
    file.write_bytes(_html(figure, report) if file.suffix == ".html" else _png(figure))


def _line(axes: Axes, report: Report, target: str, measure: str) -> None:
    found = [(getattr(load, report.swept), report.spread(load, target, measure)) for load in report.workloads]
    points = [(x, spread) for x, spread in found if spread]
    x, spreads = [x for x, _ in points], [spread for _, spread in points]
    axes.plot(x, [spread.median for spread in spreads], marker="o", label=target)
    axes.fill_between(x, [spread.min for spread in spreads], [spread.max for spread in spreads], alpha=0.2)


def _axes(axes: Axes, report: Report, label: str) -> None:
    x = [getattr(load, report.swept) for load in report.workloads]
    if max(x) >= MANY_TIMES * min(x) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel(report.swept.replace("_", " "))
    axes.set_title(label)
    axes.grid(alpha=0.3)


def _png(figure: Figure) -> bytes:
    figure.savefig(png := io.BytesIO(), format="png", dpi=120)
    return png.getvalue()


def _html(figure: Figure, report: Report) -> bytes:
    figure.savefig(svg := io.StringIO(), format="svg")
    drawing = svg.getvalue()
    title = escape(f"tokenrelay bench: {', '.join(report.targets)}")
    head = f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title></head>"
    return f"{head}<body><h1>{title}</h1>{drawing[drawing.index('<svg') :]}</body></html>".encode()

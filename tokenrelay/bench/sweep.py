"""Options that may be lists, as workloads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import typer

from tokenrelay.bench.workload import Workload


def sweep(load: Workload, lists: dict[str, str]) -> tuple[str, list[Workload]]:
    """The field that varies, or else the load's size; and a workload for each of its values."""
    given = {name: numbers(name, text) for name, text in lists.items() if text}
    several = [name for name, values in given.items() if len(values) > 1]
    if len(several) > 1:
        raise typer.BadParameter("only one of them may be a list", param_hint=" and ".join(map(_flag, several)))
    if "rate" in given and "beside" in given:
        raise typer.BadParameter("one or the other", param_hint="--rate and --beside")
    if "rate" in given and "clients" in several:
        raise typer.BadParameter("arrivals at a rate have no number of clients", param_hint="--clients")
    swept = several[0] if several else next(name for name in ("rate", "beside", "clients") if name in given)
    load = replace(load, **{name: values[0] for name, values in given.items()})
    return swept, [replace(load, **{swept: value}) for value in given[swept]]


def numbers(name: str, text: str) -> list[Any]:
    """Of "1,4,16"; only a rate may be a fraction."""
    try:
        values = [float(part) if name == "rate" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no number, and no list of them", param_hint=_flag(name)) from error
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise typer.BadParameter("must be positive", param_hint=_flag(name))
    return sorted(set(values))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

"""``tokenrelay bench``: its options. Every other command imports this file, so it imports nothing of weight."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = "http://127.0.0.1:8000"
API_KEY_VARIABLES = ["TOKENRELAY_API_KEY", "OPENAI_API_KEY"]
_LOAD, _LENGTH, _RUN, _SERVER, _OUT = "Load", "Prompts and output", "Measuring", "Server", "Results"


def _option(help_: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel=panel, **more)


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]URL …", help=f"`[NAME=]URL` or `NAME=exec:COMMAND`; else {HERE}."),
    ] = None,
    clients: Annotated[str, _option("Requests in flight at any time (closed loop). *", _LOAD)] = "16",
    rate: Annotated[str, _option("Instead: requests per second, which arrive at random (open loop). *", _LOAD)] = "",
    beside: Annotated[
        str, _option("Instead: how `--clients` streams stall while a prompt of so many tokens arrives. *", _LOAD)
    ] = "",
    requests: Annotated[int, _option("Per run; 0: four per client, or 30 s of arrivals.", _LOAD, min=0)] = 0,
    prompt_tokens: Annotated[str, _option("Length of each prompt. *", _LENGTH)] = "128",
    output_tokens: Annotated[
        str, _option("Length of each output; empty: 64, or 2048 with `--beside`. *", _LENGTH)
    ] = "",
    shared_prefix: Annotated[int, _option("Further tokens that all prompts begin with.", _LENGTH, min=0)] = 0,
    repetitive: Annotated[
        bool, _option("Prompts are a text that the output repeats: what speculation by lookup can do.", _LENGTH)
    ] = False,
    ignore_eos: Annotated[bool, _option("Have full-length outputs, by the field `ignore_eos`.", _LENGTH)] = True,
    vocabulary: Annotated[int, _option("Prompts are random ids below this.", _LENGTH, min=2)] = 30_000,
    rounds: Annotated[int, _option("Measure everything so often, the targets in turn.", _RUN, min=1)] = 1,
    warm_up: Annotated[int, _option("Requests before each run's clock starts; -1: one per client.", _RUN)] = -1,
    goodput_ttft_ms: Annotated[
        float | None, _option("Goodput counts requests whose first token came within this …", _RUN)
    ] = None,
    goodput_gap_ms: Annotated[float | None, _option("… and each further one within this, on average.", _RUN)] = None,
    model: Annotated[str, _option("Empty: the first that the server lists.", _SERVER)] = "",
    api_key: Annotated[str, _option("Sent as a bearer token.", _SERVER, envvar=API_KEY_VARIABLES)] = "",
    timeout: Annotated[float, _option("Seconds a request may take.", _SERVER, min=0.001)] = 600.0,
    plot: Annotated[
        Path | None, _option("Throughput and latency against the option that is a list; .png or .html.", _OUT)
    ] = None,
    json: Annotated[Path | None, _option("Append each round's figures as a line of JSON.", _OUT)] = None,
) -> None:
    """Measure OpenAI-compatible servers: throughput, latencies, goodput. The last line is JSON.

    `tokenrelay bench http://127.0.0.1:8000 --clients 1,4,16,64 --plot clients.png`

    `tokenrelay bench ours=http://127.0.0.1:8000 theirs=http://127.0.0.1:8001 --rounds 5`

    Several targets are measured in turn, the order rotating each round, with ratios to the first of them. One of the
    options marked * may be a list (`1,4,16`): a sweep.

    Prompts are random token ids to `/v1/completions`, new for each run, so that no prefix cache helps unless
    `--shared-prefix` says so; greedy; a connection per request. A gap is the time between two chunks, tpot the time per
    token after the first, whatever the chunks hold. Percentiles are nearest ranks over all requests of a run. Requests
    that failed or were refused (429, 503) are counted apart.

    `NAME=exec:COMMAND` is a library instead of a server: the command reads the workload from stdin as JSON, {"clients",
    "prompts", "max_tokens", "warm_up"}, and prints {"requests": [{"started", "ended", "arrivals", "prompt_tokens",
    "output_tokens"}], "seconds"}, in seconds.
    """
    from tokenrelay.bench.figures import Bounds
    from tokenrelay.bench.rounds import Plan
    from tokenrelay.bench.run import run
    from tokenrelay.bench.sweep import sweep
    from tokenrelay.bench.targets import Access, distinct
    from tokenrelay.bench.workload import Workload

    draw = plotter(plot) if plot else None
    load = Workload(
        requests=requests,
        warm_up=warm_up,
        shared_prefix=shared_prefix,
        repetitive=repetitive,
        ignore_eos=ignore_eos,
        vocabulary=vocabulary,
    )
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens or ("2048" if beside else "64")}
    swept, workloads = sweep(load, {"clients": clients, "rate": rate, "beside": beside, **lengths})
    access, bounds = Access(model, api_key, timeout), Bounds(goodput_ttft_ms, goodput_gap_ms)
    run(Plan(distinct(targets or [HERE], access), workloads, rounds, bounds), swept, json, draw)


def plotter(file: Path) -> Any:
    """Draws a report into this file. Fails before anything is measured."""
    if file.suffix not in (".png", ".html"):
        raise typer.BadParameter("must end with .png or .html", param_hint="--plot")
    try:
        from tokenrelay.bench.plot import draw
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib: pip install 'tokenrelay[bench]' ({error})") from error
    return partial(draw, file)

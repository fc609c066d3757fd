"""``tokenrelay eval``: what a way of holding weights costs and gives, measured on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tokenrelay.model.config import Quantization
from tokenrelay.model.weights import ModelSource, resolve
from tokenrelay.service import logs
from tokenrelay.service.cli_options import with_settings
from tokenrelay.service.settings import Settings

if TYPE_CHECKING:  # `--help` does not wait for torch
    from tokenrelay.model.engine.engine import Engine

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Measure what a choice costs: so far, that of `--quantization`.

Fewer bits take less memory, and reading it is what most of a token's time is spent with; what they cost shows in the
perplexity of a text. Nothing needs to be running, and nothing else should be.""",
)
_SETTINGS = ("model", "cache_dir", "device", "dtype", "num_threads", "kv_cache_dtype")
_CHOICES = get_args(Quantization)


@app.callback()
def _group() -> None:
    """One command does not stand for the group."""


@app.command()
@with_settings(*_SETTINGS)
def perplexity(
    settings: Settings,
    quantization: Annotated[
        str, typer.Option(help=f"One or several of {', '.join(_CHOICES)}, by commas; the first is compared with.")
    ] = "none,auto",
    text: Annotated[
        Path | None, typer.Option(help="A text file, the kind of text you serve. [default: tokenrelay's own README]")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of one window, at most the model's context.")] = 2048,
    stride: Annotated[int, typer.Option(min=0, help="From window to window; 0: half a window.")] = 0,
) -> None:
    """Print bytes of weights, perplexity and tokens per second for each choice, and all of it as a line of JSON.

    **Perplexity** is the exponential of the mean negative log-likelihood of the text's tokens: how many equally likely
    tokens the model is torn between. It is computed by the engine, as `prompt_logprobs` are. A text longer than
    `--context` is read in overlapping windows, where a token counts once, in the first window that has it. Figures are
    comparable for the same text, context and stride only; differences below a hundredth of a per cent mean nothing.

    **prefill** is the speed of the text's first 512 tokens as a prompt, **decode** that of the 64 that the model
    writes after them, one request, no speculation; medians of three.

        tokenrelay eval perplexity --quantization none,int8,int4 --text chapter.txt
    """
    choices = [choice.strip() for choice in quantization.split(",")]
    unknown = [choice for choice in choices if choice not in _CHOICES]
    if unknown:
        raise typer.BadParameter(f"--quantization: {unknown[0]!r} is none of {', '.join(_CHOICES)}")
    if stride >= context:
        raise typer.BadParameter(f"--stride ({stride}) must be below --context ({context}), so that windows overlap")
    logs.configure("info", "eval")
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    token_ids = _token_ids(source, text)
    stride = stride or context // 2
    rows = [_measured(settings, source, choice, token_ids, context, stride) for choice in choices]
    Console().print(_table(rows))
    what = {"model": source.name, "text": str(text or "README"), "tokens": len(token_ids), "context": context}
    print(json.dumps({**what, "rows": rows}))


def _token_ids(source: ModelSource, text: Path | None) -> list[int]:
    from tokenrelay.model.tokenizer import Tokenizer

    content = text.read_text() if text else _readme()
    token_ids = Tokenizer.from_source(source).encode(content, add_special_tokens=True, parse_special=False)
    if len(token_ids) < 2:
        raise ValueError(f"{text or 'the README'} has {len(token_ids)} tokens: there is nothing to predict")
    return token_ids


def _readme() -> str:
    """As the installed package describes itself, so that it is there without the repository."""
    return str(importlib.metadata.metadata("tokenrelay").json["description"])


def _measured(
    settings: Settings, source: ModelSource, choice: str, token_ids: list[int], context: int, stride: int
) -> dict[str, Any]:
    from tokenrelay.model.engine import evaluation
    from tokenrelay.model.transformer.quantization import weight_bytes

    with _progress() as progress:
        task = progress.add_task(choice, total=len(token_ids) - 1)
        engine = _engine(settings, source, choice, context)
        context = min(context, engine.max_model_len - 1)
        speed = evaluation.speed(engine, token_ids, min(context, engine.max_model_len - 64))
        found = evaluation.perplexity(
            engine, token_ids, context, min(stride, context - 1), lambda count: progress.advance(task, count)
        )
    return {
        "quantization": choice,
        "weight_bytes": weight_bytes(engine.runner.model),
        "perplexity": found,
        "prefill_tokens_per_second": speed.prefill,
        "decode_tokens_per_second": speed.decode,
    }


def _engine(settings: Settings, source: ModelSource, choice: str, context: int) -> Engine:
    import torch

    from tokenrelay.model.engine import evaluation
    from tokenrelay.model.engine.engine import Engine
    from tokenrelay.model.transformer.kernels import native

    threads = settings.num_threads or len(os.sched_getaffinity(0))
    native.set_num_threads(threads)
    torch.set_num_threads(1 if native.is_available() else threads)
    return Engine.from_model(
        str(source.path),
        evaluation.engine_config(context, settings.kv_cache_dtype),
        dtype=settings.dtype,
        quantization=choice,  # type: ignore[arg-type]
        device=settings.device,
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    against = f"against {first['quantization']}"
    table = Table("quantization", "MB of weights", "perplexity", against, "prefill/s", "decode/s")
    for row in rows:
        table.add_row(
            row["quantization"],
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity'] / first['perplexity'] - 1:+.3%}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
        )
    return table

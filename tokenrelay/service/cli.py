"""The command line. Every option is a setting, and can be given as an environment variable as well."""

from __future__ import annotations

import inspect
import socket
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from tokenrelay import __version__
from tokenrelay.model.weights import known_models, resolve
from tokenrelay.service import logs
from tokenrelay.service.embedded_valkey import EmbeddedValkeyError
from tokenrelay.service.settings import Settings

app = typer.Typer(
    name="tokenrelay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "An LLM inference server whose streams survive the death of any of its processes.\n\n"
        "Start with `tokenrelay serve`, then POST to `/v1/chat/completions` as you would to OpenAI. Every option "
        "is also read from the environment: `--max-num-seqs` is `TOKENRELAY_MAX_NUM_SEQS`."
    ),
)

_MODEL = ("model", "served_model_name", "cache_dir")
_BROKER = ("redis_url", "lease_seconds", "max_attempts", "retention_seconds", "drain_seconds", "log_level")
_LIMITS = ("max_model_len", "attention_sinks")
_HTTP = ("host", "port", "max_waiting", "max_body_bytes", "max_n", "keep_alive_seconds")
_ENGINE = (
    *("worker_metrics_port", "device", "dtype", "num_threads", "kv_cache_mb", "kv_cache_dtype"),
    *("max_num_seqs", "max_num_batched_tokens", "max_prefill_tokens_beside_decodes"),
    *("num_speculative_tokens", "enable_prefix_caching"),
)
_EMBEDDED = ("data_dir", "broker_memory_mb")


def _with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per named setting, and pass it the resulting ``Settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]

        def run(**options: Any) -> None:
            given = {name: options.pop(name) for name in names}
            command(settings=_settings({k: v for k, v in given.items() if v is not None}), **options)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__signature__ = inspect.Signature([*own, *map(_option, names)])  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str) -> inspect.Parameter:
    """A typer option for a setting; its default stays with the setting, so that the environment can speak."""
    setting = Settings.model_fields[name]
    kind = setting.annotation if setting.annotation in (int, float, bool) else str
    default = f" [default: {setting.default}]" if setting.default != "" else ""
    option = typer.Option(help=f"{setting.description}{default}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _settings(options: dict[str, Any]) -> Settings:
    try:
        return Settings(**options)
    except ValidationError as error:
        for problem in error.errors():
            field = "--" + "-".join(map(str, problem["loc"])).replace("_", "-") if problem["loc"] else "settings"
            Console(stderr=True).print(f"[red]{field}[/red]: {problem['msg']}")
        raise typer.Exit(2) from error


@app.command()
@_with_settings(*_MODEL, *_LIMITS, *_HTTP, *_ENGINE, *_BROKER, *_EMBEDDED)
def serve(settings: Settings) -> None:
    """Run everything on this machine: an embedded Valkey, the API and one model worker.

    Fetches the model if it is not there, prints the URL when it answers, and restarts what dies. Ctrl-C drains.
    """
    from tokenrelay.service.supervisor import supervise

    logs.configure(settings.log_level, "supervisor")
    sys.exit(supervise(settings))


@app.command()
@_with_settings(*_MODEL, *_LIMITS, *_HTTP, *_BROKER)
def api(
    settings: Settings,
    fd: Annotated[int, typer.Option(help="Listen on this inherited socket instead of host and port.")] = -1,
) -> None:
    """Run one API process against `--redis-url`. It needs no torch and no GPU; run as many as you like."""
    from tokenrelay.service.api.server import run_api

    _require_broker(settings)
    logs.configure(settings.log_level, "api")
    run_api(settings, sock=socket.socket(fileno=fd) if fd >= 0 else None)


@app.command()
@_with_settings(*_MODEL, *_LIMITS, "host", *_ENGINE, *_BROKER)
def worker(settings: Settings) -> None:
    """Run one model worker against `--redis-url`: one per GPU, or one per machine on CPUs."""
    from tokenrelay.service.worker.main import run_worker

    _require_broker(settings)
    logs.configure(settings.log_level, "worker")
    run_worker(settings)


@app.command("pull")
@_with_settings("cache_dir")
def pull_model(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="An alias that `tokenrelay models` lists, or a hub id.")],
) -> None:
    """Fetch a model into the cache, verify its checksum, and print its path."""
    print(resolve(model, cache_dir=settings.cache_dir).path)


@app.command()
@_with_settings("cache_dir")
def models(settings: Settings) -> None:
    """List the models known by a short name, and whether they are here."""
    table = Table("name", "size", "licence", Column("cached at", overflow="fold"))
    for known in known_models(settings.cache_dir):
        table.add_row(
            known.alias, f"{known.size / 1e6:.0f} MB", known.licence, str(known.path) if known.cached else "-"
        )
    Console().print(table)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _require_broker(settings: Settings) -> None:
    if not settings.redis_url:
        Console(stderr=True).print("[red]--redis-url[/red] is required here; only `serve` starts a broker of its own")
        raise typer.Exit(2)


def main() -> None:
    """Entry point: an unusable option, model, port or folder is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, EmbeddedValkeyError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(1)

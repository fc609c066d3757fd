"""The command line. Every option is a setting, and can be given as an environment variable as well."""

from __future__ import annotations

import gc
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from tokenrelay import __version__
from tokenrelay.bench.cli import bench
from tokenrelay.model.weights import known_models, resolve
from tokenrelay.service import dead_letters_cli, eval_cli, keys_cli, logs
from tokenrelay.service.cli_options import with_settings
from tokenrelay.service.embedded_valkey import EmbeddedValkeyError
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role, new_worker_id
from tokenrelay.terminal.cli import chat, complete

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
_BROKER = (
    *("redis_url", "redis_ca_file", "lease_seconds", "announce_seconds", "max_attempts", "retention_seconds"),
    *("drain_seconds", "log_level"),
)
_LIMITS = ("max_model_len", "attention_sinks", "max_lora_rank")
_QUEUE = (
    *("max_waiting", "max_waiting_tokens", "max_waiting_bytes"),
    *("max_waiting_per_tenant", "max_waiting_tokens_per_tenant"),
)
_HTTP = (
    *("host", "port", *_QUEUE, "max_body_bytes", "max_n", "max_inputs", "pooling", "keep_alive_seconds"),
    *("request_timeout_seconds", "disconnect_grace_seconds"),
    *("tool_call_format", "reasoning_format", "response_ttl_seconds", "response_store_mb"),
    *("lora_modules", "allow_lora_loading"),
    *("api_keys_file", "metrics_need_key", "metrics_tenants", "cors_origins", "log_prompts"),
)
_ENGINE = (
    *("worker_metrics_port", "device", "dtype", "quantization", "num_threads", "tensor_parallel_size", "kv_cache_mb"),
    *("kv_cache_dtype", "gpu_memory_utilization", "enforce_eager"),
    *("max_num_seqs", "max_num_batched_tokens", "max_prefill_tokens_beside_decodes"),
    *("num_speculative_tokens", "enable_prefix_caching", "max_loras", "watchdog_seconds", "workers"),
)
_PROCESSES = ("spare_workers", "api_workers")
_EMBEDDED = ("data_dir", "broker_memory_mb")

Inherited = Annotated[int, typer.Option(help="A file descriptor from the supervisor.", hidden=True)]

app.add_typer(dead_letters_cli.app, name="dead")
app.add_typer(keys_cli.app, name="keys")
app.add_typer(eval_cli.app, name="eval")
app.command()(bench)
app.command()(chat)
app.command()(complete)


@app.command()
@with_settings(*_MODEL, *_LIMITS, *_HTTP, *_ENGINE, *_PROCESSES, *_BROKER, *_EMBEDDED)
def serve(settings: Settings) -> None:
    """Run everything on this machine: an embedded Valkey, the API and the model workers.

    Fetches the model if it is not there, prints the URL when it answers, and restarts what dies. Ctrl-C or SIGTERM
    drains and ends it. SIGHUP restarts the API and the workers one at a time, each when its successor is ready, so that
    no request fails: for a new version of this package. While it lasts there is one more of each.
    """
    from tokenrelay.service.supervisor.supervisor import supervise

    logs.configure(settings.log_level, "supervisor")
    sys.exit(supervise(settings))


@app.command()
@with_settings(*_MODEL, *_LIMITS, *_HTTP, *_BROKER)
def api(settings: Settings, fd: Inherited = -1, ready_fd: Inherited = -1) -> None:
    """Run one API process against `--redis-url`. It needs no torch and no GPU; run as many as you like."""
    _require_broker(settings)
    logs.configure(settings.log_level, "api")
    gc.disable()  # until it is ready: what it imports and loads stays
    from tokenrelay.service.api.server import run_api

    run_api(settings, sock=_inherited(fd), ready_fd=ready_fd)


@app.command()
@with_settings(*_MODEL, *_LIMITS, "host", *_ENGINE, *_BROKER)
def worker(
    settings: Settings,
    spare: Annotated[
        bool, typer.Option("--spare", help="Load the model, and claim requests only while fewer than `workers` live.")
    ] = False,
    worker_id: Annotated[str, typer.Option(help="What the broker calls it; unique for ever.", hidden=True)] = "",
    metrics_fd: Inherited = -1,
    ready_fd: Inherited = -1,
    rank: Annotated[int, typer.Option(help="Of a worker's network, the share to compute.", hidden=True)] = 0,
    rendezvous: Annotated[Path, typer.Option(help="The file where its ranks meet.", hidden=True)] = Path(),
) -> None:
    """Run one model worker against `--redis-url`: one per GPU, or one per machine on CPUs."""
    _require_broker(settings)
    logs.configure(settings.log_level, f"rank-{rank}" if rank else "worker")
    gc.disable()  # until it is ready: what it imports and loads stays
    from tokenrelay.service.worker.follower import run_follower
    from tokenrelay.service.worker.main import run_worker

    if rank:
        run_follower(settings, rank, rendezvous)
    else:
        role = Role(worker_id or new_worker_id(), spare)
        run_worker(settings, role, metrics_socket=_inherited(metrics_fd), ready_fd=ready_fd)


@app.command("pull")
@with_settings("cache_dir")
def pull_model(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="An alias that `tokenrelay models` lists, or a hub id.")],
) -> None:
    """Fetch a model into the cache, verify its checksum, and print its path."""
    print(resolve(model, cache_dir=settings.cache_dir).path)


@app.command()
@with_settings("cache_dir")
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


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _global_options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _inherited(fd: int) -> socket.socket | None:
    return socket.socket(fileno=fd) if fd >= 0 else None


def _require_broker(settings: Settings) -> None:
    if not settings.redis_url:
        Console(stderr=True).print("[red]--redis-url[/red] is required here; only `serve` starts a broker of its own")
        raise typer.Exit(2)


def main() -> None:
    """Entry point: an unusable option, model, port or folder is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, EmbeddedValkeyError, ServiceError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(1)

"""``tokenrelay keys``: who may use the server, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenrelay.service.cli_options import with_settings
from tokenrelay.service.key_file import ApiKey, ApiKeysError, create_api_key, read_api_keys, revoke_api_key
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import Limits

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""API keys: create, list or revoke them, in the file that the setting `api_keys_file` names.

A running server notices changes within a second or two. With a file, even an empty one, only its keys are let in, and
`/livez`, `/readyz` and `/health` alone need none. A file that cannot be read changes nothing, is logged, and shows in
the metric `tokenrelay_api_keys_broken`; a server that has no other keys does not start with one.

The file has one JSON object per line:

    {"name": "alice-laptop", "sha256": "<64 hex digits>", "tenant": "alice", "weight": 2.0,
     "limits": {"requests_per_minute": 60, "tokens_per_minute": 100000, "concurrent_requests": 4, "max_tokens": 2048},
     "operator": false, "created": "2026-11-22T10:00:00+00:00"}

(in one line). `name`, `sha256` and `tenant` are required; a limit of 0, or none, is no limit. The keys of one tenant
share its requests, its queue and what is counted against its limits. An operator's key may read `/metrics`, too.""",
)
KeyName = Annotated[str, typer.Argument(help="What the key is called; unique in the file.")]
_FILE = ("api_keys_file",)


@app.command()
@with_settings(*_FILE)
def create(
    settings: Settings,
    name: KeyName,
    tenant: Annotated[str, typer.Option(help="Whose it is. [default: the key's name]")] = "",
    weight: Annotated[float, typer.Option(help="The tenant's share of the queue: 2 is twice that of 1.")] = 1.0,
    requests_per_minute: Annotated[int, typer.Option(help="0: any number.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(help="Prompts and answers together; 0: any number.")] = 0,
    concurrent_requests: Annotated[int, typer.Option(help="That have not ended, waiting or at work; 0: any.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="That one request may generate altogether; 0: any number.")] = 0,
    operator: Annotated[bool, typer.Option("--operator", help="May read /metrics.")] = False,
) -> None:
    """Add a key to the file, and print it. It can be seen this once only: the file keeps its SHA-256."""
    limits = Limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        max_tokens=max_tokens,
    )
    print(create_api_key(_path(settings), name, tenant or name, weight=weight, limits=limits, operator=operator))


@app.command("list")
@with_settings(*_FILE)
def list_keys(settings: Settings) -> None:
    """List the keys by name, with their tenants and limits."""
    table = Table("name", "tenant", "weight", "requests/min", "tokens/min", "concurrent", "max tokens", "created")
    for key in read_api_keys(_path(settings)):
        table.add_row(*_row(key))
    Console().print(table)


@app.command()
@with_settings(*_FILE)
def revoke(settings: Settings, name: KeyName) -> None:
    """Take a key out of the file: from then on it is refused. What it began goes on."""
    revoke_api_key(_path(settings), name)


def _path(settings: Settings) -> Path:
    if not settings.api_keys_file:
        raise ApiKeysError("--api-keys-file is required here, or TOKENRELAY_API_KEYS_FILE")
    return Path(settings.api_keys_file).expanduser()


def _row(key: ApiKey) -> list[str]:
    limits = key.limits
    counts = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests, limits.max_tokens)
    owner = f"{key.tenant} (operator)" if key.operator else key.tenant
    return [key.name, owner, f"{key.weight:g}", *(str(count or "–") for count in counts), key.created]

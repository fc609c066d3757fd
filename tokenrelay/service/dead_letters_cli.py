"""``tokenrelay dead``: what an operator does about requests that no worker survived."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tokenrelay.service.broker import connect
from tokenrelay.service.cli_options import with_settings
from tokenrelay.service.dead_letters import DeadLetters
from tokenrelay.service.embedded_valkey import url_of_running
from tokenrelay.service.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Requests that no worker survived, or none could read: list, show, requeue or purge them.\n\n"
        "**They contain their prompts.** The last 100 are kept, for at most seven days. The broker is `--redis-url`, "
        "or else the embedded one that serves from `--data-dir` on this machine."
    ),
)
_SETTINGS = ("redis_url", "redis_ca_file", "data_dir")
RequestId = Annotated[str, typer.Argument(help="The request's id, as `dead list` shows it.")]
T = TypeVar("T")


@app.command("list")
@with_settings(*_SETTINGS)
def list_letters(settings: Settings) -> None:
    """List them by model, the oldest first. Shows no prompts."""
    table = Table("id", "model", "tenant", "died at", "attempts", "prompt tokens", "events", "reason")
    for letter in _with_letters(settings, lambda letters: letters.all()):
        tenant, prompt = ("?", "?")
        if letter.submission:
            tenant, prompt = letter.submission.tenant, str(len(letter.submission.prompt_token_ids))
        died_at, counts = f"{letter.died_at:%Y-%m-%d %H:%M:%S}Z", (str(letter.attempts), prompt, str(letter.num_events))
        table.add_row(letter.request_id, letter.model, tenant, died_at, *counts, letter.reason)
    Console().print(table)


@app.command()
@with_settings(*_SETTINGS)
def show(settings: Settings, request_id: RequestId) -> None:
    """Print one as JSON, with its parameters and the token ids of its prompt."""
    letter = _with_letters(settings, lambda letters: letters.find(request_id))
    fields = {**letter._asdict(), "died_at": letter.died_at}
    print(msgspec.json.format(msgspec.json.encode(fields)).decode())


@app.command()
@with_settings(*_SETTINGS)
def requeue(settings: Settings, request_id: RequestId) -> None:
    """Send one again, from its beginning, and forget it here. Prints the new request's id.

    Its client has had its error: the output can be read from `/v1/requests/ID/stream` of the API, as that of any
    request. If it kills its workers again it comes back here.
    """

    async def send(letters: DeadLetters) -> str:
        return await letters.requeue(await letters.find(request_id))

    print(_with_letters(settings, send))


@app.command()
@with_settings(*_SETTINGS)
def purge(settings: Settings) -> None:
    """Forget them all, with their prompts. Prints how many there were."""
    print(_with_letters(settings, lambda letters: letters.purge()))


def _with_letters(settings: Settings, work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    async def run() -> T:
        url = settings.redis_url or url_of_running(settings.data_dir)
        async with connect(url, ca_file=settings.redis_ca_file) as redis:
            return await work(DeadLetters(redis, settings))

    return asyncio.run(run())

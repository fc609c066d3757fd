"""The options of ``tokenrelay chat`` and ``complete``, and what their exit codes say."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from tokenrelay.terminal.answer import Answer
from tokenrelay.terminal.chat import Chat
from tokenrelay.terminal.errors import TerminalError
from tokenrelay.terminal.server import Server

API_KEY_VARIABLES = ["TOKENRELAY_API_KEY", "OPENAI_API_KEY"]
USAGE, INTERRUPTED, NOBODY_READS = 2, 130, 141  # as shells have them

_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="Of a server with OpenAI's routes.", envvar="TOKENRELAY_URL")]
ModelName = Annotated[str, typer.Option(help="Empty: the first that the server lists.")]
ApiKey = Annotated[str, typer.Option(help="Sent as a bearer token.", envvar=API_KEY_VARIABLES, show_default=False)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the server's.")]
TopP = Annotated[float | None, typer.Option(help="Default: the server's.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal texts. Default: random.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer. Default: the server's.")]


def chat(
    url: Url = _URL,
    model: ModelName = "",
    system: Annotated[str, typer.Option(help="The system message to begin with.")] = "",
    api_key: ApiKey = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Talk to a running server.

    `tokenrelay chat --system "You answer in one sentence." --temperature 0`

    Answers appear as they are written. **Ctrl-C** ends an answer, on the server too, and not the program; `/reset`
    forgets the conversation, `/system TEXT` begins one with another system message, `/help` lists the rest, `/exit` or
    Ctrl-D ends. Where a connection breaks, or the server's API process is killed, the answer goes on where it was.
    Lines piped in are questions, one each.

    Exit codes: 0; 2 for a wrong option; 1 if the server refused, 3 if none answers.
    """
    options = _given(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    with _exit_codes():
        server = Server(url, api_key)
        Chat(server, server.model(model), system, options).run()


def complete(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="The text to continue; without it, the standard input.")
    ] = None,
    url: Url = _URL,
    model: ModelName = "",
    api_key: ApiKey = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")] = None,
) -> None:
    """Continue a text: the prompt from the arguments or the standard input, the continuation to the standard output.

    `tokenrelay complete "The sun rises in the" --max-tokens 8`

    `cat story.txt | tokenrelay complete --temperature 0.8 >> story.txt`

    Nothing but the continuation is written to the standard output. A line break at the input's end is not part of the
    prompt. Exit codes: 0; 2 for a wrong option; 1 if the server refused, 3 if none answers; 130 after Ctrl-C, which
    ends the request on the server, too.
    """
    text = " ".join(prompt) if prompt else _piped()
    options = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    with _exit_codes():
        server = Server(url, api_key)
        body = {**options, "prompt": text}
        with Answer(server, server.model(model), "/v1/completions", body, _note) as answer:
            for piece in answer:
                print(piece.text, end="", flush=True)
        print(end="\n" if sys.stdout.isatty() else "")


def _piped() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    return sys.stdin.read().removesuffix("\n")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Leave in one line whatever happened. A terminal that closes ends a request as Ctrl-C does."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except TerminalError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _stop_writing()


def _stop_writing() -> NoReturn:
    """Who read the output is gone; Python would complain at the end about what is left in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(NOBODY_READS)


def _note(message: str) -> None:
    typer.echo(f"({message})", err=True)

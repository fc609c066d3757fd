"""A conversation at the keyboard: history, commands, and Ctrl-C for the answer instead of the program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tokenrelay.terminal.answer import Answer, Piece
from tokenrelay.terminal.errors import TerminalError
from tokenrelay.terminal.server import Model, Server

with suppress(ImportError):  # a Python without it edits lines less well
    import readline  # noqa: F401

DIM, PLAIN = "\033[2m", "\033[0m"
HELP = """/reset        forget the conversation, but not the system message
/system TEXT  begin a new conversation with this system message; without TEXT, with none
/help         show this
/exit         end, as Ctrl-D does
Ctrl-C        end the answer that is being written, on the server, too"""


class Chat:
    """``options`` are further fields of every request."""

    def __init__(self, server: Server, model: Model, system: str, options: dict[str, Any]) -> None:
        self._server, self._model, self._options = server, model, options
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: self._begin(self._system),
            "/system": self._begin,
            "/help": lambda _: print(HELP),
        }
        self._begin(system)

    def run(self) -> None:
        """Until /exit, or the input's end."""
        if self._is_terminal:
            print(f"{self._model.name} at {self._server.url}; /help lists the commands")
        while (line := self._next_line()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/"):
                _complain(f"no command {word}; /help lists them")
            elif word:
                self._ask(line)

    def _begin(self, system: str) -> None:
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _next_line(self) -> str | None:
        while True:
            try:
                return input("> " if self._is_terminal else "")
            except EOFError:
                print(end="\n" if self._is_terminal else "")
                return None
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D ends)")

    def _ask(self, question: str) -> None:
        """What was written of an answer stays in the conversation; a question without any does not."""
        self._messages.append({"role": "user", "content": question})
        written: list[str] = []
        try:
            self._write(written)
        except KeyboardInterrupt:
            print("\n(cancelled)")
        except TerminalError as error:
            _complain(str(error))
        if text := "".join(written):
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def _write(self, written: list[str]) -> None:
        body = {**self._options, "messages": self._messages}
        with Answer(self._server, self._model, "/v1/chat/completions", body, _complain) as answer:
            for piece in answer:
                print(self._shown(piece), end="", flush=True)
                if not piece.reasoning:
                    written.append(piece.text)
        print()

    def _shown(self, piece: Piece) -> str:
        return f"{DIM}{piece.text}{PLAIN}" if piece.reasoning and self._is_terminal else piece.text


def _complain(message: str) -> None:
    print(f"({message})", file=sys.stderr, flush=True)

"""A command at a pseudo-terminal: typed at and read as by a person, Ctrl-C included."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from tests.service.running import wait_until

CTRL_C, CTRL_D = "\x03", "\x04"
_AT_ITS_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background of a shell has it ignored
os.execv(sys.executable, [sys.executable, "-m", "tokenrelay", *sys.argv[1:]])
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENRELAY_", "OPENAI_"))}
    return kept | {"TERM": "dumb", "COLUMNS": "200"} | variables


class PseudoTerminal:
    """Runs ``tokenrelay`` with these arguments. What was typed is echoed, so it can be read, too."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_ITS_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(**variables),
            start_new_session=True,
        )
        os.close(slave)
        self._shown = ""
        self._num_read = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(60)
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def enter(self, line: str) -> None:
        """Type a line, and pass over its echo."""
        self.type(f"{line}\r")
        self.read_until(line)
        self.read_until("\n")

    def read_until(self, text: str, seconds: float = 60) -> str:
        """What comes before ``text``, from where the last call ended."""
        start = self._num_read
        try:
            wait_until(lambda: text in self._shown[start:], f"{text!r} is shown", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}, but: {self._shown[start:]!r}") from None
        before, _, _ = self._shown[start:].partition(text)
        self._num_read = start + len(before) + len(text)
        return before

    def exit_code(self) -> int:
        return self.process.wait(60)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:  # the other end is closed
                return
            self._shown += data.decode(errors="replace")

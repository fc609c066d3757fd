"""What ends a command, with the exit code that scripts can tell apart."""

from __future__ import annotations


class TerminalError(Exception):
    """The server refused, or failed; the message is one line."""

    exit_code = 1


class Unreachable(TerminalError):
    """Nothing answers there."""

    exit_code = 3

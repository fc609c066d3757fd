"""The whole service as a user starts it: ``tokenrelay serve`` in a process of its own, with the real model."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import openai
import psutil

from tokenrelay.service.embedded_valkey import url_of_running

MODEL = "smollm2-135m-instruct"
TWO_SECONDS = 2.0 + 3.0  # the second part is what a machine with other things to do may add
LONG = "Write a long story about a dragon."  # a question whose greedy answer has hundreds of tokens
T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """The condition's first true value. Fails, naming ``what``, when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def free_ports(count: int) -> int:
    """The first of so many in a row. Below those that Linux gives to connections, which come and go meanwhile."""
    while True:
        first = random.randrange(20_000, 32_000)
        with suppress(OSError), ExitStack() as bound:
            for port in range(first, first + count):
                bound.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def free_port() -> int:
    return free_ports(1)


def num_cancelled(service: RunningService) -> float:
    """Requests that ended so since the service started."""
    return sum(
        value
        for name, value in service.metrics().items()
        if name.startswith("tokenrelay_requests_total{") and 'outcome="cancelled"' in name
    )


class RunningService:
    """Starts on entry, drains on exit. Options are those of ``tokenrelay serve``."""

    def __init__(self, folder: Path, **options: str | int | float) -> None:
        num_workers = int(options.get("workers", 1)) + int(options.get("spare_workers", 0))
        self.port = free_ports(1 + num_workers)
        self.worker_port = self.port + 1
        self.url = f"http://127.0.0.1:{self.port}"
        self._log, self._data = folder / "serve.log", folder / "data"
        own: dict[str, str | int | float] = {
            "port": self.port,
            "worker_metrics_port": self.worker_port,
            "data_dir": str(self._data),
        }
        self._ports = [self.port, *range(self.worker_port, self.worker_port + num_workers)]
        self._command = [sys.executable, "-m", "tokenrelay", "serve", *_flags(own | options)]
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=_plain_environment())
        try:
            wait_until(self.is_ready, "ready", 150)
        except AssertionError as error:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{error}; log: {self.log[-2000:]}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"serve ended: {self._log.read_text()[-2000:]}"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def broker_url(self) -> str:
        """Of its embedded Valkey."""
        return url_of_running(self._data)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def children(self, name: str) -> list[psutil.Process]:
        """Those called ``worker``, ``spare``, ``api`` or ``valkey-server``."""
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = child.cmdline()
                called = "spare" if "--spare" in command else "".join(command[3:4])
                found += [child] if name in (child.name(), called) else []
        return found

    def child(self, name: str) -> psutil.Process:
        """The only one with this name."""
        found = self.children(name)
        assert len(found) == 1, found
        return found[0]

    def kill(self, name: str) -> None:
        os.kill(self.child(name).pid, signal.SIGKILL)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metrics(self) -> dict[str, float]:
        """Every sample, added up over the processes: ``name{labels}`` → value."""
        samples: defaultdict[str, float] = defaultdict(float)
        for port in self._ports:
            text = wait_until(lambda: scraped(port), f"metrics at port {port}")  # noqa: B023
            for line in text.splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    samples[name] += float(value)
        return samples

    def metric(self, stem: str) -> float:
        """Sum over the labels of one metric."""
        return sum(value for name, value in self.metrics().items() if name.split("{")[0] == stem)


def scraped(port: int) -> str:
    """Nothing, if the process is not up yet: after a kill its successor takes a while."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    except httpx.TransportError:
        return ""


def _flags(options: Mapping[str, str | int | float]) -> list[str]:
    return [_flag(name.replace("_", "-"), value) for name, value in options.items()]


def _flag(name: str, value: str | int | float) -> str:
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TOKENRELAY_")}

"""A request that kills every worker that claims it, among good ones: three workers die, and nobody else notices."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
import pytest
from redis import Redis

from tests.service.running import MODEL, RunningService, wait_until
from tokenrelay.service.embedded_valkey import url_of_running

NUM_GOOD = 24
POISON_TOKENS = 77  # a max_tokens that no other request has


class Executioner:
    """Watches the broker, and kills whoever claims the poison before it can compute anything of it."""

    def __init__(self, service: RunningService, url: str) -> None:
        self.victims: list[str] = []
        self.poison = ""
        self._service = service
        self._redis = Redis.from_url(url)
        self._stop = threading.Event()

    def watch(self) -> None:
        with self._redis.monitor() as monitor:  # type: ignore[no-untyped-call]
            while not self._stop.is_set():
                self._judge(monitor.next_command()["command"])

    def stop(self) -> None:
        self._stop.set()
        self._redis.ping()  # one command more, for the monitor to return

    def _judge(self, command: str) -> None:
        """``HSET …request:ID payload …`` tells which it is, ``HSET …request:ID … owner WORKER …`` who has it."""
        words = command.split(" ")
        if words[0] != "HSET" or ":request:" not in words[1]:
            return
        if f"max_tokens{chr(POISON_TOKENS)}" in command:
            self.poison = words[1].rpartition(":")[2]
        elif self.poison and words[1].endswith(self.poison) and (owner := re.search(r" owner (\S+) ", command)):
            self._kill(owner[1])

    def _kill(self, worker_id: str) -> None:
        for child in psutil.Process(self._service.process.pid).children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if worker_id in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)
                    self.victims.append(worker_id)


@contextmanager
def executioner(service: RunningService, url: str) -> Iterator[Executioner]:
    watching = Executioner(service, url)
    thread = threading.Thread(target=watching.watch)
    thread.start()
    yield watching
    watching.stop()
    thread.join(60)


def ask(client: openai.OpenAI, max_tokens: int, prompt: str = "The history of bread") -> str:
    extra = {"ignore_eos": True}
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
    )
    return answer.choices[0].text


@pytest.mark.long
def test_poison_among_good_requests(tmp_path: Path, tiny_model: Path) -> None:
    options: dict[str, str | int] = {"model": str(tiny_model), "served_model_name": MODEL, "kv_cache_mb": 64}
    with (
        RunningService(tmp_path, spare_workers=1, **options) as service,
        ThreadPoolExecutor(NUM_GOOD + 1) as pool,
        service.client() as client,
    ):
        url = url_of_running(tmp_path / "data")
        expected = ask(client, 200)
        with executioner(service, url) as watching:
            good: list[Future[str]] = [pool.submit(ask, client, 200) for _ in range(NUM_GOOD // 2)]
            poison = pool.submit(ask, client, POISON_TOKENS, "Once upon a time " * 60)  # which takes some steps
            good += [pool.submit(ask, client, 200) for _ in range(NUM_GOOD // 2)]
            with pytest.raises(openai.InternalServerError, match="lost with its worker 3 times"):
                poison.result()
            assert [future.result() for future in good] == [expected] * NUM_GOOD
        assert len(watching.victims) == 3
        shown = subprocess.run(
            [sys.executable, "-m", "tokenrelay", "dead", "show", watching.poison, "--data-dir", str(tmp_path / "data")],
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["attempts"] == 3
        wait_until(service.is_ready, "ready")
        assert ask(client, 200) == expected

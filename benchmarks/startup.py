"""Seconds from ``tokenrelay serve`` to readiness, and the memory it takes then: on a free port, in empty data folders.

``python benchmarks/startup.py --times 5 -- --model FOLDER``: what follows ``--`` is handed on. Linux only.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

_PROC = Path("/proc")


def main() -> None:
    """Starts the server so many times in turn, and prints each start, and the median and the spread of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("options", nargs="*", help="of tokenrelay serve, behind --")
    arguments = parser.parse_args()
    starts = []
    for _ in range(arguments.times):
        starts.append(started(arguments.options))
        print("ready after {:.2f} s; {:.0f} MB".format(*starts[-1]), flush=True)
    seconds, megabytes = zip(*starts, strict=True)
    print(f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), ", end="")
    print(f"{statistics.median(megabytes):.0f} MB ({min(megabytes):.0f} to {max(megabytes):.0f})")


def started(options: list[str]) -> tuple[float, float]:
    """Seconds to readiness, and the megabytes of all processes then."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        ours = ["--port", str(port), "--worker-metrics-port", "0", "--data-dir", f"{folder}/data"]
        command = [sys.executable, "-m", "tokenrelay", "serve", *ours, *options]
        start = time.perf_counter()
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _is_ready(port):
                if server.poll() is not None:
                    log.seek(0)
                    sys.exit(f"the server ended:\n{log.read()}")
                time.sleep(0.02)
            return time.perf_counter() - start, sum(map(_proportional_bytes, _family(server.pid))) / 1e6
        finally:
            server.terminate()
            server.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = (_PROC / str(pid) / "task").glob("*/children")
    pids = [int(child) for listed in children for child in listed.read_text().split()]
    return [pid, *(descendant for child in pids for descendant in _family(child))]


def _proportional_bytes(pid: int) -> int:
    """A process's share: pages of several count for each by a part."""
    rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main()

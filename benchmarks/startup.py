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

import psutil


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
            return time.perf_counter() - start, _bytes_of_family(server.pid) / 1e6
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


def _bytes_of_family(pid: int) -> int:
    """Of a process and all that descend from it; pages of several count for each by a part."""
    server = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [server, *server.children(recursive=True)])


if __name__ == "__main__":
    main()

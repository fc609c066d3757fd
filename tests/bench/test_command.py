"""``tokenrelay bench`` as a user meets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.service.api.conftest import in_flight
from tests.service.api.serving import PacedWorker, Server, wait_for, working
from tests.service.running import free_port
from tokenrelay.bench.cli import plotter
from tokenrelay.bench.run import command
from tokenrelay.service.cli import app

QUICK = ("--prompt-tokens", "8", "--output-tokens", "3", "--requests", "4")


async def run(*arguments: str) -> Result:
    """In a thread: the worker that answers runs in the test's event loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["bench", *arguments])


def shown(done: Result) -> str:
    """Without frames and line breaks."""
    return " ".join(f"{done.output} {done.exception}".replace("│", " ").replace("┃", " ").split())


@pytest.fixture
async def worker(running_server: Server) -> AsyncIterator[PacedWorker]:
    async with working(running_server) as worker:
        yield worker


async def test_two_targets_a_sweep_a_plot_and_records(
    running_server: Server, worker: PacedWorker, tmp_path: Path
) -> None:
    url, plot, records = running_server.base_url, tmp_path / "plot.png", tmp_path / "records.json"
    files = ("--plot", str(plot), "--json", str(records))
    done = await run(f"a={url}", f"b={url}/v1", "--clients", "1,2", "--rounds", "2", *QUICK, *files)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert [sorted(load["targets"]) for load in line["loads"]] == [["a", "b"]] * 2
    assert all(load["targets"][name]["requests"] == 4 for load in line["loads"] for name in "ab")
    recorded = [json.loads(record) for record in records.read_text().splitlines()]
    order = [(record["round"], record["workload"]["clients"], record["target"]) for record in recorded]
    assert order == [*((0, n, t) for n in (1, 2) for t in "ab"), *((1, n, t) for n in (1, 2) for t in "ba")]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(word in shown(done) for word in ("clients", "target", "output", "ttft", "gap"))


async def test_it_runs_as_a_process(running_server: Server, worker: PacedWorker) -> None:
    arguments = [sys.executable, "-m", "tokenrelay", "bench", running_server.base_url, "--api-key", "secret", *QUICK]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    line = json.loads(stdout)
    assert line["command"].startswith(f"tokenrelay bench {running_server.base_url}")
    assert line["loads"][0]["targets"].popitem()[1]["requests"] == 4
    assert b"secret" not in stdout


async def test_what_was_measured_before_a_failure_is_shown(running_server: Server, worker: PacedWorker) -> None:
    done = await run(running_server.base_url, "--clients", "1", *QUICK, "--prompt-tokens", "8,3000")
    assert done.exit_code != 0
    assert "400: " in str(done.exception)
    assert "8/3 tokens" in done.stderr


async def test_a_server_that_never_answers_is_a_failure(running_server: Server, worker: PacedWorker) -> None:
    worker.gate.clear()
    done = await run(running_server.base_url, "--clients", "1", *QUICK, "--timeout", "0.5")
    worker.gate.set()
    await asyncio.to_thread(wait_for, lambda: in_flight(running_server) == 0)
    assert done.exit_code != 0
    assert "no end of the answer within 0.5 s" in shown(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"http://127.0.0.1:{free_port()}"], "/v1/models"),
        (["somewhere"], "is no target"),
        (["--plot", "plot.pdf"], "must end with .png or .html"),
        (["--clients", "1,2", "--prompt-tokens", "1,2"], "only one of them may be a list"),
    ],
)
async def test_a_mistake_is_said(arguments: list[str], message: str) -> None:
    done = await run(*arguments)
    assert done.exit_code != 0
    assert message in shown(done)


def test_a_plot_without_matplotlib_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "tokenrelay.bench.plot", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'tokenrelay\[bench\]'"):
        plotter(Path("plot.png"))


@pytest.mark.parametrize("key", ["abc", "a b", "…", "'"])
def test_the_key_is_not_in_the_command(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(sys, "argv", ["", "bench", "n=exec:a b", "--api-key", key, f"--api-key={key}", "--rounds", "2"])
    assert command() == "tokenrelay bench 'n=exec:a b' --api-key … --api-key=… --rounds 2"

"""The arrows of the design hold: who may import whom, who reads the environment, what the API must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tokenrelay

ROOT = Path(tokenrelay.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
LAZY_BY_DESIGN = {  # `version` must not load torch, nor `bench` need matplotlib, nor a local model the hub's library
    *("service/cli.py", "service/eval_cli.py", "bench/cli.py", "model/weights/sources.py"),
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str, of: str) -> list[str]:
    files = [path for path in FILES if name(path).startswith(package)]
    assert files
    return [name(path) for path in files if any(i.startswith(of) for i in imports(path))]


def test_the_model_knows_no_service() -> None:
    assert importers("model/", of="tokenrelay.service") == []


def test_the_model_knows_no_http_and_no_broker() -> None:
    for library in ("redis", "fastapi", "starlette", "uvicorn", "prometheus_client"):
        assert importers("model/", of=library) == []


def test_computing_knows_no_deciding() -> None:
    assert importers("model/transformer/", of="tokenrelay.model.engine") == []


def test_the_scheduler_and_the_block_pool_are_plain_python() -> None:
    for file in ("scheduler", "block_pool", "request"):
        assert importers(f"model/engine/{file}", of="torch") == []
        assert importers(f"model/engine/{file}", of="time") == []


def test_the_two_processes_do_not_know_each_other() -> None:
    assert importers("service/api/", of="tokenrelay.service.worker") == []
    assert importers("service/worker/", of="tokenrelay.service.api") == []
    shared = [path for path in (ROOT / "service").glob("*.py") if path.name not in ("cli.py", "supervisor.py")]
    for path in shared:
        assert not any(i.startswith(("tokenrelay.service.api", "tokenrelay.service.worker")) for i in imports(path))


@pytest.mark.parametrize("package", ["access", "admission", "lifecycle", "streaming", "schemas", "assistant"])
def test_a_request_is_admitted_lives_and_is_streamed_without_its_protocol(package: str) -> None:
    for protocol in ("openai", "responses", "anthropic", "ollama"):
        assert importers(f"service/api/{package}/", of=f"tokenrelay.service.api.{protocol}.") == []


def test_the_benchmark_is_an_outsider() -> None:
    """It knows a server as any client would, and the API and the workers do not know it."""
    assert importers("bench/", of="tokenrelay.service") == importers("bench/", of="tokenrelay.model") == []
    assert importers("model/", of="tokenrelay.bench") == []
    assert importers("service/", of="tokenrelay.bench") == ["service/cli.py"]


def test_the_terminal_is_an_outsider() -> None:
    assert importers("terminal/", of="tokenrelay.service") == importers("terminal/", of="tokenrelay.model") == []
    assert importers("model/", of="tokenrelay.terminal") == []
    assert importers("service/", of="tokenrelay.terminal") == ["service/cli.py"]


def test_only_the_settings_read_the_environment() -> None:
    readers = [name(path) for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()]
    assert readers == ["service/settings.py"]


def test_nothing_unpickles() -> None:
    for library in ("pickle", "cloudpickle", "marshal", "dill", "shelve"):
        assert importers("", of=library) == []
    assert not any("torch.load" in path.read_text() for path in FILES)


def test_imports_stand_at_the_top() -> None:
    for path in FILES:
        for function in ast.walk(parsed(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and name(path) not in LAZY_BY_DESIGN:
                inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{name(path)}:{inner[0].lineno}"


def test_names_say_something() -> None:
    assert [name(path) for path in FILES if SAYS_NOTHING & set(path.with_suffix("").parts)] == []


def test_every_file_says_what_it_is_for() -> None:
    silent = [name(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_files_stay_small() -> None:
    assert [name(path) for path in FILES if len(path.read_text().splitlines()) > 300] == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tokenrelay.service.api.server", ("torch", "tokenrelay.bench")),
        ("tokenrelay.service.cli", ("torch", "matplotlib", "httpx", "tokenrelay.bench.run")),
        ("tokenrelay.bench.run", ("torch", "matplotlib", "httpx", "numpy")),
    ],
)
def test_what_a_process_does_not_load(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({set(unwanted)!r} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

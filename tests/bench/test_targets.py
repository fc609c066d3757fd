"""Targets: how they are named, and those that are a process."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tokenrelay.bench.figures import Bounds, Figures
from tokenrelay.bench.measured import TargetError
from tokenrelay.bench.targets import Access, Process, Server, distinct, target
from tokenrelay.bench.workload import Workload

# Answers each prompt with a token per 10 ms of a clock of its own, and writes down what it was asked.
LIBRARY = """
import json, sys
asked = json.load(sys.stdin)
json.dump(asked, open(sys.argv[1], "w"))
print("loading the model …")
n = asked["max_tokens"]
request = {"started": 1.0, "arrivals": [1.5 + i / 100 for i in range(n)], "ended": 2.0, "output_tokens": n}
print(json.dumps({"requests": [request | {"prompt_tokens": len(p)} for p in asked["prompts"]], "seconds": 2.0}))
"""
LOAD = Workload(clients=3, requests=5, prompt_tokens=7, output_tokens=9)


async def measured(command: str, workload: Workload = LOAD) -> tuple[Figures, int]:
    ended: list[None] = []
    figures, _ = await Process("library", command).measure(workload, Bounds(), lambda: ended.append(None))
    return figures, len(ended)


def python(code: str, *arguments: object) -> str:
    return shlex.join([sys.executable, "-c", code, *map(str, arguments)])


async def test_a_process_gets_the_workload_and_its_figures_are_ours(tmp_path: Path) -> None:
    figures, num_ended = await measured(python(LIBRARY, tmp_path / "asked"))
    asked = json.loads((tmp_path / "asked").read_text())
    assert (asked["clients"], asked["max_tokens"]) == (3, 9)
    assert [len(prompt) for prompt in asked["prompts"]] == [7] * 5
    assert [len(prompt) for prompt in asked["warm_up"]] == [7] * 3
    assert num_ended == figures["requests"] == 5
    assert figures["output_tokens_per_second"] == 5 * 9 / 2
    assert figures["ttft_p50_ms"] == pytest.approx(500)
    assert figures["gap_p50_ms"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "is no run"),
        ("print('{}')", "is no run: Object missing required field `requests`"),
    ],
)
async def test_a_process_that_fails_says_how(code: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        await measured(python(code))


@pytest.mark.parametrize("command", ["", "no-such-command --at all"])
async def test_a_command_that_is_not_there_is_told_at_once(command: str) -> None:
    with pytest.raises(TargetError, match="no such command"):
        await Process("library", command).prepare()


@pytest.mark.parametrize("workload", [Workload(rate=1.0), Workload(beside=1000)])
async def test_a_process_has_clients_only(workload: Workload) -> None:
    with pytest.raises(TargetError, match="--clients only"):
        await measured("true", workload)


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("http://127.0.0.1:8000", Server, "127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", Server, "127.0.0.1:8000"),
        ("https://there/?a=b", Server, "https://there/?a=b"),
        ("llama.cpp Q4=http://127.0.0.1:8000", Server, "llama.cpp Q4"),
        ("library=exec:python peer.py --a=b", Process, "library"),
    ],
)
def test_names(spec: str, kind: type, name: str) -> None:
    found = target(spec, Access())
    assert isinstance(found, kind)
    assert found.name == name


@pytest.mark.parametrize("spec", ["127.0.0.1:8000", "ftp://127.0.0.1", "name=", "http://"])
def test_what_is_no_target(spec: str) -> None:
    with pytest.raises(TargetError, match="is no target"):
        target(spec, Access())


def test_targets_are_told_apart() -> None:
    assert [t.name for t in distinct(["a=http://x", "b=http://x"], Access())] == ["a", "b"]
    with pytest.raises(TargetError, match="one name"):
        distinct(["http://x", "http://x/v1"], Access())

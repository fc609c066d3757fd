"""What the command line says to a newcomer, and to a mistake: one line, and an exit code that is not 0."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tokenrelay import __version__
from tokenrelay.service.settings import Settings


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenrelay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"COLUMNS": "200", "PATH": ""})


def test_help_names_every_command() -> None:
    shown = run("--help").stdout
    assert all(command in shown for command in ("serve", "api", "worker", "pull", "models", "version"))


def test_every_setting_is_an_option_of_serve() -> None:
    shown = run("serve", "--help").stdout
    assert [name for name in Settings.model_fields if f"--{name.replace('_', '-')}" not in shown] == []


def test_version_is_quick_and_needs_no_torch() -> None:
    assert run("version").stdout.strip() == run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["serve", "--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "max_num_batched_tokens (4)"),
        (["serve", "--device", "abacus"], "--device"),
        (["serve", "--dtype", "int8"], "int8 is not a dtype any more: set quantization to int8"),
        (["eval", "perplexity", "--quantization", "none,int3"], "'int3' is none of auto, none, int8"),
        (["eval", "perplexity", "--context", "8", "--stride", "8"], "--stride (8) must be below --context (8)"),
        (["worker"], "--redis-url is required"),
        (["pull", "no-such-model"], "no model 'no-such-model'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line(tmp_path: Path, smollm2_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--model", str(smollm2_path), "--data-dir", str(tmp_path), "--port", port)
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr

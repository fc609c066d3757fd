"""``tokenrelay complete``: a prompt in, its continuation out, and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.service.running import MODEL, RunningService, num_cancelled, wait_until
from tests.terminal.fake_server import FakeServer, fake_server
from tests.terminal.pseudo_terminal import CTRL_C, PseudoTerminal, environment

PROMPT = "The sun rises in the"
ENDLESS = ("--max-tokens", "1500", "--temperature", "0")  # where it may be sampled, one text in fifty ends at once


@pytest.fixture
def noting() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def complete(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenrelay", "complete", *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=100, env=environment())


def test_the_text_is_the_servers(service: RunningService) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    expected = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    options = ("--url", service.url, "--max-tokens", "8", "--temperature", "0")
    by_argument, by_pipe = complete(*PROMPT.split(), *options), complete(*options, given=f"{PROMPT}\n")
    assert by_argument.stdout == by_pipe.stdout == expected
    assert by_argument.returncode == by_pipe.returncode == 0
    assert by_argument.stderr == by_pipe.stderr == ""


def test_options_are_fields(noting: FakeServer) -> None:
    options = ("--temperature", "0.5", "--top-p", "0.9", "--seed", "7", "--stop", "a", "--stop", "b", "--model", "m")
    assert complete("Once", "--url", noting.url, *options).stdout == "Hello there."
    [body] = noting.bodies
    assert body == {
        **{"model": "m", "prompt": "Once", "stream": True, "max_tokens": 256},
        **{"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["a", "b"]},
    }


def test_mistakes_are_one_line_and_an_exit_code(noting: FakeServer) -> None:
    for arguments, code, message in (
        (["x", "--url", "http://127.0.0.1:9"], 3, "start one with: tokenrelay serve"),
        (["x", "--url", "elsewhere"], 1, "no URL of a server"),
        (["x", "--url", noting.url, "--model", "other"], 1, "no model 'other'"),
        (["x", "--url", noting.url, "--max-tokens", "0"], 2, "--max-tokens"),
    ):
        done = complete(*arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert (done.stdout, "Traceback" in done.stderr) == ("", False)


def test_without_a_prompt_it_does_not_wait_for_ever() -> None:
    with PseudoTerminal("complete") as terminal:
        terminal.read_until("pipe one in")
        assert terminal.exit_code() == 2


def test_ctrl_c_cancels_on_the_server(service: RunningService) -> None:
    before = num_cancelled(service)
    with PseudoTerminal("complete", PROMPT, "--url", service.url, *ENDLESS) as terminal:
        terminal.read_until(" ")
        terminal.type(CTRL_C)
        assert terminal.exit_code() == 130
    wait_until(lambda: num_cancelled(service) == before + 1, "cancelled on the server")


def test_a_reader_that_has_enough_ends_it(service: RunningService) -> None:
    before = num_cancelled(service)
    command = [sys.executable, "-m", "tokenrelay", "complete", PROMPT, "--url", service.url, *ENDLESS]
    read_end, write_end = os.pipe()
    with subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE, env=environment()) as process:
        os.close(write_end)
        assert os.read(read_end, 1)
        os.close(read_end)
        assert process.wait(60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""
    wait_until(lambda: num_cancelled(service) == before + 1, "cancelled on the server")

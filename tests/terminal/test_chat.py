"""``tokenrelay chat`` at a pseudo-terminal: before a server that only notes, and before the real service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from tests.service.running import LONG, MODEL, RunningService, num_cancelled, wait_until
from tests.terminal.cutting_proxy import CuttingProxy
from tests.terminal.fake_server import FakeServer, fake_server
from tests.terminal.pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal, environment
from tokenrelay.terminal.answer import Answer
from tokenrelay.terminal.server import Server

ANSWER = "Hello there."
QUESTION = "What is the capital of France?"


@pytest.fixture
def noting() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def roles(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_a_conversation_is_remembered_until_it_is_reset(noting: FakeServer) -> None:
    with PseudoTerminal("chat", "--url", noting.url, "--system", "Be brief.", "--temperature", "0.5") as terminal:
        terminal.read_until("> ")
        for question in ("first", "second"):
            terminal.enter(question)
            terminal.read_until(ANSWER)
            terminal.read_until("> ")
        terminal.enter("/reset")
        terminal.read_until("> ")
        terminal.enter("third")
        terminal.read_until(ANSWER)
        terminal.read_until("> ")
        terminal.enter("/system You are a pirate.")
        terminal.read_until("> ")
        terminal.enter("fourth")
        terminal.read_until(ANSWER)
        terminal.read_until("> ")
        terminal.enter("/exit")
        assert terminal.exit_code() == 0
    be_brief, said = ("system", "Be brief."), ("assistant", ANSWER)
    assert [roles(body) for body in noting.bodies] == [
        [be_brief, ("user", "first")],
        [be_brief, ("user", "first"), said, ("user", "second")],
        [be_brief, ("user", "third")],
        [("system", "You are a pirate."), ("user", "fourth")],
    ]
    assert all(body["temperature"] == 0.5 and body["stream"] for body in noting.bodies)
    assert "on_disconnect" not in noting.bodies[0]  # another server would refuse what it does not know


def test_help_unknown_commands_and_the_end(noting: FakeServer) -> None:
    with PseudoTerminal("chat", "--url", noting.url) as terminal:
        terminal.read_until("> ")
        terminal.enter("/help")
        assert "Ctrl-C" in terminal.read_until("> ")
        terminal.enter("/dance")
        terminal.read_until("no command /dance")
        terminal.read_until("> ")
        terminal.type(CTRL_C)
        terminal.read_until("Ctrl-D ends")
        terminal.read_until("> ")  # before that it would be no key yet
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
    assert noting.bodies == []


def test_a_failed_question_is_forgotten_and_the_chat_goes_on(noting: FakeServer) -> None:
    noting.error = {"message": "Too many requests are waiting.", "code": "server_is_overloaded"}
    with PseudoTerminal("chat", "--url", noting.url) as terminal:
        terminal.read_until("> ")
        terminal.enter("first")
        terminal.read_until("503: Too many requests are waiting.")
        noting.error = {}
        noting.cut = True
        terminal.enter("second")
        terminal.read_until("cannot be read on")
        noting.cut = False
        terminal.enter("third")
        terminal.read_until(ANSWER)
    assert roles(noting.bodies[2]) == [("user", "second"), ("assistant", ANSWER), ("user", "third")]


@pytest.mark.parametrize("variable", ["TOKENRELAY_API_KEY", "OPENAI_API_KEY"])
def test_the_key_comes_from_the_environment(noting: FakeServer, variable: str) -> None:
    command = [sys.executable, "-m", "tokenrelay", "chat", "--url", f"{noting.url}/v1"]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, env=environment(**{variable: "sk-1"}))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ANSWER}\n", "")
    assert noting.keys == ["Bearer sk-1"]


def test_ctrl_c_cancels_the_answer_on_the_server_and_not_the_chat(service: RunningService) -> None:
    before = num_cancelled(service)
    with PseudoTerminal("chat", "--url", service.url, "--temperature", "0") as terminal:
        terminal.read_until("> ")
        terminal.enter(LONG)
        terminal.read_until(" ")  # of the answer
        terminal.type(CTRL_C)
        terminal.read_until("(cancelled)")
        wait_until(lambda: num_cancelled(service) == before + 1, "cancelled on the server")
        terminal.read_until("> ")
        terminal.enter("/reset")
        terminal.enter(QUESTION)
        terminal.read_until("Paris")
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0


def test_even_an_answer_that_has_not_begun_is_cancelled(service: RunningService) -> None:
    """Ctrl-C comes when the request is sent, and before its name is known."""

    class Interrupted(Server):
        num_asked = 0

        def open(self, method: str, path: str, *arguments: Any, **options: Any) -> HTTPResponse:
            response = super().open(method, path, *arguments, **options)
            if path.endswith("completions"):
                self.num_asked += 1
                if self.num_asked == 1:
                    response.close()
                    raise KeyboardInterrupt
            return response

    before, server = num_cancelled(service), Interrupted(service.url)
    body = {"messages": [{"role": "user", "content": LONG}], "temperature": 0}
    with (
        pytest.raises(KeyboardInterrupt),
        Answer(server, server.model(), "/v1/chat/completions", body, print) as answer,
    ):
        list(answer)
    wait_until(lambda: num_cancelled(service) == before + 1, "cancelled on the server")


def test_an_answer_goes_on_where_the_connection_broke(service: RunningService) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "temperature": 0, "max_tokens": 24}
    undisturbed = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60).json()
    with (
        CuttingProxy(service.port, num_cuts=2, after_bytes=1500) as network,
        PseudoTerminal("chat", "--url", network.url, "--temperature", "0", "--max-tokens", "24") as terminal,
    ):
        terminal.read_until("> ")
        terminal.enter(LONG)
        shown = terminal.read_until("> ").replace("(the connection broke; reading on)\r\n", "").replace("\r\n", "\n")
        assert network.num_cuts_left == 0
    assert shown.strip() == undisturbed["choices"][0]["message"]["content"].strip()


def test_a_terminal_that_closes_cancels(service: RunningService) -> None:
    before = num_cancelled(service)
    with PseudoTerminal("chat", "--url", service.url, "--temperature", "0") as terminal:
        terminal.read_until("> ")
        terminal.enter(LONG)
        terminal.read_until(" ")
        terminal.process.terminate()
        assert terminal.exit_code() == 128 + 15
    wait_until(lambda: num_cancelled(service) == before + 1, "cancelled on the server")

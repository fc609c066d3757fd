"""npm's openai and Vercel's AI SDK talk to the whole service as if it were OpenAI's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.running import RunningService

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Node.js is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Those of the lock file, in this folder."""
    if not (HERE / "node_modules").exists():
        subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=HERE, check=True, timeout=600)


def run(script: str, service: RunningService, *arguments: str) -> Any:
    command = ["node", script, f"{service.url}/v1", MODEL, *arguments]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def cancelled(service: RunningService, id: str) -> bool:
    """Whether that is how the request ended, once it has."""
    with httpx.Client(base_url=service.url, timeout=60) as http:
        while (request := http.get(f"/v1/requests/{id}").json())["state"] != "finished":
            pass
    return bool(request["outcome"] == "cancelled")


class TestOpenai:
    def ask(self, service: RunningService, what: str) -> Any:
        return run("openai_client.mjs", service, what)

    def test_chat(self, service: RunningService) -> None:
        assert self.ask(service, "chat")["text"]

    def test_stream(self, service: RunningService) -> None:
        assert self.ask(service, "stream")["text"] == self.ask(service, "chat")["text"]

    def test_tools(self, service: RunningService) -> None:
        called = self.ask(service, "tools")
        assert (called["name"], list(called["arguments"]), called["reason"]) == ("weather", ["city"], "tool_calls")

    def test_schema(self, service: RunningService) -> None:
        assert list(self.ask(service, "schema")) == ["city"]

    def test_error(self, service: RunningService) -> None:
        told = {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "id": True}
        assert self.ask(service, "error") == told

    def test_cancel(self, service: RunningService) -> None:
        assert cancelled(service, self.ask(service, "cancel")["id"])

    def test_responses(self, service: RunningService) -> None:
        told = self.ask(service, "responses")
        assert told["text"]
        assert told["same"]
        assert told["items"] == ["user", "assistant", "user"]

    def test_responses_stream(self, service: RunningService) -> None:
        told = self.ask(service, "responses_stream")
        assert told["text"] == told["final"] == self.ask(service, "responses")["text"]

    def test_responses_tools(self, service: RunningService) -> None:
        called = self.ask(service, "responses_tools")
        assert (called["name"], list(called["arguments"])) == ("weather", ["city"])

    def test_responses_schema(self, service: RunningService) -> None:
        assert list(self.ask(service, "responses_schema")) == ["city"]

    def test_responses_error(self, service: RunningService) -> None:
        assert self.ask(service, "responses_error") == {"kind": "BadRequestError", "status": 400, "param": "truncation"}

    def test_responses_cancel(self, service: RunningService) -> None:
        assert self.ask(service, "responses_cancel") == {"begun": "queued", "cancelled": "cancelled"}


@pytest.mark.parametrize("provider", ["chat", "responses"])
class TestAiSdk:
    """Its provider for compatible servers, and that for OpenAI, which speaks Responses."""

    def ask(self, service: RunningService, provider: str, what: str) -> Any:
        return run("ai_sdk.mjs", service, provider, what)

    def test_chat(self, service: RunningService, provider: str) -> None:
        assert self.ask(service, provider, "chat")["text"]

    def test_stream(self, service: RunningService, provider: str) -> None:
        told = self.ask(service, provider, "stream")
        assert told["text"] == self.ask(service, provider, "chat")["text"]
        assert told["tokens"] > 0

    def test_tools(self, service: RunningService, provider: str) -> None:
        told = self.ask(service, provider, "tools")
        assert told["steps"] == 2
        assert all(list(arguments) == ["city"] for arguments in told["asked"])
        assert told["asked"]

    def test_schema(self, service: RunningService, provider: str) -> None:
        assert list(self.ask(service, provider, "schema")) == ["city"]

    def test_error(self, service: RunningService, provider: str) -> None:
        assert self.ask(service, provider, "error") == {"known": True, "status": 404, "retryable": False}

    def test_cancel(self, service: RunningService, provider: str) -> None:
        assert cancelled(service, self.ask(service, provider, "cancel")["id"])

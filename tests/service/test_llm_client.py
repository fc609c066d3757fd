"""Simon Willison's llm, as command and as library, over chat completions and over Responses, against the whole service:
chat, stream, tools, schema, error, end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from tests.service.running import MODEL, RunningService, wait_until
from tests.service.test_openai_client import SCHEMA
from tests.service.test_other_clients import imported

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUESTION = "What is the capital of France?"
ENDLESS = "List all the prime numbers."  # the model does, for thousands of tokens
GREEDY = {"temperature": 0, "max_tokens": 1500}
COMMAND = [sys.executable, "-m", "llm", "-m", "relay", "-o", "temperature", "0", "-o", "max_tokens", "1500"]


@pytest.fixture(params=["chat completions", "responses"])
def llm(
    request: pytest.FixtureRequest, service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """It knows the served model as ``relay``."""
    relay = {
        "model_id": "relay",
        "model_name": MODEL,
        "api_base": f"{service.url}/v1",
        "supports_schema": True,
        "supports_tools": True,
        "responses": request.param == "responses",
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([relay]))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return imported("llm")


def cancelled(service: RunningService) -> float:
    return service.metrics()[f'tokenrelay_requests_total{{model_name="{MODEL}",outcome="cancelled"}}']


@pytest.mark.usefixtures("llm")
class TestCommand:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)

    def test_chat_and_stream(self) -> None:
        streamed, whole = self.run(QUESTION), self.run("--no-stream", QUESTION)
        assert (streamed.returncode, streamed.stderr) == (0, "")
        assert streamed.stdout == whole.stdout
        assert "Paris" in whole.stdout

    def test_schema(self) -> None:
        validate(json.loads(self.run("--schema", json.dumps(SCHEMA), QUESTION).stdout), SCHEMA)

    def test_error(self) -> None:
        refused = self.run("-o", "max_tokens", "-1", QUESTION)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "invalid_request_error" in refused.stderr

    def test_cancel(self, service: RunningService) -> None:
        before, pipe = cancelled(service), subprocess.PIPE
        with subprocess.Popen([*COMMAND, ENDLESS], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as command:
            assert command.stdout is not None
            assert command.stdout.read(1)
            command.send_signal(signal.SIGINT)
        wait_until(lambda: cancelled(service) > before, "the request is cancelled")


class TestLibrary:
    @pytest.fixture
    def model(self, llm: Any) -> Any:
        return llm.get_model("relay")

    def test_chat_and_stream(self, model: Any) -> None:
        pieces = list(model.prompt(QUESTION, options=GREEDY))
        assert len(pieces) > 1
        assert "".join(pieces) == model.prompt(QUESTION, options=GREEDY, stream=False).text()

    @pytest.mark.parametrize("stream", [True, False])
    def test_tools(self, llm: Any, model: Any, stream: bool) -> None:
        """llm cannot force a call, but after some examples even a small model makes one."""
        asked = []

        def weather(city: str) -> str:
            asked.append(city)
            return "rain"

        examples = [message for city in ("Rome", "Oslo", "Bonn", "Bern", "Riga") for message in called(llm, city)]
        messages = [*examples, llm.user("What is the weather in Paris?")]
        chain = model.chain(messages=messages, tools=[weather], options=GREEDY, stream=stream)
        assert chain.text()
        assert asked == ["Paris"]
        assert len(list(chain.responses())) == 2

    def test_schema(self, model: Any) -> None:
        validate(json.loads(model.prompt(QUESTION, schema=SCHEMA, options=GREEDY).text()), SCHEMA)

    def test_error(self, model: Any) -> None:
        with pytest.raises(imported("openai").BadRequestError, match="tokens"):
            model.prompt(QUESTION, options={"max_tokens": -1}).text()

    def test_cancel(self, model: Any, service: RunningService) -> None:
        before, pieces = cancelled(service), iter(model.prompt(ENDLESS, options=GREEDY))
        next(pieces)
        pieces.close()
        wait_until(lambda: cancelled(service) > before, "the request is cancelled")


def called(llm: Any, city: str) -> list[Any]:
    """The question for the weather, the call it led to, and the call's result."""
    parts = imported("llm.parts")
    call = parts.ToolCallPart(name="weather", arguments={"city": city}, tool_call_id=city)
    result = parts.ToolResultPart(name="weather", output="sun", tool_call_id=city)
    return [llm.user(f"What is the weather in {city}?"), llm.assistant(call), llm.tool_message(result)]

"""A stranger's tool reads /openapi.json, and finds no request to which the service does not answer as it says there."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.api.serving import serving, working
from tests.service.running import RunningService
from tests.service.tiny_model import write_tiny_model
from tokenrelay.service.api.served_model import load_served_model
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

MODEL = "tiny"
DEADLINES = {"timeout", "X-Request-Timeout"}  # not sent: who gives no time is right to get a 504
CHECKS = (  # but not whether what the schema allows is accepted: fields contradict each other, and models have limits
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
# Its own list of refusals lacks 413: a list of too many items may also be a body of too many bytes.
CONFIG = 'checks.negative_data_rejection.expected-statuses = ["4xx", "5xx"]'


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", tokenizer_from=smollm2_path)


def _prepared(document: Any) -> Any:
    """The document, and the one model's name in it, or most requests would be for models that are not there."""
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        operation["parameters"] = [p for p in operation["parameters"] if p.get("name") not in DEADLINES]
        if "requestBody" in operation:
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            _prepare_body(document["components"]["schemas"][name])
    return document


def _prepare_body(schema: Any) -> None:
    properties = schema["properties"]
    if "model" in properties:
        properties["model"] = {"enum": [MODEL] if "model" in schema.get("required", ()) else [MODEL, None]}
    properties.pop("timeout", None)


def find_nothing(url: str, folder: Path, *options: str) -> int:
    """How many cases schemathesis tried. Fails if it found anything."""
    document = folder / "openapi.json"
    (folder / "schemathesis.toml").write_text(CONFIG)
    document.write_text(json.dumps(_prepared(httpx.get(f"{url}/openapi.json", timeout=100).json())))
    not_ready = ("--exclude-path=/readyz", "--exclude-path=/health")  # whose 503 is no fault
    given = [str(document), f"--url={url}", f"--checks={','.join(CHECKS)}", "--seed=1", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", *given, *not_ready, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    tried = re.search(r"(\d+) generated", done.stdout)
    assert tried, done.stdout[-2000:]
    return int(tried[1])


@pytest.mark.timeout(600)  # a busy machine takes a quarter of it
async def test_hundreds_of_cases(valkey: EmbeddedValkey, tiny_model: Path, tmp_path: Path) -> None:
    settings = Settings(redis_url=valkey.url, model=str(tiny_model), served_model_name=MODEL)
    with serving(settings, load_served_model(settings)) as server:
        async with working(server, pace=0.0, length=2):
            options = ("--phases=fuzzing", "--max-examples=10", "--workers=2")
            num_tried = await asyncio.to_thread(find_nothing, server.base_url, tmp_path, *options)
    assert num_tried > 200


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_five_thousand_cases(tiny_model: Path, tmp_path: Path) -> None:
    with RunningService(tmp_path, model=str(tiny_model), served_model_name=MODEL, log_level="warning") as service:
        options = ("--max-examples=80", "--no-shrink", "--suppress-health-check=all")
        assert find_nothing(service.url, tmp_path, *options) > 5000
        assert "Traceback" not in service.log

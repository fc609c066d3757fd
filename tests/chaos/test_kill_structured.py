"""A grammar's state dies with its worker, and is rebuilt from the tokens in the log."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import validate

from tests.service.running import MODEL, RunningService
from tests.tutorial.test_4_structured_output import PERSON

PERSONS: dict[str, Any] = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}


def begin(client: openai.OpenAI, seed: int) -> openai.Stream[Any]:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe three persons."}],
        max_tokens=300,
        temperature=1,
        seed=seed,
        stream=True,
        extra_body={"json_schema": PERSONS},
    )


def text(stream: openai.Stream[Any], num_chunks: int | None = None) -> str:
    """Of the next chunks, or of all that come."""
    chunks = (next(stream) for _ in range(num_chunks)) if num_chunks else stream
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.mark.long
def test_a_structured_text_survives_its_worker(tmp_path: Path, smollm2_path: Path) -> None:
    with RunningService(tmp_path, lease_seconds=1.5) as service, ThreadPoolExecutor(4) as pool:
        client = service.client()
        undisturbed = list(pool.map(lambda seed: text(begin(client, seed)), range(4)))
        streams = [begin(client, seed) for seed in range(4)]
        begun = list(pool.map(lambda stream: text(stream, 12), streams))
        service.kill("worker")
        rest = list(pool.map(text, streams))
        assert service.metric("tokenrelay_requests_resumed_total") == 4
    assert [first + last for first, last in zip(begun, rest, strict=True)] == undisturbed
    for whole in undisturbed:
        validate(json.loads(whole), PERSONS)

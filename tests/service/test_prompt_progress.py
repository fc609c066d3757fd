"""A long prompt's progress, from the engine to the client."""

from __future__ import annotations

import openai
import pytest

from tests.service.running import MODEL

PROMPT = "".join(f" {number} bottles of beer on the wall." for number in range(220))


@pytest.mark.long
def test_a_long_prompt_tells_how_far_it_is(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_progress": True},
    )
    chunks = list(stream)
    told = [progress for chunk in chunks if (progress := (chunk.model_extra or {}).get("prompt_progress"))]
    usage = chunks[-1].usage
    assert usage
    assert {progress["total"] for progress in told} == {usage.prompt_tokens}
    processed = [progress["processed"] for progress in told]
    assert len(processed) >= 2
    assert processed == sorted(set(processed))
    assert 0 < processed[-1] <= usage.prompt_tokens
    times = [progress["time_ms"] for progress in told]
    assert times == sorted(times)

"""A conversation that goes on past the context at constant memory, and says so. (StreamingLLM)"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.service.running import MODEL, RunningService

CONTEXT = 96


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_text_outgrows_the_context(tmp_path: Path, smollm2_path: Path) -> None:
    options = {"max_model_len": CONTEXT, "attention_sinks": 4, "max_num_batched_tokens": 64, "kv_cache_mb": 8}
    prompt = "Once upon a time, there was a little dragon who lived in a cave."
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    with RunningService(tmp_path, **options) as service:
        response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120)
        answer = response.raise_for_status().json()
        short = httpx.post(f"{service.url}/v1/completions", json=body | {"max_tokens": 60}, timeout=120).json()
        endless = httpx.post(
            f"{service.url}/v1/chat/completions",
            json={
                "model": MODEL,
                "messages": [{"role": "user", "content": "Hi"}],
                "temperature": 0,
                "ignore_eos": True,
            },
            timeout=120,
        ).json()
    assert response.headers["X-Attention-Sinks"] == "4"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 300
    assert usage["forgotten_tokens"] == usage["total_tokens"] - CONTEXT
    assert answer["choices"][0]["text"].startswith(short["choices"][0]["text"])
    assert "forgotten_tokens" not in short["usage"]
    assert endless["usage"]["completion_tokens"] == CONTEXT  # who asks for no length gets no endless answer
    print(answer["choices"][0]["text"][-300:])

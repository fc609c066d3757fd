"""What an operator sees of a running service."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import openai
import pytest

from tests.service.running import MODEL, RunningService, wait_until


def test_health(service: RunningService) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(service.url + path, timeout=60).status_code == 200
    assert "version" in httpx.get(f"{service.url}/version", timeout=60).json()
    assert httpx.get(f"{service.url}/docs", timeout=60).status_code == 200


def test_the_models_that_can_be_asked(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_outcomes_add_up(service: RunningService, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)

    def balanced() -> bool:
        accepted = service.metric("tokenrelay_requests_accepted_total")
        in_flight = service.metric("tokenrelay_requests_in_flight")
        return accepted > 0 and service.metric("tokenrelay_requests_total") == accepted - in_flight

    wait_until(balanced, "outcomes equal accepted minus in flight")


def test_the_metrics_operators_know(service: RunningService, client: openai.OpenAI) -> None:
    for _ in range(2):
        client.completions.create(
            model=MODEL, prompt=list(range(500, 540)), max_tokens=4, extra_body={"ignore_eos": True}
        )
    assert service.metric("tokenrelay_generation_tokens_total") >= 8
    assert service.metric("tokenrelay_prompt_tokens_total") >= 80
    assert service.metric("tokenrelay_prefix_cache_hits_total") >= 32
    assert service.metric("tokenrelay_time_to_first_token_seconds_count") >= 2
    assert service.metric("tokenrelay_inter_token_latency_seconds_count") >= 6
    assert service.metric("tokenrelay_request_queue_time_seconds_count") >= 2
    assert service.metric("tokenrelay_num_requests_waiting") == 0


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian package prometheus) is not installed")
def test_promtool_finds_no_fault(service: RunningService) -> None:
    for port in (service.port, service.worker_port):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).content
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
        assert checked.returncode == 0, checked.stderr.decode()


def test_prompts_are_not_in_the_log(service: RunningService, client: openai.OpenAI) -> None:
    canary = "xylophone-canary-8461"
    client.completions.create(model=MODEL, prompt=canary, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=canary * 9000)
    assert canary not in service.log

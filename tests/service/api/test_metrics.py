"""/metrics: what was accepted has ended or is in flight, whatever happened to it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service.api.conftest import accepted, ended, in_flight
from tests.service.api.serving import Server, wait_for, working
from tokenrelay.service.messages import Error


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    """Samples by name and labels, without the model's name."""
    text = (await http.get("/metrics")).text
    return {
        sample.name + "".join(f"{{{v}}}" for k, v in sorted(sample.labels.items()) if k != "model_name"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_kind_of_end_is_counted_once(server: Server, http: httpx.AsyncClient) -> None:
    async def ask(path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        return await http.post(path, json={"model": server.model, "prompt": "Once", **fields})

    before = await scrape(http)
    async with working(server):
        await asyncio.gather(ask(), ask(stream=True), ask(max_tokens=2), ask(n=3), ask(prompt=["a", "b"]))
        await ask(max_tokens=0, echo=True)  # has no first token, and counts none
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        await asyncio.gather(ask(), ask(stream=True))
    await asyncio.gather(ask(n=0), ask(model="other"), ask(temperature=-1), ask(tools=[{}]))
    samples = {name: value - before.get(name, 0) for name, value in (await scrape(http)).items()}
    outcomes = {
        name: value for name, value in samples.items() if name.startswith("tokenrelay_requests_total{") and value
    }
    assert outcomes == {
        "tokenrelay_requests_total{stop}": 5,
        "tokenrelay_requests_total{length}": 2,
        "tokenrelay_requests_total{worker_lost}": 2,
    }
    assert samples["tokenrelay_requests_accepted_total"] == 9
    assert samples["tokenrelay_requests_in_flight"] == 0
    assert samples["tokenrelay_requests_refused_total{model_not_found}"] == 1
    assert samples["tokenrelay_requests_refused_total{invalid_value}"] == 2
    assert samples["tokenrelay_generation_tokens_total"] == 4 * 8 + 2 + 3 * 8 + 2 * 2
    assert samples["tokenrelay_time_to_first_token_seconds_count"] == 8
    assert samples["tokenrelay_e2e_request_latency_seconds_count"] == 9
    assert samples["tokenrelay_request_generation_tokens_sum"] == samples["tokenrelay_generation_tokens_total"]


async def test_the_sum_holds_at_every_moment_of_a_crowd(server: Server, http: httpx.AsyncClient) -> None:
    """Some finish, some fail and some hang up; the books balance throughout, not only at the end."""

    async def ask(number: int) -> None:
        fields = {"model": server.model, "prompt": "Once", "stream": number % 2 == 0}
        async with http.stream("POST", "/v1/completions", json=fields) as response:
            if number % 3:
                await response.aread()

    async with working(server, pace=0.005):
        crowd = asyncio.gather(*map(ask, range(30)))
        while not crowd.done():
            samples = await scrape(http)
            total = sum(value for name, value in samples.items() if name.startswith("tokenrelay_requests_total{"))
            assert total == samples["tokenrelay_requests_accepted_total"] - samples["tokenrelay_requests_in_flight"]
        await crowd
        await asyncio.to_thread(wait_for, lambda: in_flight(server) == 0)
    assert ended(server) == accepted(server)


async def test_the_queue_is_measured(server: Server, http: httpx.AsyncClient) -> None:
    name = "tokenrelay_num_requests_waiting"
    asking = asyncio.create_task(http.post("/v1/completions", json={"model": server.model, "prompt": "Once"}))
    async with asyncio.timeout(60):
        while (await scrape(http))[name] != 1:
            pass
    async with working(server):
        await asking

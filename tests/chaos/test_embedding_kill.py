"""A worker is killed over half of a request's embeddings: the next one computes the rest, to the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.running import MODEL, RunningService, wait_until

MAX_TRIES = 6  # what the metrics tell is up to a second old
INPUTS = [[(7 * i + 3 * j) % 2000 + 3 for j in range(100 + 4 * i)] for i in range(100)]


@pytest.mark.timeout(300)
def test_a_killed_workers_embeddings_are_computed_by_the_next(tiny_service: RunningService) -> None:
    body = {"model": MODEL, "input": INPUTS, "encoding_format": "base64"}
    with httpx.Client(base_url=tiny_service.url, timeout=120) as http, ThreadPoolExecutor(1) as threads:
        undisturbed = http.post("/v1/embeddings", json=body).json()
        assert len(undisturbed["data"]) == len(INPUTS)
        for _ in range(MAX_TRIES):
            disturbed = threads.submit(http.post, "/v1/embeddings", json=body)
            wait_until(lambda: some_are_computed(tiny_service) or disturbed.done(), "some are being computed")  # noqa: B023
            tiny_service.kill("worker")
            answer = disturbed.result()
            assert answer.json() == undisturbed
            status = http.get(f"/v1/requests/{answer.headers['x-response-id']}").json()
            wait_until(lambda: has_all_workers(tiny_service), "as before", 60)
            if status["attempts"] > 1:
                return
    raise AssertionError("the kill came too late every time")


def has_all_workers(service: RunningService) -> bool:
    return len(service.children("spare")) == 1 == len(service.children("worker"))


def some_are_computed(service: RunningService) -> bool:
    return 0 < service.metric("tokenrelay_num_requests_running") < len(INPUTS)

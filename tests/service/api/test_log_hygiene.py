"""What a client says stays between it and the model: no prompt and no key in logs, metrics or errors."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.service.api.keyed import KeyFile, bearer
from tests.service.api.serving import JSON, Endpoint, api_process, serving, working
from tests.service.running import RunningService
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.messages import Error
from tokenrelay.service.settings import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def canary() -> str:
    return f"canary{uuid.uuid4().hex}"


async def every_path(http: httpx.AsyncClient, server: Endpoint, prompt: str) -> list[httpx.Response]:
    """Answers and refusals of all kinds to a client that says ``prompt`` wherever something can be said."""

    async def ask(path: str = COMPLETIONS, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": server.model, **({"prompt": prompt} if path == COMPLETIONS else {}), **fields}
        return await http.post(path, json=body, headers=headers)

    message = {"role": "user", "content": prompt}
    async with working(server):
        answers = [
            await ask(),
            await ask(stream=True),
            await ask(CHAT, messages=[message], user=prompt, metadata={"a": prompt}, stop=[prompt]),
            await ask(headers={"Idempotency-Key": "once"}),
            await ask(headers={"Idempotency-Key": "once"}, seed=1),
        ]
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        answers += [await ask(), await ask(stream=True)]
    answers += [
        await ask(timeout=0.05),
        await ask(max_tokens=10**9),
        await ask(temperature=prompt),
        await ask(response_format={"type": prompt}),
        await ask(CHAT, messages=[{"role": prompt, "content": prompt}]),
        await ask(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": prompt}}]}]),
        await ask(prompt=[[prompt]]),
        await ask(prompt=[prompt] * 1000),
        await ask(grammar="root ::= nothing"),  # an error in a grammar tells where it is, to who wrote it
        await ask(json_schema={"type": "text"}),
        await http.post(COMPLETIONS, content=f'{{"prompt": "{prompt}'.encode(), headers=JSON),
        await http.post(COMPLETIONS, content=prompt.encode(), headers={"content-type": "text/plain"}),
        await http.post(COMPLETIONS, content=prompt.encode() * 200_000, headers=JSON),
        await http.post("/v1/messages", json={"model": server.model, "max_tokens": prompt, "messages": [message]}),
        await http.get("/v1/models", headers=bearer(prompt)),
    ]
    with pytest.raises(httpx.TimeoutException):  # a client that goes away
        await http.post(COMPLETIONS, json={"model": server.model, "prompt": prompt}, timeout=0.2)
    return answers


async def test_no_key_and_no_prompt_in_logs_metrics_errors_or_the_broker(
    api_settings: Settings,
    served_model: ServedModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file, prompt = KeyFile(tmp_path / "keys.jsonl"), canary()
    secret, operator = file.create("alice", requests_per_minute=1000), file.create("operator", operator=True)
    options = {"api_keys_file": str(file.path), "served_model_name": served_model.name, "log_level": "debug"}
    settings = api_settings.model_copy(update=options)
    async with (
        api_process(settings, served_model.name) as (_, server),
        httpx.AsyncClient(base_url=server.base_url, timeout=60, headers=bearer(secret)) as http,
    ):
        answers = await every_path(http, server, prompt)
        metrics = (await http.get("/metrics", headers=bearer(operator))).text
    statuses = {answer.status_code for answer in answers}
    assert statuses >= {200, 400, 401, 413, 415, 422, 500, 504}
    said = capfd.readouterr()
    errors = "".join(answer.text for answer in answers if answer.status_code != 200)
    for text in (said.out, said.err, metrics, errors, file.path.read_text()):
        assert prompt not in text
        assert secret not in text
        assert operator not in text
    async with Redis.from_url(api_settings.redis_url) as redis:
        everything = [await redis.dump(key) async for key in redis.scan_iter()]
    assert everything
    assert not any(secret.encode() in value for value in everything if value)


async def test_prompts_are_logged_where_a_setting_says_so(api_settings: Settings, served_model: ServedModel) -> None:
    prompt = canary()
    with (
        capture_logs() as logged,
        serving(api_settings.model_copy(update={"log_prompts": True}), served_model) as server,
    ):
        async with working(server), httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
            answer = await http.post(COMPLETIONS, json={"model": server.model, "prompt": [prompt, "Once"]})
    [line] = [line for line in logged if line["event"] == "prompt"]
    assert (line["tenant"], line["prompts"]) == ("default", [prompt, "Once"])
    assert line["request"] in answer.headers["x-response-id"]


def test_the_worker_and_the_supervisor_say_nothing_of_prompts_either(service: RunningService) -> None:
    prompt = canary()
    with httpx.Client(base_url=service.url, timeout=60) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        for fields in ({}, {"grammar": f'root ::= "{prompt}"'}, {"prompt_logprobs": 1}, {"timeout": 0.01}):
            http.post(COMPLETIONS, json={"model": model, "prompt": prompt, "max_tokens": 4, **fields})
    assert prompt not in service.log
    assert prompt not in json.dumps(service.metrics())

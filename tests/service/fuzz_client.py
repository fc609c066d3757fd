"""Sends fuzzed requests over many connections at once, and judges every answer by what the API promises."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from tests.service.fuzz_requests import FuzzedRequest, fuzzed_request

CONNECTIONS = 32
SECONDS = 60.0  # for one answer: far longer than any takes, so that what hangs is found
LEFT, FAULT = "left", "fault"  # instead of a status: the client closed its connection early; a promise is broken

FIELDS = ("data: ", "id: ", "event: ", "retry: ", ":")  # of server-sent events


class BrokenPromise(Exception):
    """An answer is not what the API promises; the message says how."""


@dataclass(slots=True)
class Tally:
    """What became of the requests: how many ended how, and each fault with the request that it answers."""

    outcomes: Counter[str] = field(default_factory=Counter)  # by status, the codes of errors with it
    faults: list[str] = field(default_factory=list)

    def note(self, request: FuzzedRequest, outcome: str, fault: str = "") -> None:
        self.outcomes[outcome] += 1
        if fault:
            self.faults.append(f"{fault}\n  of fuzzed_request({request.seed}, model): {request}")


async def send_all(url: str, model: str, seeds: Iterable[int]) -> Tally:
    """Send the request of each seed."""
    tally, waiting = Tally(), iter(seeds)
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=SECONDS) as client:

        async def connection() -> None:
            for seed in waiting:
                await _send(client, fuzzed_request(seed, model), tally)

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return tally


async def _send(client: httpx.AsyncClient, request: FuzzedRequest, tally: Tally) -> None:
    outcome, fault = LEFT, ""
    with anyio.move_on_after(
        request.leaves_after_seconds
    ):  # httpx's pool survives anyio's cancellations, not asyncio's
        try:
            with anyio.fail_after(SECONDS):
                outcome = await _outcome(client, request)
        except BrokenPromise as broken:
            outcome, fault = FAULT, str(broken)
        except (httpx.TransportError, TimeoutError) as error:
            outcome, fault = FAULT, f"no whole answer: {error!r}"
    tally.note(request, outcome, fault)


async def _outcome(client: httpx.AsyncClient, request: FuzzedRequest) -> str:
    """The status of an answer that keeps every promise. Raises BrokenPromise."""
    async with client.stream("POST", request.route, content=request.content, headers=request.headers) as response:
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            if len(lines) == request.leaves_after_lines:
                return LEFT
    if response.status_code != 200:
        return f"{response.status_code} {_refusal(request, response, json.loads(''.join(lines)))}"
    if response.headers["content-type"].startswith("text/event-stream"):
        return f"200 {_ending_of_stream(request, lines)}"
    return f"200 {_whole_answer(request, json.loads(''.join(lines)))}"


def _refusal(request: FuzzedRequest, response: httpx.Response, body: Any) -> str:
    """The code of an error: the client's fault, or its deadline, or a passing shortage that says when to try again."""
    status, code = response.status_code, _error_code(body)
    shortage = status == 503 and "retry-after" in response.headers
    too_late = request.has_deadline and code == "deadline_exceeded"
    _require(400 <= status < 500 or shortage or too_late, f"status {status}: {body}")
    return code


def _error_code(body: Any) -> str:
    """Of an error in OpenAI's shape."""
    _require(list(body) == ["error"], f"not an error's shape: {body}")
    error = body["error"]
    _require(set(error) == {"message", "type", "param", "code"}, f"not an error's fields: {error}")
    _require(isinstance(error["message"], str) and len(error["message"]) > 10, f"says nothing: {error}")
    _require(error["param"] is None or isinstance(error["param"], str), f"names no parameter: {error}")
    return str(error["code"])


def _whole_answer(request: FuzzedRequest, answer: Any) -> str:
    choices = answer["choices"]
    _require([c["index"] for c in choices] == list(range(_num_choices(request.body))), f"choices: {choices}")
    for choice in choices:
        _require(choice["finish_reason"] in ("stop", "length", "tool_calls"), f"finish_reason: {choice}")
        _require_stopped(request.body, choice["text"] if "text" in choice else choice["message"]["content"])
    _require_plausible(request.body, answer["usage"])
    return "answered"


def _ending_of_stream(request: FuzzedRequest, lines: list[str]) -> str:
    """Exactly one finish_reason per choice, or one error object; then [DONE]."""
    events = list(_events(lines))
    errors = [event for event in events if "error" in event]
    if errors:
        _require(events[-1:] == errors, f"an error, and more: {events[-3:]}")
        code = _error_code(errors[0])
        too_late = request.has_deadline and code == "deadline_exceeded"
        _require(errors[0]["error"]["type"] == "invalid_request_error" or too_late, f"the server's error: {errors}")
        return code
    ends = [choice["index"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    _require(sorted(ends) == list(range(_num_choices(request.body))), f"finish_reasons of choices {ends}")
    usages = [event["usage"] for event in events if event.get("usage")]
    wanted = bool((request.body.get("stream_options") or {}).get("include_usage"))
    _require(len(usages) == wanted, f"{len(usages)} usages")
    for usage in usages:
        _require_plausible(request.body, usage)
    return "streamed"


def _events(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream's events. Raises BrokenPromise if [DONE] is not the last and only one."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    _require(all(line.startswith(FIELDS) or not line for line in lines), f"not events: {lines}")
    _require(data[-1:] == ["[DONE]"] and data.count("[DONE]") == 1, f"no end: {data[-3:]}")
    return map(json.loads, data[:-1])


def _require_stopped(body: dict[str, Any], text: str | None) -> None:
    """No stop string is in the text, unless it may be."""
    if body.get("include_stop_str_in_output") or body.get("echo") or body.get("min_tokens"):
        return
    stop = body.get("stop") or []
    found = [string for string in ([stop] if isinstance(stop, str) else stop) if string in (text or "")]
    _require(not found, f"{found} in {text!r}")


def _num_choices(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return (body.get("n") or 1) * (len(prompt) if several and prompt else 1)


def _require_plausible(body: dict[str, Any], usage: Any) -> None:
    generated = _num_choices(body) * (body.get("best_of") or body.get("n") or 1) // (body.get("n") or 1)
    limit = body.get("max_tokens") if body.get("max_tokens") is not None else body.get("max_completion_tokens")
    _require(usage["prompt_tokens"] > 0, f"usage: {usage}")
    _require(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"usage: {usage}")
    _require(limit is None or usage["completion_tokens"] <= limit * generated, f"more than {limit} tokens: {usage}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise BrokenPromise(otherwise[:2000])

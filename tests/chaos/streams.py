"""What a client sees of a stream, over any number of connections: text, token ids, indexes and pauses."""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, connect_sse

from tests.service.running import MODEL

Body = dict[str, Any]


@dataclass
class Choice:
    """All that was said of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    finish_reason: str | None = None

    def take(self, told: Body) -> None:
        """The part of a chunk that is about it, of either route."""
        assert self.finish_reason is None, "a choice went on behind its end"
        self.text += told["text"] if "text" in told else told["delta"].get("content") or ""
        self.token_ids += told.get("token_ids") or []
        for name, values in (told.get("logprobs") or {}).items():
            self.logprobs.setdefault(name, []).extend(values or [])
        self.finish_reason = told["finish_reason"]


class Recording:
    """One request as its client sees it. No event may be missing or come twice: ids are consecutive."""

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self.last_id = "0"
        self.choices: defaultdict[int, Choice] = defaultdict(Choice)
        self.arrivals: list[float] = []  # of chunks, Unix time
        self.error: Body = {}
        self.done = False

    def take(self, event: ServerSentEvent) -> None:
        assert not self.done, "a stream went on behind its end"
        self.done = event.data == "[DONE]"
        if self.done:
            return
        chunk = json.loads(event.data)
        if "error" in chunk:
            self.error = chunk["error"]
            return
        assert is_next(self.last_id, event.id), f"{event.id} came after {self.last_id}"
        self.request_id, self.last_id = chunk["id"], event.id
        self.arrivals.append(time.time())
        for told in chunk["choices"]:
            self.choices[told["index"]].take(told)

    @property
    def num_chunks(self) -> int:
        return len(self.arrivals)

    @property
    def text(self) -> str:
        """Of the only choice."""
        assert self.choices.keys() <= {0}
        return self.choices[0].text

    @property
    def longest_pause(self) -> float:
        """Seconds between two chunks."""
        return max((after - before for before, after in pairwise(self.arrivals)), default=0.0)

    def first_arrival_after(self, moment: float) -> float | None:
        return next((arrival for arrival in self.arrivals if arrival > moment), None)

    def assert_whole(self) -> None:
        """It ended as a stream must: every choice with its reason, no error, then [DONE]."""
        assert self.done
        assert not self.error, self.error
        assert self.choices
        assert all(choice.finish_reason for choice in self.choices.values())

    def is_that_of(self, undisturbed: Recording) -> bool:
        """Whether not only the text is, but also the ids, reasons and log probabilities."""
        return self.choices == undisturbed.choices


def is_next(before: str, now: str) -> bool:
    """``7`` is followed by ``8`` or ``8.1``, and ``8.1`` by ``8.2`` or ``8``; of several prompts one goes on."""
    parts = now.split(",")
    known = before.split(",") if before != "0" else ["0"] * len(parts)
    moves = [(_position(a), _position(b)) for a, b in zip(known, parts, strict=True) if a != b]
    return len(moves) == 1 and moves[0][1] in (
        (moves[0][0][0] + 1, 0),
        (moves[0][0][0], moves[0][0][1] + 1),
    )


def _position(part: str) -> tuple[int, int]:
    """Whole events seen, and chunks of the one behind them: ``8.1`` is 7 and 1."""
    index, _, num_chunks = part.partition(".")
    return (int(index) - 1, int(num_chunks)) if num_chunks else (int(index), 0)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(http: httpx.Client, body: Body, recording: Recording | None = None, key: str = "") -> Recording:
    """Ask, and read until the end or until the connection breaks. Raises HTTPStatusError when refused.

    With the token ids every event has a chunk, also those that have no text to show yet.
    """
    recording = recording or Recording()
    body = {"model": MODEL, "ignore_eos": True, "stream": True, "return_token_ids": True, **body}
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    _take_all(recording, http, "POST", url, json=body, headers={"Idempotency-Key": key} if key else {})
    return recording


def read_rest(http: httpx.Client, recording: Recording) -> None:
    """Read on where the connection broke, as a browser would."""
    url, headers = resumption(recording)
    _take_all(recording, http, "GET", url, headers=headers)


def resumption(recording: Recording) -> tuple[str, dict[str, str]]:
    """Path and headers of the request for the rest."""
    return f"/v1/requests/{recording.request_id}/stream", {"Last-Event-ID": recording.last_id}


def read_whatever_happens(http: httpx.Client, body: Body, recording: Recording | None = None) -> Recording:
    """As a robust client: resumes what broke, sends again what was refused for now, under one idempotency key."""
    recording, key = recording or Recording(), uuid.uuid4().hex
    while not recording.done:
        try:
            if recording.request_id:
                read_rest(http, recording)
            else:
                read(http, body, recording, key)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 503:
                raise
            time.sleep(float(error.response.headers["retry-after"]))  # it says when to come back
    return recording


def read_all(http: httpx.Client, bodies: Sequence[Body]) -> list[Recording]:
    """All at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: read(http, body), bodies))


def read_all_while(
    http: httpx.Client, bodies: Sequence[Body], disturb: Callable[[Sequence[Recording]], None]
) -> list[Recording]:
    """All at once, while ``disturb`` sees what has come so far."""
    recordings = [Recording() for _ in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        reading = [pool.submit(read, http, *pair) for pair in zip(bodies, recordings, strict=True)]
        disturb(recordings)
        return [future.result() for future in reading]


def have_begun(recordings: Iterable[Recording], num_chunks: int = 1) -> bool:
    return all(recording.num_chunks >= num_chunks for recording in recordings)


def _take_all(recording: Recording, http: httpx.Client, method: str, url: str, **request: Any) -> None:
    with suppress(httpx.TransportError), connect_sse(http, method, url, **request) as source:
        if source.response.is_error:
            source.response.read()
            source.response.raise_for_status()
        for event in source.iter_sse():
            recording.take(event)


# --- what to ask ------------------------------------------------------------------------------------------------------

PROMPTS = [
    *("The history of bread begins", "In the deep forest there lived", "def fibonacci(n):", "Dear Sir or Madam,"),
    *("One, two, three, four,", "Once upon a time", "The capital of France is", "To make a good soup, you"),
]
PERSON: Body = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"enum": ["tea", "coffee"]},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def mixed_requests(number: int, num_tokens: int) -> list[Body]:
    """Greedy and seeded by turns; of every eight one has two choices, log probabilities, stop strings, a schema."""
    return [_request(i, num_tokens) for i in range(number)]


def _request(i: int, num_tokens: int) -> Body:
    prompt = f"{PROMPTS[(i // 8 + i) % 8]}"
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": i % 2, "seed": i}
    extras: dict[int, Body] = {
        3: {"n": 2},
        4: {"logprobs": 2},
        5: {"stop": [" the", "\n\n"], "ignore_eos": False, "max_tokens": 2 * num_tokens},
        6: {"repetition_penalty": 1.2, "logprobs": 0, "temperature": 0.7},
    }
    if i % 8 == 7:
        question = [{"role": "user", "content": f"Describe person number {i}."}]
        schema = {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}
        return {"messages": question, "max_tokens": 150, "temperature": 1, "seed": i, "json_schema": schema}
    return body | extras.get(i % 8, {})

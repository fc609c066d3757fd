"""What openai's package says an event of a stream is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

Event = dict[str, Any]

_UNION, _ = get_args(ResponseStreamEvent)
_KINDS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(_UNION)
}
UNKNOWN = {"obfuscation", "name"}  # of the document only: a call's name, which the package has lost with its version 3
ENDS = ("response.completed", "response.incomplete", "response.failed", "error")


def require_valid(event: Event) -> None:
    """Its class has all its fields, of the right types, and knows all of them."""
    kind = _KINDS[event["type"]]
    kind.model_validate(event)
    assert event.keys() - UNKNOWN <= kind.model_fields.keys(), event["type"]
    if "response" in event:
        assert event["response"].keys() <= Response.model_fields.keys() | {"store"}


def require_whole(events: list[Event]) -> None:
    """A stream from its first to its last event, in an order that makes sense."""
    for event in events:
        require_valid(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert [event["type"] for event in events if event["type"] in ENDS] == [events[-1]["type"]]
    assert events[0]["response"]["output"] == []
    _require_told_in_full(events)


def _require_told_in_full(events: list[Event]) -> None:
    """What the deltas say is what is said to be done, item by item, and what the response consists of."""
    output = events[-1].get("response", {}).get("output", [])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output[: len(done)]
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert {event.get("item_id") or event["item"]["id"] for event in own} == {item["id"]}
        assert deltas(own) == _text(item)


def deltas(events: Iterable[Event]) -> str:
    return "".join(event["delta"] for event in events if event["type"].endswith(".delta"))


def _text(item: Event) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])

"""A conversation as the Responses API keeps it: a list of items, each complete and with an id of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenrelay.service.api.responses.items import (
    Content,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    ItemReference,
    MessageItem,
    ReasoningInputItem,
    text_of,
)

Item = dict[str, Any]
Messages = list[dict[str, Any]]
_RESPONSE_ID = re.compile(r"resp_([0-9a-f]{32})")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_[0-9a-z]+")


def relay_id_of_response(response_id: str) -> str | None:
    match = _RESPONSE_ID.fullmatch(response_id)
    return match[1] if match else None


def relay_id_of_item(item_id: str) -> str | None:
    """Of the response that the item belongs to."""
    match = _ITEM_ID.fullmatch(item_id)
    return match[1] if match else None


def as_kept(given: str | Sequence[InputItem], relay_id: str, referenced: Mapping[str, Item]) -> list[Item]:
    """What the client sent, in full. ``referenced`` are the items that references stand for, by id."""
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    return [
        referenced[item.id] if isinstance(item, ItemReference) else _complete(item, f"{relay_id}_i{number}")
        for number, item in enumerate(given)
    ]


def _complete(item: InputItem, name: str) -> Item:
    fields: Item = {"type": item.type, "status": getattr(item, "status", None) or "completed"}
    if isinstance(item, MessageItem):
        kind = "output_text" if item.role == "assistant" else "input_text"
        return fields | {"id": item.id or f"msg_{name}", "role": item.role, "content": _parts(item.content, kind)}
    if isinstance(item, FunctionCallItem):
        call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        return fields | {"id": item.id or f"fc_{name}", **call}
    if isinstance(item, FunctionCallOutputItem):
        return fields | {"id": item.id or f"fco_{name}", "call_id": item.call_id, "output": text_of(item.output)}
    assert isinstance(item, ReasoningInputItem)
    parts = _parts(item.content or [], "reasoning_text")
    return fields | {"id": item.id or f"rs_{name}", "summary": [], "content": parts, "encrypted_content": None}


def _parts(content: Content, kind: str) -> list[Item]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    more: Item = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": text, **more} for text in texts]


def as_messages(items: Sequence[Item]) -> Messages:
    """The same for a chat template: thoughts, an answer and calls in a row are one message."""
    messages: Messages = []
    for item in items:
        _ADD[item["type"]](item, messages)
    return messages


def _add_message(item: Item, messages: Messages) -> None:
    content = [{"type": "text", "text": part["text"]} for part in item["content"]]
    told = content[0]["text"] if len(content) == 1 else content or ""
    if item["role"] == "assistant" and messages and messages[-1].keys() == {"role", "reasoning_content"}:
        messages[-1]["content"] = told
    else:
        messages.append({"role": item["role"], "content": told})


def _add_call(item: Item, messages: Messages) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    function = {"name": item["name"], "arguments": item["arguments"]}
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": item["call_id"], "type": "function", "function": function})


def _add_output(item: Item, messages: Messages) -> None:
    messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})


def _add_thoughts(item: Item, messages: Messages) -> None:
    thoughts = "".join(part["text"] for part in item["content"])
    if thoughts:
        messages.append({"role": "assistant", "reasoning_content": thoughts})


_ADD: dict[str, Callable[[Item, Messages], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "reasoning": _add_thoughts,
}

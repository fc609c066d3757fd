"""OpenAI's Responses API: make a response, and read, follow, cancel or delete a stored one by its id, anywhere."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response as HttpResponse

from tokenrelay.service.api.admission.room import require_room
from tokenrelay.service.api.answering import headers_of
from tokenrelay.service.api.dependencies import Api, RelayId, TenantDep
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.lifecycle.choices import Choices
from tokenrelay.service.api.lifecycle.cursor import Cursor
from tokenrelay.service.api.lifecycle.generation import FAREWELL_SECONDS
from tokenrelay.service.api.openapi.operation import ERRORS, Responses, documented, events, header
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.responses.conversation import relay_id_of_response
from tokenrelay.service.api.responses.creation import JSON, create, stream
from tokenrelay.service.api.responses.event_sequence import PREFIX
from tokenrelay.service.api.responses.events import RESPONSE_EVENTS
from tokenrelay.service.api.responses.objects import ItemList, Response, ResponseDeleted
from tokenrelay.service.api.responses.request import ResponsesRequest
from tokenrelay.service.api.responses.store import StoredResponse, unknown_response
from tokenrelay.service.errors import InvalidRequestError, NotFoundError

router = APIRouter(prefix="/v1/responses", tags=["responses"])
MAX_LISTED = 100
READ: Responses = {
    200: {
        "description": "The response, or its events with stream=true.",
        "headers": {"X-Response-Id": header("The id of the answer, told with its events.")},
        "content": events(*RESPONSE_EVENTS),
    }
}


async def _relay_id(id: str) -> str:
    relay_id = relay_id_of_response(id)
    if relay_id is None:
        raise unknown_response()
    return relay_id


Addressed = Annotated[str, Depends(_relay_id)]


async def _stored(api: Api, relay_id: Addressed, tenant: TenantDep) -> StoredResponse:
    return await api.responses.store.get(relay_id, tenant.name)


Stored = Annotated[StoredResponse, Depends(_stored)]


@router.post("", **documented(ResponsesRequest, Response, chunks=RESPONSE_EVENTS))
async def create_response(
    request: Request,
    body: Annotated[ResponsesRequest, Depends(json_body(ResponsesRequest))],
    tenant: TenantDep,
    relay_id: RelayId,
) -> HttpResponse:
    """Answer a text or a conversation. With ``background=true`` at once, to be asked about later."""
    await require_room(request)
    return await create(request, body, tenant, relay_id)


@router.get("/{id}", response_model=Response, responses=ERRORS | READ)
async def get_response(
    api: Api,
    relay_id: Addressed,
    stored: Stored,
    stream: Annotated[bool, Query(description="Its events, from the beginning or behind starting_after.")] = False,
    starting_after: Annotated[int | None, Query(ge=0, description="The last sequence_number you have.")] = None,
) -> HttpResponse:
    """A stored response as it is now; while it is being written, with what there is."""
    if stream:
        return await _followed(api, relay_id, -1 if starting_after is None else starting_after)
    if starting_after is not None:
        raise InvalidRequestError("'starting_after' is only allowed with stream=true.", param="starting_after")
    return HttpResponse(await api.responses.response(relay_id, stored), media_type=JSON)


async def _followed(api: ApiProcess, relay_id: str, starting_after: int) -> HttpResponse:
    try:
        choices = await Choices.resume(api.generations, [relay_id], Cursor(1))
    except NotFoundError:
        raise NotFoundError(
            "The response's events are no longer kept; read it without stream=true.", param="stream"
        ) from None
    return stream(api, choices, headers_of(api, choices), starting_after)


@router.post("/{id}/cancel", response_model=Response, responses=ERRORS)
async def cancel_response(api: Api, relay_id: Addressed, stored: Stored, tenant: TenantDep) -> HttpResponse:
    """End it, wherever it is; what was written so far stays. May be repeated."""
    status = await _status(api, relay_id, stored)
    if status in ("queued", "in_progress"):
        await api.queue.cancel(relay_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await api.responses.end(relay_id)
    elif status != "cancelled":
        raise InvalidRequestError(f"A response that is {status} cannot be cancelled.")
    stored = await api.responses.store.get(relay_id, tenant.name)
    return HttpResponse(await api.responses.response(relay_id, stored), media_type=JSON)


async def _status(api: ApiProcess, relay_id: str, stored: StoredResponse) -> str:
    response: dict[str, Any] = json.loads(await api.responses.response(relay_id, stored))
    return str(response["status"])


@router.delete("/{id}", responses=ERRORS)
async def delete_response(api: Api, relay_id: Addressed, stored: Stored) -> ResponseDeleted:
    """Forget it, with all it was made from. If it is still being written, that ends."""
    await api.queue.cancel(relay_id)
    await api.responses.store.forget(relay_id)
    return ResponseDeleted(id=PREFIX + relay_id)


@router.get("/{id}/input_items", responses=ERRORS)
async def list_input_items(
    stored: Stored,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(description="The id of the last item you have.")] = None,
) -> ItemList:
    """What the response was made from: also the conversation before it, but not the instructions."""
    items = stored.input if order == "asc" else stored.input[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError("'after' is not the id of one of the response's input items.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return ItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(items) > len(page))

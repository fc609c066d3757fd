"""POST /v1/responses: from the request to its answer, whole, streamed or at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request
from starlette.responses import Response as HttpResponse

from tokenrelay.service.api.admission.answer_specs import Wording
from tokenrelay.service.api.admission.client_terms import terms_of
from tokenrelay.service.api.answering import headers_of
from tokenrelay.service.api.event_loop import client_gone, race
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.api.lifecycle.choices import Choices
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.responses.conversation import Item, as_kept, relay_id_of_item, relay_id_of_response
from tokenrelay.service.api.responses.event_sequence import PREFIX, EventSequence
from tokenrelay.service.api.responses.items import ItemReference
from tokenrelay.service.api.responses.request import ResponsesRequest
from tokenrelay.service.api.responses.response_format import ResponseFormat
from tokenrelay.service.api.responses.translation import WORDS, as_chat, echo
from tokenrelay.service.api.streaming.event_stream import EventStream
from tokenrelay.service.errors import BrokerUnavailable, InvalidRequestError, NotFoundError
from tokenrelay.service.messages import Submission
from tokenrelay.service.tenants import Tenant
from tokenrelay.service.terms import Terms

JSON = "application/json"
MAX_LOOKED_UP = 64  # responses that one request's references may name


async def create(request: Request, body: ResponsesRequest, tenant: Tenant, relay_id: str) -> HttpResponse:
    """Queue, then answer: a refusal is a proper HTTP status, since no response has begun."""
    api: ApiProcess = request.app.state.api
    conversation = await _conversation(api, body, tenant, relay_id)
    [submission], [terms] = await _admitted(request, body, conversation, tenant, relay_id)
    if body.stores:
        await api.responses.store.put(relay_id, tenant.name, conversation)
        terms = terms._replace(retention=api.settings.response_ttl_seconds)
    choices = await _begun(api, submission, terms, relay_id)
    headers = headers_of(api, choices) | ({"Idempotent-Replayed": "true"} if choices.joined else {})
    if body.stream:
        return stream(api, choices, headers)
    content = await (_at_once(api, choices, tenant) if body.background else _whole(request, api, choices))
    return HttpResponse(content, media_type=JSON, headers=headers)


def stream(api: ApiProcess, choices: Choices, headers: dict[str, str], starting_after: int = -1) -> EventStream:
    """The events behind this number, as they come."""
    answer_format = ResponseFormat(choices.answers, api.model.tokenizer, PREFIX + choices.relay_id, starting_after)
    return EventStream(choices, answer_format, api.generations, api.settings.keep_alive_seconds, headers)


async def _conversation(api: ApiProcess, body: ResponsesRequest, tenant: Tenant, relay_id: str) -> list[Item]:
    """All that the response is made from, but for the instructions."""
    earlier = list[Item]()
    if body.previous_response_id:
        relay_id_before = relay_id_of_response(body.previous_response_id)
        earlier = await _items(api, relay_id_before, tenant, "previous_response_id")
    known = {item["id"]: item for item in earlier}
    num_looked_up = 0
    for number, item in enumerate(() if isinstance(body.input, str) else body.input):
        if isinstance(item, ItemReference) and item.id not in known:
            param = f"input.{number}.id"
            num_looked_up += 1
            known |= {item["id"]: item for item in await _items(api, relay_id_of_item(item.id), tenant, param)}
            if item.id not in known or num_looked_up > MAX_LOOKED_UP:
                raise _unknown(param)
    return [*earlier, *as_kept(body.input, relay_id, known)]


async def _items(api: ApiProcess, relay_id: str | None, tenant: Tenant, param: str) -> list[Item]:
    """A stored response's input and output. Raises InvalidRequestError, which names ``param``."""
    if relay_id is None:
        raise _unknown(param)
    try:
        stored = await api.responses.store.get(relay_id, tenant.name)
        response: dict[str, Any] = json.loads(await api.responses.response(relay_id, stored))
    except NotFoundError:
        raise _unknown(param) from None
    if response["status"] in ("queued", "in_progress"):
        raise InvalidRequestError(f"'{param}': that response has not ended yet.", param=param)
    return [*stored.input, *response["output"]]


def _unknown(param: str) -> InvalidRequestError:
    message = f"'{param}' is not that of a stored response, or it is no longer kept."
    code = "previous_response_not_found" if param == "previous_response_id" else "item_not_found"
    return InvalidRequestError(message, param=param, code=code)


async def _admitted(
    request: Request, body: ResponsesRequest, conversation: Sequence[Item], tenant: Tenant, relay_id: str
) -> tuple[list[Submission], list[Terms]]:
    api: ApiProcess = request.app.state.api
    chat = as_chat(body, conversation)
    wording = Wording("responses", {"response": echo(body)})
    with told_in(WORDS):
        submissions = await api.admission.of(tenant).chat(chat, relay_id)
        timeout = api.settings.request_timeout_seconds
        return submissions, terms_of(request, chat, wording, submissions, api.model, timeout)


async def _begun(api: ApiProcess, submission: Submission, terms: Terms, relay_id: str) -> Choices:
    """A response that is refused, or a repetition of another, leaves nothing behind."""
    kept = False
    try:
        choices = await Choices.start(api.generations, [submission], [terms])
        kept = not choices.joined
    finally:
        if terms.retention and kept:
            api.responses.keep(relay_id)
        elif terms.retention:
            with suppress(BrokerUnavailable):
                await api.responses.store.forget(relay_id)
    return choices


async def _at_once(api: ApiProcess, choices: Choices, tenant: Tenant) -> str | bytes:
    """What there is to say before anything happened; or, of a repetition, what has become of the first."""
    await choices.close()  # it goes on
    if choices.joined:
        stored = await api.responses.store.get(choices.relay_id, tenant.name)
        return await api.responses.response(choices.relay_id, stored)
    return _json(_events(api, choices))


async def _whole(request: Request, api: ApiProcess, choices: Choices) -> str:
    """Made step by step, as a stream would have told it."""
    events = _events(api, choices)

    async def follow() -> None:
        async for step in choices.steps():
            events.step(step)

    try:
        await race(follow(), client_gone(request.receive), api.generations.interruption())
    finally:
        await choices.close()
    return _json(events)


def _events(api: ApiProcess, choices: Choices) -> EventSequence:
    return EventSequence(choices.answers[0], api.model.tokenizer, PREFIX + choices.relay_id)


def _json(events: EventSequence) -> str:
    return events.response.model_dump_json(exclude_unset=True)

"""What all routes do with the choices they have begun or joined: answer with them, as a stream or as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.admission.answer_specs import AnyBody, Wording
from tokenrelay.service.api.admission.client_terms import terms_of
from tokenrelay.service.api.anthropic.messages_format import PREFIX as MESSAGE
from tokenrelay.service.api.anthropic.messages_format import MessagesFormat
from tokenrelay.service.api.event_loop import client_gone, off_loop_if_large, race
from tokenrelay.service.api.lifecycle.choices import LARGE_LOGPROBS, Choices, Finished
from tokenrelay.service.api.ollama.ollama_format import PREFIX as OLLAMA
from tokenrelay.service.api.ollama.ollama_format import OllamaChatFormat, OllamaGenerateFormat
from tokenrelay.service.api.openai.chat_format import ChatFormat
from tokenrelay.service.api.openai.completion_format import CompletionFormat
from tokenrelay.service.api.openai.embedding_format import EmbeddingFormat
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.responses.event_sequence import PREFIX as RESPONSE
from tokenrelay.service.api.responses.response_format import ResponseFormat
from tokenrelay.service.api.streaming.event_stream import EventStream, StreamFormat
from tokenrelay.service.api.streaming.interim import InterimFormat, interim_frames
from tokenrelay.service.messages import Submission
from tokenrelay.service.terms import AnswerSpec, Route

log = structlog.get_logger()


class AnswerFormat(StreamFormat, InterimFormat, Protocol):
    def answer(self, finished: Finished) -> BaseModel: ...


class _Wire(NamedTuple):
    """How a route's answers are called, and who writes them."""

    id_prefix: str
    format: Callable[[Sequence[AnswerSpec], Tokenizer, str], AnswerFormat]


_WIRES: Mapping[Route, _Wire] = {
    "chat": _Wire("chatcmpl-", ChatFormat),
    "completion": _Wire("cmpl-", CompletionFormat),
    "messages": _Wire(MESSAGE, MessagesFormat),
    "ollama_chat": _Wire(OLLAMA, OllamaChatFormat),
    "ollama_generate": _Wire(OLLAMA, OllamaGenerateFormat),
    "responses": _Wire(RESPONSE, ResponseFormat),
    "embedding": _Wire("embd-", EmbeddingFormat),
}


async def answer(request: Request, body: AnyBody, submissions: Sequence[Submission], wording: Wording) -> Response:
    """Queue, then answer: a refusal is a proper HTTP status, since no response has begun."""
    api: ApiProcess = request.app.state.api
    terms = terms_of(request, body, wording, submissions, api.model, api.settings.request_timeout_seconds)
    choices = await Choices.start(api.generations, submissions, terms)
    if api.settings.log_prompts:
        prompts = [api.model.tokenizer.decode(submission.prompt_token_ids) for submission in submissions]
        log.info("prompt", request=choices.relay_id, tenant=submissions[0].tenant, prompts=prompts)
    response = stream(api, choices) if body.stream else await _whole(request, api, choices)
    if choices.joined:
        response.headers["Idempotent-Replayed"] = "true"  # Stripe's name
    return response


def stream(api: ApiProcess, choices: Choices, *, resumed: bool = False) -> EventStream:
    """The chunks behind the choices' cursor, as they come."""
    answer_format, headers = _format(choices, api.model.tokenizer), headers_of(api, choices)
    interim = interim_frames(choices, answer_format, api.watch) if choices.answers[0].asks_for_interim else None
    keep_alive = api.settings.keep_alive_seconds
    return EventStream(choices, answer_format, api.generations, keep_alive, headers, resumed=resumed, interim=interim)


async def _whole(request: Request, api: ApiProcess, choices: Choices) -> Response:
    answer_format, headers = _format(choices, api.model.tokenizer), headers_of(api, choices)
    n = choices.answers[0].n
    try:
        finished = await race(choices.finished(n), client_gone(request.receive), api.generations.interruption())
    finally:
        await choices.close()
    size = sum(output.num_entries for output in finished.outputs)
    content = await off_loop_if_large(size, LARGE_LOGPROBS, lambda: _json(answer_format.answer(finished)))
    return Response(content, media_type="application/json", headers=headers)


def answer_id(spec: AnswerSpec, relay_id: str) -> str:
    """The ``id`` of the response object: ``chatcmpl-…`` and the like."""
    return _WIRES[spec.route].id_prefix + relay_id


def _format(choices: Choices, tokenizer: Tokenizer) -> AnswerFormat:
    specs = choices.answers
    return _WIRES[specs[0].route].format(specs, tokenizer, answer_id(specs[0], choices.relay_id))


def headers_of(api: ApiProcess, choices: Choices) -> dict[str, str]:
    """The id under which to resume is told before the first chunk, which may have to wait in the queue."""
    headers = {"X-Response-Id": answer_id(choices.answers[0], choices.relay_id)}
    if api.settings.attention_sinks:
        headers["X-Attention-Sinks"] = str(api.settings.attention_sinks)
    return headers | (choices.allowance.headers if choices.allowance else {})


def _json(answered: BaseModel) -> str:
    """Only the fields that were set: what was not asked for is not mentioned."""
    return answered.model_dump_json(exclude_unset=True)

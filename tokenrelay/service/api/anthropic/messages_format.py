"""Events and answers of a message: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.anthropic.content import BlockEvents, content_blocks
from tokenrelay.service.api.anthropic.errors import AnthropicErrorBody, anthropic_error
from tokenrelay.service.api.anthropic.message import (
    AnthropicMessage,
    MessageDeltaEvent,
    MessageEnd,
    MessageEvent,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopReason,
)
from tokenrelay.service.api.assistant.deltas import Delta
from tokenrelay.service.api.assistant.parser import AssistantParser
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.schemas.usage import CompletionUsage
from tokenrelay.service.api.streaming.sse import NamedEvents
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.terms import AnswerSpec

PREFIX = "msg_"


class MessagesFormat(NamedEvents):
    """Of one message, which has one prompt and one choice. ``extra["max_tokens"]`` is what the client asked for."""

    keep_alive = format_sse_event(event="ping", data_str='{"type":"ping"}')

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._id = answer_id
        self._spec = specs[0]
        self._parser = AssistantParser(self._spec, answer_id.removeprefix(PREFIX), 0)
        self._blocks = BlockEvents()
        self._end = Output(0)  # of what came so far

    def opening(self, first: Step) -> list[MessageEvent]:
        usage = _usage(self._spec.num_prompt_tokens, 0, 0)
        return [MessageStart(type="message_start", message=self._message(usage, [], None, None))]

    def chunks(self, step: Step) -> list[MessageEvent]:
        events = list(self._blocks.of(self._deltas(step.output)))
        if step.usage:
            end = MessageEnd(stop_reason=self._stop_reason(step.usage), stop_sequence=self._end.stop_string or None)
            events += self._blocks.close()
            events.append(MessageDeltaEvent(type="message_delta", delta=end, usage=_usage_of(step.usage)))
            events.append(MessageStop(type="message_stop"))
        return events

    def pass_over(self, step: Step) -> None:
        """Which block is open, and its number, follow from all before."""
        self.chunks(step)

    def interim(self, name: str | None, **fields: Any) -> bytes:
        """The protocol has no place for it."""
        return b""

    def failure(self, error: ServiceError) -> bytes:
        body = AnthropicErrorBody.model_validate(anthropic_error(error, error.status))
        return self.unplaced(body, "error")

    def answer(self, finished: Finished) -> BaseModel:
        blocks = content_blocks(self._deltas(finished.outputs[0]))
        reason = self._stop_reason(finished.usage)
        return self._message(_usage_of(finished.usage), blocks, reason, self._end.stop_string or None)

    def _deltas(self, output: Output) -> list[Delta]:
        deltas = self._parser.feed(output.text)
        if output.finish_reason:
            self._end = output
            deltas += self._parser.finish()
        return deltas

    def _stop_reason(self, usage: CompletionUsage) -> StopReason:
        if self._end.finish_reason == "length":
            cut = usage.completion_tokens < self._spec.extra["max_tokens"]
            return "model_context_window_exceeded" if cut else "max_tokens"
        if self._end.stop_string:
            return "stop_sequence"
        return "tool_use" if self._parser.has_tool_calls else "end_turn"

    def _message(
        self, usage: MessageUsage, content: list[Any], stop_reason: StopReason | None, stop_sequence: str | None
    ) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._id,
            type="message",
            role="assistant",
            model=self._spec.model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )


def _usage_of(usage: CompletionUsage) -> MessageUsage:
    return _usage(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)


def _usage(num_prompt: int, num_cached: int, num_output: int) -> MessageUsage:
    return MessageUsage(
        input_tokens=num_prompt - num_cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=num_output,
    )

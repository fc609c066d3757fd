"""The events of one response, and the response itself: a function of the steps of its log, in whichever process.

Nothing else decides what an event says and which number it has, so a stream can be read on anywhere, behind any event.
"""

from __future__ import annotations

from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.assistant.deltas import Delta, TextDelta
from tokenrelay.service.api.assistant.parser import AssistantParser
from tokenrelay.service.api.lifecycle.choices import Step
from tokenrelay.service.api.openai.logprobs import LogprobsFormat
from tokenrelay.service.api.responses.events import ErrorEvent, StateEvent, StreamEvent
from tokenrelay.service.api.responses.objects import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputTokensDetails,
    ReasoningItem,
    Response,
    ResponseError,
    ResponseUsage,
    Status,
)
from tokenrelay.service.api.responses.open_items import EventNumbers, OpenItem, OpenMessage, open_item
from tokenrelay.service.api.schemas.logprobs import ChatTokenLogprob
from tokenrelay.service.api.schemas.usage import CompletionUsage
from tokenrelay.service.errors import Cancelled, ServiceError
from tokenrelay.service.terms import AnswerSpec

PREFIX = "resp_"


class EventSequence:
    """Feed it the log's steps, or the error that ended it; ``response`` is what has become of it so far."""

    def __init__(self, spec: AnswerSpec, tokenizer: Tokenizer, response_id: str) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._id = response_id
        self._relay_id = response_id.removeprefix(PREFIX)
        self._parser = AssistantParser(spec, self._relay_id, 0)
        self._logprobs = LogprobsFormat(spec, tokenizer)
        self._untold: list[ChatTokenLogprob] = []  # of tokens whose text is yet to come
        self._numbers = EventNumbers()
        self._done: list[OutputItem] = []
        self._open: OpenItem | None = None
        self._status: Status = "queued" if spec.extra["response"]["background"] else "in_progress"
        self._usage: ResponseUsage | None = None
        self._error: ResponseError | None = None

    @property
    def response(self) -> Response:
        return Response(
            **self._spec.extra["response"],
            id=self._id,
            created_at=self._spec.created,
            status=self._status,
            error=self._error,
            incomplete_details=IncompleteDetails() if self._status == "incomplete" else None,
            model=self._spec.model,
            output=self._output,
            usage=self._usage,
        )

    @property
    def ended(self) -> bool:
        return self._status not in ("queued", "in_progress")

    def opening(self) -> list[StreamEvent]:
        """What is told before anything is known of the answer."""
        second = "response.queued" if self._status == "queued" else "response.in_progress"
        return [self._state("response.created"), self._state(second)]

    def begin(self) -> list[StreamEvent]:
        """Somebody works on it."""
        if self._status != "queued":
            return []
        self._status = "in_progress"
        return [self._state("response.in_progress")]

    def step(self, step: Step) -> list[StreamEvent]:
        events = self.begin()
        if self._spec.num_logprobs is not None:
            self._untold += self._logprobs.chat(step.output.logprobs).content
        deltas = [*self._parser.feed(step.output.text), *(self._parser.finish() if step.usage else ())]
        for delta in deltas:
            events += self._delta(delta)
        if deltas and not isinstance(deltas[-1], TextDelta):
            self._untold = []  # they were of thoughts or calls
        return events + (self._end(step.output.finish_reason, step.usage) if step.usage else [])

    def fail(self, error: ServiceError) -> list[StreamEvent]:
        """An error that may go away ends the stream only. A cancelled response has no event of its own at OpenAI."""
        if error.retryable:
            return [self._numbers.event(ErrorEvent, code=error.code, message=error.message, param=error.param)]
        if isinstance(error, Cancelled):
            self._status = "cancelled"
        else:
            self._status = "failed"
            code = "invalid_prompt" if error.status < 500 else "server_error"
            self._error = ResponseError.model_validate({"code": code, "message": error.message})
        return [self._state("response.failed")]

    def _delta(self, delta: Delta) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        logprobs: list[ChatTokenLogprob] = []
        if isinstance(delta, TextDelta):
            logprobs, self._untold = self._untold, []
        if self._open is None or not self._open.takes(delta):
            events += self._close("completed")
            self._open = open_item(self._numbers, self._relay_id, len(self._done), delta)
            events += self._open.added()
        return events + self._open.more(delta, logprobs)

    def _close(self, status: ItemStatus) -> list[StreamEvent]:
        if self._open is None:
            return []
        closed, self._open = self._open, None
        self._done.append(closed.item(status))
        return closed.done(status)

    def _end(self, finish_reason: str | None, usage: CompletionUsage) -> list[StreamEvent]:
        """An answer without any text is an empty message."""
        events: list[StreamEvent] = []
        if (not self._done and self._open is None) or (self._untold and isinstance(self._open, OpenMessage)):
            events += self._delta(TextDelta(""))
        cut_off = finish_reason == FinishReason.LENGTH
        events += self._close("incomplete" if cut_off else "completed")
        self._status = "incomplete" if cut_off else "completed"
        self._usage = self._counted(usage)
        return [*events, self._state(f"response.{self._status}")]

    def _counted(self, usage: CompletionUsage) -> ResponseUsage:
        """Thoughts are counted by their text: the marks around them are not."""
        thoughts = "".join(part.text for item in self._done if isinstance(item, ReasoningItem) for part in item.content)
        num_reasoning = len(self._tokenizer.encode(thoughts, add_special_tokens=False)) if thoughts else 0
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=min(num_reasoning, usage.completion_tokens)),
            total_tokens=usage.total_tokens,
        )

    @property
    def _output(self) -> list[OutputItem]:
        open_status: ItemStatus = "incomplete" if self.ended else "in_progress"
        return [*self._done, *([self._open.item(open_status)] if self._open else ())]

    def _state(self, type: str) -> StreamEvent:
        return self._numbers.event(StateEvent, type=type, response=self.response)

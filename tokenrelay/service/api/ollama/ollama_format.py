"""Lines and answers of Ollama's two routes: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.assistant.deltas import ReasoningDelta, TextDelta
from tokenrelay.service.api.assistant.parser import AssistantParser
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.ollama.answer import OllamaChatAnswer, OllamaGenerateAnswer, OllamaMessage
from tokenrelay.service.api.ollama.calls import Calls
from tokenrelay.service.api.ollama.errors import OllamaErrorBody
from tokenrelay.service.api.openai.logprobs import LogprobsFormat
from tokenrelay.service.api.schemas.usage import CompletionUsage, Timings
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.terms import AnswerSpec

PREFIX = "ollama-"
_NANOSECONDS = 1_000_000  # in a millisecond


class OllamaFormat(ABC):
    """Of one request, which has one prompt and one choice. ``extra["model"]`` is its name as the client wrote it."""

    media_type = "application/x-ndjson"
    preamble = keep_alive = done = resumed_done = b""  # clients take every line for a chunk

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._spec = specs[0]
        self._parser = AssistantParser(self._spec, answer_id.removeprefix(PREFIX), 0)
        self._calls = Calls()
        self._logprobs = LogprobsFormat(self._spec, tokenizer)
        self._finish_reason = "stop"

    @abstractmethod
    def _line(self, text: str, beside: dict[str, Any], **fields: Any) -> BaseModel:
        """``beside``: what is told beside the text: thinking and calls."""

    def opening(self, first: Step) -> list[BaseModel]:
        return []

    def chunks(self, step: Step) -> list[BaseModel]:
        text, beside, logprobs = self._told(step.output)
        lines = [self._line(text, beside, done=False, **logprobs)] if text or beside or logprobs else []
        if step.usage:
            lines.append(self._line("", {}, **self._end(step.usage, step.timings)))
        return lines

    def pass_over(self, step: Step) -> None:
        """What the text means depends on all of it."""
        self._told(step.output)

    def interim(self, name: str | None, **fields: Any) -> bytes:
        """The protocol has no place for it."""
        return b""

    def frame(self, chunk: BaseModel, at: str) -> bytes:
        return chunk.model_dump_json(exclude_unset=True).encode() + b"\n"

    def failure(self, error: ServiceError) -> bytes:
        return self.frame(OllamaErrorBody(error=error.message), "")

    def answer(self, finished: Finished) -> BaseModel:
        text, beside, logprobs = self._told(finished.outputs[0])
        return self._line(text, beside, **logprobs, **self._end(finished.usage, finished.timings))

    def _told(self, output: Output) -> tuple[str, dict[str, Any], dict[str, Any]]:
        deltas = self._parser.feed(output.text)
        if output.finish_reason:
            self._finish_reason = output.finish_reason
            deltas += self._parser.finish()
        calls = [*self._calls.of(deltas), *(self._calls.finish() if output.finish_reason else ())]
        text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        thinking = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
        beside = {"thinking": thinking, "tool_calls": calls}
        return text, {name: value for name, value in beside.items() if value}, self._told_logprobs(output)

    def _told_logprobs(self, output: Output) -> dict[str, Any]:
        if self._spec.num_logprobs is None or not output.logprobs:
            return {}
        return {"logprobs": [token.model_dump() for token in self._logprobs.chat(output.logprobs).content]}

    def _end(self, usage: CompletionUsage, timings: Timings | None) -> dict[str, Any]:
        reason = "length" if self._finish_reason == "length" else "stop"
        counts = {"prompt_eval_count": usage.prompt_tokens, "eval_count": usage.completion_tokens}
        return {"done": True, "done_reason": reason, **counts, **(_durations(timings) if timings else {})}

    @property
    def _common(self) -> dict[str, Any]:
        return {"model": self._spec.extra["model"], "created_at": timestamp(self._spec.created)}


class OllamaChatFormat(OllamaFormat):
    def _line(self, text: str, beside: dict[str, Any], **fields: Any) -> OllamaChatAnswer:
        message = OllamaMessage(role="assistant", content=text, **beside)
        return OllamaChatAnswer(message=message, **self._common, **fields)


class OllamaGenerateFormat(OllamaFormat):
    def _line(self, text: str, beside: dict[str, Any], **fields: Any) -> OllamaGenerateAnswer:
        return OllamaGenerateAnswer(response=text, **beside, **self._common, **fields)


def timestamp(seconds: float) -> str:
    """As RFC 3339 has it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _durations(timings: Timings) -> dict[str, int]:
    parts = {
        "load_duration": timings.queue_ms,
        "prompt_eval_duration": timings.prompt_ms,
        "eval_duration": timings.predicted_ms,
    }
    told = {name: round(milliseconds * _NANOSECONDS) for name, milliseconds in parts.items()}
    return {"total_duration": sum(told.values()), **told}

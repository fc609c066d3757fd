"""Chunks and answers of a chat completion: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.assistant.deltas import Delta, TextDelta
from tokenrelay.service.api.assistant.messages import answer_message, chunk_delta
from tokenrelay.service.api.assistant.parser import AssistantParser
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.openai.common_fields import CommonFields
from tokenrelay.service.api.openai.logprobs import LogprobsFormat
from tokenrelay.service.api.schemas.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    MessageDelta,
)
from tokenrelay.service.api.streaming.sse import ServerSentEvents
from tokenrelay.service.api.streaming.text_chunks import TextChunks
from tokenrelay.service.terms import AnswerSpec


class ChatFormat(ServerSentEvents):
    """Of one chat completion, which has one prompt. ``answer_id`` is ``chatcmpl-…``."""

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._spec = spec = specs[0]
        self._fields = CommonFields(answer_id, "chat.completion.chunk", specs)
        self._logprobs = LogprobsFormat(spec, tokenizer)
        self._text_chunks = TextChunks(lambda i, text: self._chunk(self._delta(i, MessageDelta(content=text))))
        relay_id = answer_id.rpartition("-")[2]
        self._parsers = [AssistantParser(spec, relay_id, choice) for choice in range(spec.num_generated)]

    def opening(self, first: Step) -> list[ChatCompletionChunk]:
        roles = [self._delta(i, MessageDelta(role="assistant", content="")) for i in range(self._spec.n)]
        return [self._chunk(roles[0], **self._about_prompt(first.output)), *map(self._chunk, roles[1:])]

    def chunks(self, step: Step) -> list[ChatCompletionChunk | bytes]:
        output, at_end = step.output, self._fields.at_the_end(step)
        self._fields.note(output)
        chunks = self._of_text(output)
        if output.finish_reason:
            end = self._delta(output.choice, MessageDelta(), finish_reason=self._reason(output))
            chunks.append(self._chunk(end, **({} if self._spec.include_usage else at_end)))
        if step.usage and self._spec.include_usage:
            chunks.append(self._chunk(usage=step.usage, **at_end))
        return chunks

    def _of_text(self, output: Output) -> list[ChatCompletionChunk | bytes]:
        """What is told beside the text comes with the first piece of it."""
        told, deltas = self._told(output), self._deltas(output)
        pieces = deltas or [TextDelta("")] * bool(told)
        return [self._of_delta(output.choice, delta, told if i == 0 else {}) for i, delta in enumerate(pieces)]

    def _of_delta(self, choice: int, delta: Delta, told: dict[str, Any]) -> ChatCompletionChunk | bytes:
        if isinstance(delta, TextDelta) and not told and not self._spec.include_continuous_usage:
            return self._text_chunks.json(choice, delta.text)
        return self._chunk(self._delta(choice, chunk_delta(delta), **told))

    def pass_over(self, step: Step) -> None:
        """What the text means depends on all of it."""
        self._fields.note(step.output)
        self._deltas(step.output)

    def interim(self, name: str | None, **fields: Any) -> bytes:
        return self.unplaced(self._chunk(self._delta(0, MessageDelta()), **fields), name)

    def answer(self, finished: Finished) -> ChatCompletion:
        return ChatCompletion(
            choices=[self._choice(output) for output in finished.outputs],
            usage=finished.usage,
            **(self._fields.always | {"object": "chat.completion"}),
            **self._fields.at_the_end(finished),
            **self._about_prompt(finished.outputs[0]),
        )

    def _choice(self, output: Output) -> ChatChoice:
        message = answer_message(self._deltas(output))
        fields = {**self._silent(), **self._told(output), "finish_reason": self._reason(output)}
        return ChatChoice(index=output.choice, message=message, **fields)

    def _deltas(self, output: Output) -> list[Delta]:
        parser = self._parsers[output.choice]
        deltas = parser.feed(output.text)
        return deltas + parser.finish() if output.finish_reason else deltas

    def _reason(self, output: Output) -> str | None:
        calls = output.finish_reason == "stop" and self._parsers[output.choice].has_tool_calls
        return "tool_calls" if calls else output.finish_reason

    def _about_prompt(self, output: Output) -> dict[str, Any]:
        return self._logprobs.about_prompt(self._spec.prompt_token_ids, output.prompt_logprobs)

    def _told(self, output: Output) -> dict[str, Any]:
        """The fields beside the text that are asked for and have something to say."""
        told: dict[str, Any] = {}
        if self._spec.num_logprobs is not None and output.logprobs:
            told["logprobs"] = self._logprobs.chat(output.logprobs)
        if self._spec.return_token_ids and output.token_ids:
            told["token_ids"] = list(output.token_ids)
        return told

    def _silent(self) -> dict[str, Any]:
        return {"logprobs": None} | ({"token_ids": []} if self._spec.return_token_ids else {})

    def _delta(self, choice: int, delta: MessageDelta, **fields: Any) -> ChunkChoice:
        return ChunkChoice(index=choice, delta=delta, **{**self._silent(), "finish_reason": None, **fields})

    def _chunk(self, *choices: ChunkChoice, **fields: Any) -> ChatCompletionChunk:
        """Every field is set here: only set fields are sent."""
        return ChatCompletionChunk(choices=list(choices), **(self._fields.of_a_chunk | fields))

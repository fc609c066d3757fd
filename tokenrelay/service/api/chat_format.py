"""Chunks and answers of a chat completion: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.choices import Finished, Output, Step
from tokenrelay.service.api.logprobs import LogprobsFormat
from tokenrelay.service.api.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
)
from tokenrelay.service.api.sse import ServerSentEvents
from tokenrelay.service.terms import AnswerSpec


class ChatFormat(ServerSentEvents):
    """Of one chat completion, which has one prompt. ``answer_id`` is ``chatcmpl-…``."""

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._id = answer_id
        self._spec = specs[0]
        self._logprobs = LogprobsFormat(self._spec, tokenizer)

    def opening(self, first: Step) -> list[ChatCompletionChunk]:
        roles = [self._delta(i, Delta(role="assistant", content="")) for i in range(self._spec.n)]
        return [self._chunk(roles[0], **self._about_prompt(first.output)), *map(self._chunk, roles[1:])]

    def chunks(self, step: Step) -> list[ChatCompletionChunk]:
        output, chunks = step.output, []
        told = self._told(output)
        if output.text or told:
            chunks.append(self._chunk(self._delta(output.choice, Delta(content=output.text), **told)))
        if output.finish_reason:
            chunks.append(self._chunk(self._delta(output.choice, Delta(), finish_reason=output.finish_reason)))
        if step.usage and self._spec.include_usage:
            chunks.append(self._chunk(usage=step.usage))
        return chunks

    def pass_over(self, step: Step) -> None:
        """Chunks do not depend on those before them."""

    def interim(self, name: str | None, **fields: Any) -> bytes:
        return self.unplaced(self._chunk(self._delta(0, Delta()), **fields), name)

    def answer(self, finished: Finished) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._spec.created,
            model=self._spec.model,
            choices=[self._choice(output) for output in finished.outputs],
            usage=finished.usage,
            **self._about_prompt(finished.outputs[0]),
        )

    def _choice(self, output: Output) -> ChatChoice:
        message = AnswerMessage(role="assistant", content=output.text, refusal=None)
        fields = {**self._silent(), **self._told(output), "finish_reason": output.finish_reason}
        return ChatChoice(index=output.choice, message=message, **fields)

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

    def _delta(self, choice: int, delta: Delta, **fields: Any) -> ChunkChoice:
        return ChunkChoice(index=choice, delta=delta, **{**self._silent(), "finish_reason": None, **fields})

    def _chunk(self, *choices: ChunkChoice, **fields: Any) -> ChatCompletionChunk:
        """Every field is set here: only set fields are sent."""
        usage = {"usage": None} if self._spec.include_usage else {}
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._spec.created,
            model=self._spec.model,
            choices=list(choices),
            **(usage | fields),
        )

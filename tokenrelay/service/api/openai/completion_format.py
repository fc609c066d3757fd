"""Chunks and answers of a completion: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.openai.common_fields import CommonFields
from tokenrelay.service.api.openai.logprobs import LogprobsFormat, TextOffsets, prompt_offsets
from tokenrelay.service.api.schemas.completions import Completion, CompletionChoice
from tokenrelay.service.api.schemas.logprobs import CompletionLogprobs
from tokenrelay.service.api.streaming.sse import ServerSentEvents
from tokenrelay.service.api.streaming.text_chunks import TextChunks
from tokenrelay.service.terms import AnswerSpec


class CompletionFormat(ServerSentEvents):
    """Of one completion, with a spec per prompt. ``answer_id`` is ``cmpl-…``."""

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._specs = specs
        self._fields = CommonFields(answer_id, "text_completion", specs)
        self._spec = specs[0]  # for what all prompts have in common
        self._tokenizer = tokenizer
        self._begun: dict[int, _Choice] = {}
        self._text_chunks = TextChunks(lambda choice, text: self._chunk(self._choice(choice, text=text)))

    def opening(self, first: Step) -> list[Completion]:
        return []

    def chunks(self, step: Step) -> list[Completion | bytes]:
        output, at_end = step.output, self._fields.at_the_end(step)
        self._fields.note(output)
        told, chunks = self._told(output), list[Completion | bytes]()
        if told.keys() == {"text"} and not self._spec.include_continuous_usage:
            chunks.append(self._text_chunks.json(output.choice, told["text"]))
        elif told:
            chunks.append(self._chunk(self._choice(output.choice, **told)))
        if output.finish_reason:
            end = self._choice(output.choice, finish_reason=output.finish_reason)
            chunks.append(self._chunk(end, **({} if self._spec.include_usage else at_end)))
        if step.usage and self._spec.include_usage:
            chunks.append(self._chunk(usage=step.usage, **at_end))
        return chunks

    def pass_over(self, step: Step) -> None:
        """A choice's later chunks depend on where the text before them ended."""
        self._fields.note(step.output)
        self._told(step.output)

    def interim(self, name: str | None, **fields: Any) -> bytes:
        return self.unplaced(self._chunk(self._choice(0), **fields), name)

    def answer(self, finished: Finished) -> Completion:
        choices = [
            self._choice(output.choice, finish_reason=output.finish_reason, **self._told(output))
            for output in finished.outputs
        ]
        return self._chunk(*choices, usage=finished.usage, **self._fields.at_the_end(finished))

    def _told(self, output: Output) -> dict[str, Any]:
        first = output.choice not in self._begun
        if first:
            spec = self._specs[output.choice // self._spec.n]
            self._begun[output.choice] = _Choice(spec, self._tokenizer)
        return self._begun[output.choice].told(output, first)

    def _choice(self, index: int, **fields: Any) -> CompletionChoice:
        silent: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
        silent |= {"token_ids": []} if self._spec.return_token_ids else {}
        return CompletionChoice(index=index, **(silent | fields))

    def _chunk(self, *choices: CompletionChoice, **fields: Any) -> Completion:
        """Every field is set here: only set fields are sent."""
        return Completion(choices=list(choices), **(self._fields.of_a_chunk | fields))


class _Choice:
    """What is told of one choice, output by output. The first also tells of the prompt, as far as it is asked for."""

    def __init__(self, spec: AnswerSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._logprobs = LogprobsFormat(spec, tokenizer)
        self._offsets = TextOffsets(tokenizer, spec)

    def told(self, output: Output, first: bool) -> dict[str, Any]:
        """The fields that have something to say."""
        told: dict[str, Any] = {"text": (self._spec.echo or "") + output.text if first else output.text}
        if self._spec.num_logprobs is not None:
            told["logprobs"] = self._told_logprobs(output, first and self._spec.echo is not None)
        if self._spec.return_token_ids:
            told["token_ids"] = list(output.token_ids)
        if first:
            told |= self._logprobs.about_prompt(self._spec.prompt_token_ids, output.prompt_logprobs)
        return {name: value for name, value in told.items() if value}

    def _told_logprobs(self, output: Output, with_prompt: bool) -> CompletionLogprobs | None:
        token_ids, tokens = list(output.token_ids), list[TokenLogprobs | None](output.logprobs)
        offsets = self._offsets.of(output.token_ids)
        if with_prompt:
            prompt = self._spec.prompt_token_ids
            offsets = prompt_offsets(self._tokenizer, prompt, self._spec.echo or "") + offsets
            token_ids = prompt + token_ids
            tokens = [*output.prompt_logprobs, *tokens]
        return self._logprobs.completion(token_ids, tokens, offsets) if token_ids else None

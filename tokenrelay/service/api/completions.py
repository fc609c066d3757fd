"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.body import json_body
from tokenrelay.service.api.choices import Finished, Output, Step
from tokenrelay.service.api.dependencies import AdmissionDep, Model, RelayId
from tokenrelay.service.api.logprobs import LogprobsFormat, TextOffsets, prompt_offsets
from tokenrelay.service.api.openapi import documented
from tokenrelay.service.api.schemas.completions import Completion, CompletionChoice, CompletionRequest
from tokenrelay.service.api.schemas.logprobs import CompletionLogprobs
from tokenrelay.service.messages import Submission

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", **documented(CompletionRequest, Completion))
async def create_completion(
    request: Request,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    admission: AdmissionDep,
    model: Model,
    relay_id: RelayId,
) -> Response:
    """Continue one or more texts, or token ids. The choices of prompt p are numbered from p·n."""
    submissions = await admission.completion(body, relay_id)
    return await answer(request, body, submissions, CompletionFormat(body, submissions, model.tokenizer, relay_id))


class CompletionFormat:
    """Chunks and answers of one completion."""

    def __init__(
        self, body: CompletionRequest, submissions: Sequence[Submission], tokenizer: Tokenizer, relay_id: str
    ) -> None:
        self._id = f"cmpl-{relay_id}"
        self._created = int(time.time())
        self._body = body
        self._submissions = submissions
        self._tokenizer = tokenizer
        self._begun: dict[int, _Choice] = {}

    def opening(self, first: Step) -> list[Completion]:
        return []

    def chunks(self, step: Step) -> list[Completion]:
        output, chunks = step.output, []
        if told := self._told(output):
            chunks.append(self._chunk(self._choice(output.choice, **told)))
        if output.finish_reason:
            chunks.append(self._chunk(self._choice(output.choice, finish_reason=output.finish_reason)))
        if step.usage and self._body.include_usage:
            chunks.append(self._chunk(usage=step.usage))
        return chunks

    def answer(self, finished: Finished) -> Completion:
        choices = [
            self._choice(output.choice, finish_reason=output.finish_reason, **self._told(output))
            for output in finished.outputs
        ]
        return self._chunk(*choices, usage=finished.usage)

    def _told(self, output: Output) -> dict[str, Any]:
        first = output.choice not in self._begun
        if first:
            prompt = output.choice // (self._body.n or 1)
            sent = self._body.prompts[prompt]
            self._begun[output.choice] = _Choice(self._body, sent, self._submissions[prompt], self._tokenizer)
        return self._begun[output.choice].told(output, first)

    def _choice(self, index: int, **fields: Any) -> CompletionChoice:
        silent: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
        silent |= {"token_ids": []} if self._body.return_token_ids else {}
        return CompletionChoice(index=index, **(silent | fields))

    def _chunk(self, *choices: CompletionChoice, **fields: Any) -> Completion:
        """Every field is set here: only set fields are sent."""
        usage = {"usage": None} if self._body.include_usage else {}
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=list(choices),
            **(usage | fields),
        )


class _Choice:
    """What is told of one choice, output by output. The first also tells of the prompt, as far as it is asked for."""

    def __init__(
        self, body: CompletionRequest, sent: str | list[int], submission: Submission, tokenizer: Tokenizer
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._logprobs = LogprobsFormat(body, tokenizer)
        self._prompt_token_ids = submission.prompt_token_ids
        self._echo = ""  # the prompt as it was sent; or as the model saw it, if that was ids, or only a part
        if body.echo and isinstance(sent, str) and body.truncate_prompt_tokens is None:
            self._echo = sent
        elif body.echo:
            self._echo = tokenizer.decode(self._prompt_token_ids, skip_special_tokens=False)
        self._offsets = TextOffsets(tokenizer, submission, len(self._echo))

    def told(self, output: Output, first: bool) -> dict[str, Any]:
        """The fields that have something to say."""
        told: dict[str, Any] = {"text": self._echo + output.text if first else output.text}
        if self._body.logprobs is not None:
            told["logprobs"] = self._told_logprobs(output, with_prompt=first and bool(self._body.echo))
        if self._body.return_token_ids:
            told["token_ids"] = list(output.token_ids)
        if first:
            told |= self._logprobs.about_prompt(self._prompt_token_ids, output.prompt_logprobs)
        return {name: value for name, value in told.items() if value}

    def _told_logprobs(self, output: Output, with_prompt: bool) -> CompletionLogprobs | None:
        token_ids, tokens = list(output.token_ids), list[TokenLogprobs | None](output.logprobs)
        offsets = self._offsets.of(output.token_ids)
        if with_prompt:
            offsets = prompt_offsets(self._tokenizer, self._prompt_token_ids, self._echo) + offsets
            token_ids = self._prompt_token_ids + token_ids
            tokens = [*output.prompt_logprobs, *tokens]
        return self._logprobs.completion(token_ids, tokens, offsets) if token_ids else None

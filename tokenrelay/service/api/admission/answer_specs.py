"""From a body to how its log is rendered, by whichever process a client asks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.assistant.reasoning import opened_by
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import CompletionRequest
from tokenrelay.service.api.schemas.embeddings import EmbeddingRequest
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.messages import Submission
from tokenrelay.service.terms import AnswerSpec, Route

END = 16  # tokens of a prompt: enough for a tag that opens the reasoning, and white space

Body = ChatCompletionRequest | CompletionRequest
AnyBody = Body | EmbeddingRequest


class Wording(NamedTuple):
    """In which protocol to answer, and what its format has to know beyond the common fields."""

    route: Route
    extra: Mapping[str, Any] = {}


def answer_specs(
    body: AnyBody, wording: Wording, submissions: Sequence[Submission], model: ServedModel
) -> list[AnswerSpec]:
    """One per prompt, all created now."""
    created = int(time.time())
    if isinstance(body, EmbeddingRequest):
        return [_embedding_spec(body, wording, submissions, prompt, created) for prompt in range(len(submissions))]
    return [_answer_spec(body, wording, submissions, prompt, model, created) for prompt in range(len(submissions))]


def _embedding_spec(
    body: EmbeddingRequest, wording: Wording, submissions: Sequence[Submission], prompt: int, created: int
) -> AnswerSpec:
    return AnswerSpec(
        route=wording.route,
        model=body.model,
        created=created,
        num_prompt_tokens=len(submissions[prompt].prompt_token_ids),
        prompt=prompt,
        num_prompts=len(submissions),
        extra=dict(wording.extra),
    )


def _answer_spec(
    body: Body, wording: Wording, submissions: Sequence[Submission], prompt: int, model: ServedModel, created: int
) -> AnswerSpec:
    submission, is_chat = submissions[prompt], isinstance(body, ChatCompletionRequest)
    tells_prompt = body.return_token_ids or (body.echoes and body.num_logprobs is not None)
    return AnswerSpec(
        route=wording.route,
        model=body.model,
        created=created,
        num_prompt_tokens=len(submission.prompt_token_ids),
        prompt=prompt,
        num_prompts=len(submissions),
        n=body.n or 1,
        num_generated=submission.params.n,  # of beams, the best only
        include_usage=body.include_usage,
        include_queue=body.include_queue,
        return_progress=bool(body.return_progress),
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        return_tokens_as_token_ids=bool(body.return_tokens_as_token_ids),
        skip_special_tokens=submission.skip_special_tokens,
        echo=_echo(body, submission, prompt, model.tokenizer),
        prompt_token_ids=submission.prompt_token_ids if tells_prompt else [],
        prompt_tail=[] if is_chat or body.num_logprobs is None else submission.prompt_tail,
        on_disconnect=body.on_disconnect or "cancel",
        system_fingerprint=model.fingerprint_with(submission.adapter),
        service_tier=body.granted_tier,
        include_continuous_usage=body.continuous_usage,
        include_timings=bool(body.timings_per_token),
        extra=dict(wording.extra),
        **(_meaning(body, submission, model) if isinstance(body, ChatCompletionRequest) else {}),
    )


def _meaning(body: ChatCompletionRequest, submission: Submission, model: ServedModel) -> dict[str, Any]:
    """How the text is read. Where a grammar shapes it, there is no reasoning in it."""
    dialect = model.dialect
    splits = dialect.reasoning_format and not body.is_shaped and body.separate_reasoning is not False
    end_of_prompt = model.tokenizer.decode(submission.prompt_token_ids[-END:], skip_special_tokens=False)
    return {
        "tool_format": dialect.tool_format if body.parses_calls else "",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning_format": opened_by(end_of_prompt, dialect.reasoning_format) if splits else "",
        "include_reasoning": body.include_reasoning is not False,
    }


def _echo(body: Body, submission: Submission, prompt: int, tokenizer: Tokenizer) -> str | None:
    """The prompt as it was sent; or as the model saw it, if that was ids, or only a part."""
    if isinstance(body, ChatCompletionRequest) or not body.echo:
        return None
    sent = body.prompts[prompt]
    if isinstance(sent, str) and body.truncate_prompt_tokens is None:
        return sent
    return tokenizer.decode(submission.prompt_token_ids, skip_special_tokens=False)

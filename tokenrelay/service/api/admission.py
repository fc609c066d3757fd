"""From a valid body to submissions: tokens, lengths, sampling. Whatever is wrong is found here, before it is queued."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from tokenrelay.model.chat_template import ChatTemplateError
from tokenrelay.model.sampling_params import SamplingParams, SamplingParamsError
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.event_loop import off_loop_if_large
from tokenrelay.service.api.sampling import require_known, sampling, text_size
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest, ChatMessage
from tokenrelay.service.api.schemas.completions import CompletionRequest
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import ContextLengthExceeded, InvalidRequestError
from tokenrelay.service.messages import Submission

LARGE_TEXT = 8 << 10  # characters: about a millisecond of tokenizing
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_REPORTED = 10**12  # larger numbers are not worth repeating in a message


class Admission:
    """Turns bodies into submissions for one served model."""

    def __init__(self, model: ServedModel, max_n: int) -> None:
        self._model = model
        self._max_n = max_n

    async def chat(self, body: ChatCompletionRequest, request_id: str) -> list[Submission]:
        self._require_servable(body)
        size = sum(len(message.text) for message in body.messages) + 64 * len(body.messages)
        prompt = await off_loop_if_large(size, LARGE_TEXT, lambda: _encode_chat(self._model.tokenizer, body.messages))
        shape = await self._sampling(body)
        params = self._params(body, body.token_limit, prompt, shape, "messages", default=self._model.max_model_len)
        return [Submission(request_id=request_id, prompt_token_ids=prompt, params=params)]

    async def completion(self, body: CompletionRequest, request_id: str) -> list[Submission]:
        self._require_servable(body)
        _require_at_most(len(body.prompts), self._max_n, "prompt", "prompts in one request")
        size = sum(map(len, body.prompts))
        prompts = await off_loop_if_large(size, LARGE_TEXT, self._encoder(body.prompts))
        shape = await self._sampling(body)
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        return [
            Submission(
                request_id=prompt_id,
                prompt_token_ids=prompt,
                params=self._params(body, body.token_limit, prompt, shape, "prompt", default=COMPLETIONS_MAX_TOKENS),
            )
            for prompt_id, prompt in zip(ids, prompts, strict=True)
        ]

    def _require_servable(self, body: GenerationRequest) -> None:
        self._model.require(body.model)
        _require_at_most(body.n or 1, self._max_n, "n", "choices per prompt")
        require_known(body.stop_token_ids or (), self._model.tokenizer, "stop_token_ids")

    def _encoder(self, prompts: Sequence[str | list[int]]) -> Callable[[], list[list[int]]]:
        return lambda: [_encode_prompt(self._model.tokenizer, prompt) for prompt in prompts]

    async def _sampling(self, body: GenerationRequest) -> dict[str, Any]:
        return await off_loop_if_large(text_size(body), LARGE_TEXT, lambda: sampling(body, self._model.tokenizer))

    def _params(
        self,
        body: GenerationRequest,
        max_tokens: int | None,
        prompt: list[int],
        shape: dict[str, Any],
        param: str,
        *,
        default: int,
    ) -> SamplingParams:
        room = self._room(len(prompt), max_tokens, param)
        try:
            return SamplingParams(
                max_tokens=max_tokens or min(default, room),
                seed=secrets.randbits(63) if body.seed is None else body.seed,
                n=body.n or 1,
                min_tokens=body.min_tokens or 0,
                ignore_eos=bool(body.ignore_eos),
                stop=body.stop_strings,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                **shape,
            )
        except SamplingParamsError as error:
            raise InvalidRequestError(f"{error}.", param=error.param) from error

    def _room(self, num_prompt: int, max_tokens: int | None, param: str) -> int:
        """Tokens that may be generated behind the prompt. Raises ContextLengthExceeded."""
        limit = self._model.max_model_len
        if num_prompt + 1 > limit:
            raise ContextLengthExceeded(
                f"The prompt has {num_prompt} tokens, and this model's context holds {limit} including at least one "
                f"generated token; shorten {param}.",
                param=param,
            )
        if max_tokens and num_prompt + max_tokens > limit:
            raise ContextLengthExceeded(
                f"The prompt has {num_prompt} tokens and max_tokens asks for {min(max_tokens, MAX_REPORTED)} more, "
                f"but this model's context holds {limit}; ask for at most {limit - num_prompt}, or shorten {param}.",
                param=param,
            )
        return limit - num_prompt


def _encode_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    try:
        return tokenizer.encode_chat([_as_template_sees_it(message) for message in messages])
    except ChatTemplateError as error:
        raise InvalidRequestError(f"{str(error)[:300]}.", param="messages") from error


def _as_template_sees_it(message: ChatMessage) -> dict[str, str]:
    """``developer`` is OpenAI's newer name of ``system``, which is the one that open models were trained with."""
    role = "system" if message.role == "developer" else message.role
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": role, "content": message.text} | {name: value for name, value in optional.items() if value}


def _encode_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, add_special_tokens=True)
    else:
        require_known(prompt, tokenizer, "prompt")
    if not prompt:
        raise InvalidRequestError("'prompt' must hold at least one token.", param="prompt")
    return prompt


def _require_at_most(count: int, limit: int, param: str, what: str) -> None:
    if count > limit:
        raise InvalidRequestError(f"'{param}': at most {limit} {what} are allowed.", param=param)

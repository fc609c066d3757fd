"""From a valid body to submissions: tokens, lengths, sampling. Whatever is wrong is found here, before it is queued."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from msgspec import structs

from tokenrelay.model.chat_template import ChatTemplateError
from tokenrelay.model.sampling_params import SamplingParams, SamplingParamsError
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.access.entitlement import most_tokens
from tokenrelay.service.api.admission.embedding_inputs import encode_inputs, require_dimensions
from tokenrelay.service.api.admission.sampling import require_known, require_plain_beams, sampling, text_size
from tokenrelay.service.api.admission.structured import Grammars
from tokenrelay.service.api.assistant.forced_calls import structure_of
from tokenrelay.service.api.assistant.prompt import template_arguments
from tokenrelay.service.api.catalogue import Catalogue
from tokenrelay.service.api.event_loop import off_loop_if_large
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import CompletionRequest
from tokenrelay.service.api.schemas.embeddings import EmbeddingRequest
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.schemas.structured import Structure
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import ContextLengthExceeded, InvalidRequestError
from tokenrelay.service.messages import ADAPTER_VERSION, Adapter, Submission
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import DEFAULT_TENANT, Tenant
from tokenrelay.service.terms import part_ids

LARGE_TEXT = 8 << 10  # characters: about a millisecond of tokenizing
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_PROMPT_LOGPROBS = 1 << 18  # in one answer: about 20 MB of JSON, and 4 MB in the broker
MAX_REPORTED = 10**12  # larger numbers are not worth repeating in a message


Body = TypeVar("Body", bound=GenerationRequest)


class Admission:
    """Turns bodies into submissions for one served model, of one tenant."""

    def __init__(
        self,
        model: ServedModel,
        catalogue: Catalogue,
        settings: Settings,
        grammars: Grammars,
        tenant: Tenant = DEFAULT_TENANT,
    ) -> None:
        self._model = model
        self._catalogue = catalogue
        self._settings = settings
        self._max_n = settings.max_n
        self._grammars = grammars
        self._tenant = tenant

    def of(self, tenant: Tenant) -> Admission:
        return Admission(self._model, self._catalogue, self._settings, self._grammars, tenant)

    async def chat(self, body: ChatCompletionRequest, request_id: str, *, fit: bool = False) -> list[Submission]:
        """``fit``: where there is room for fewer tokens than are asked for, so many are meant."""
        adapter = await self._servable(body)
        prompt, structure = await off_loop_if_large(body.size, LARGE_TEXT, lambda: self._prompt_and_structure(body))
        body, default = _fitting(body, self._model.context) if fit else (body, self._model.context)
        return _with(adapter, await self._submissions(body, request_id, [prompt], "messages", default, structure))

    async def count_tokens(self, body: ChatCompletionRequest) -> int:
        """Of what the model would read."""
        await self._servable(body)
        return len(await off_loop_if_large(body.size, LARGE_TEXT, lambda: encode_chat(self._model, body)))

    async def completion(self, body: CompletionRequest, request_id: str, *, fit: bool = False) -> list[Submission]:
        adapter = await self._servable(body)
        _require_at_most(len(body.prompts), self._max_n, "prompt", "prompts in one request")
        prompts = await off_loop_if_large(sum(map(len, body.prompts)), LARGE_TEXT, self._encoder(body))
        body, default = _fitting(body, self._model.context) if fit else (body, COMPLETIONS_MAX_TOKENS)
        return _with(adapter, await self._submissions(body, request_id, prompts, "prompt", default, body.structure))

    async def embedding(self, body: EmbeddingRequest, request_id: str) -> list[Submission]:
        model = self._model
        adapter = await self._catalogue.adapter(body.model)
        most = min(self._settings.max_inputs, self._settings.max_waiting)  # they wait together
        _require_at_most(len(body.inputs), most, "input", "inputs in one request")
        require_dimensions(body, model.network.hidden_size)
        size = sum(map(len, body.inputs))
        inputs = await off_loop_if_large(
            size, LARGE_TEXT, lambda: encode_inputs(body, model.tokenizer, model.max_model_len)
        )
        submissions = [
            Submission(
                request_id=input_id,
                prompt_token_ids=token_ids,
                params=SamplingParams(max_tokens=1),
                tenant=self._tenant.name,
                weight=self._tenant.weight,
                cache_salt=body.cache_salt or "",
                priority=body.priority or 0,
                pooling=body.pooling or self._settings.pooling,
            )
            for input_id, token_ids in zip(part_ids(request_id, len(inputs)), inputs, strict=True)
        ]
        return _with(adapter, submissions)

    async def _servable(self, body: GenerationRequest) -> Adapter | None:
        """The adapter it asks for, if it does. Raises NotFoundError or InvalidRequestError for what is not served."""
        adapter = await self._catalogue.adapter(body.model)
        _require_at_most(body.n or 1, self._max_n, "n", "choices per prompt")
        _require_at_most(body.num_generated, self._max_n, "best_of", "choices per prompt")
        return adapter

    def _prompt_and_structure(self, body: ChatCompletionRequest) -> tuple[list[int], Structure | None]:
        """Of a chat: its tokens, and what the answer must be."""
        return encode_chat(self._model, body), structure_of(body, self._model.dialect)

    def _encoder(self, body: CompletionRequest) -> Callable[[], list[list[int]]]:
        add_special_tokens = body.add_special_tokens is not False
        return lambda: [_encode_prompt(self._model.tokenizer, prompt, add_special_tokens) for prompt in body.prompts]

    async def _submissions(
        self,
        body: GenerationRequest,
        request_id: str,
        prompts: Sequence[list[int]],
        param: str,
        default: int,
        structure: Structure | None,
    ) -> list[Submission]:
        """One per prompt. ``param`` is where the prompts come from, ``default`` their ``max_tokens``."""
        prompts = [prompt[-(body.truncate_prompt_tokens or 0) :] for prompt in prompts]
        _require_tellable(body, sum(map(len, prompts)))
        default = min(default, most_tokens(body, prompts, param, self._tenant.limits))
        tokenizer = self._model.tokenizer
        shape = await off_loop_if_large(text_size(body), LARGE_TEXT, lambda: sampling(body, tokenizer))
        shape["grammar"] = await self._grammars.grammar_of(structure)
        return [
            Submission(
                request_id=prompt_id,
                prompt_token_ids=prompt,
                params=self._params(body, self._max_tokens(body, len(prompt), param, default), shape),
                tenant=self._tenant.name,
                weight=self._tenant.weight,
                cache_salt=f"{body.cache_salt or ''}{prompt_id * (body.cache_prompt is False)}",
                priority=body.rank,
                skip_special_tokens=self._skips_special_tokens(body),
                prompt_only=body.token_limit == 0,
            )
            for prompt_id, prompt in zip(part_ids(request_id, len(prompts)), prompts, strict=True)
        ]

    def _skips_special_tokens(self, body: GenerationRequest) -> bool:
        """Not where they say what the text means."""
        if isinstance(body, ChatCompletionRequest):
            spoken = self._model.dialect.speaks_in_special_tokens(calls=body.parses_calls, reasoning=not body.is_shaped)
            return not spoken and body.skip_special_tokens is not False
        return body.skip_special_tokens is not False

    def _params(self, body: GenerationRequest, max_tokens: int, shape: dict[str, Any]) -> SamplingParams:
        seed = secrets.randbits(63) if body.seed is None else body.seed
        try:
            params = SamplingParams(max_tokens=max_tokens, seed=seed, **shape)
        except SamplingParamsError as error:
            raise InvalidRequestError(f"{error}.", param=error.param) from error
        require_plain_beams(body, params)
        return params

    def _max_tokens(self, body: GenerationRequest, num_prompt: int, param: str, default: int) -> int:
        """What is asked for, or ``default`` as far as there is room; never 0. Raises ContextLengthExceeded."""
        room = self._room(num_prompt, body.token_limit, param)
        return min(default, room) if body.token_limit is None else max(1, body.token_limit)

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


def _with(adapter: Adapter | None, submissions: list[Submission]) -> list[Submission]:
    if adapter is None:
        return submissions
    return [structs.replace(each, adapter=adapter, version=ADAPTER_VERSION) for each in submissions]


def _fitting(body: Body, default: int) -> tuple[Body, int]:
    """A limit as a default, which is cut to the room there is."""
    return body.model_copy(update={"max_tokens": None}), body.max_tokens or default


def encode_chat(model: ServedModel, body: ChatCompletionRequest) -> list[int]:
    """The prompt's tokens. Raises InvalidRequestError for messages that do not fit the model's template."""
    try:
        return model.tokenizer.encode_chat(**template_arguments(body, model.dialect))
    except ChatTemplateError as error:
        raise InvalidRequestError(f"{str(error)[:300]}.", param="messages") from error


def _encode_prompt(tokenizer: Tokenizer, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        require_known(prompt, tokenizer, "prompt")
    if not prompt:
        raise InvalidRequestError("'prompt' must hold at least one token.", param="prompt")
    return prompt


def _require_tellable(body: GenerationRequest, num_prompt_tokens: int) -> None:
    """Raises InvalidRequestError when the log probabilities of the prompts would be tens of megabytes."""
    if body.num_prompt_logprobs is None:
        return
    count = num_prompt_tokens * body.num_generated * (1 + body.num_prompt_logprobs)
    if count > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"'prompt_logprobs': {count} of them are asked for, over all prompts and choices, and at most "
            f"{MAX_PROMPT_LOGPROBS} are given; ask for fewer alternatives, choices or prompts.",
            param="prompt_logprobs" if body.prompt_logprobs is not None else "logprobs",
        )


def _require_at_most(count: int, limit: int, param: str, what: str) -> None:
    if count > limit:
        raise InvalidRequestError(f"'{param}': at most {limit} {what} are allowed.", param=param)

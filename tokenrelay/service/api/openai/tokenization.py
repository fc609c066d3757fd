"""Text ↔ token ids, and chats as prompts: what clients need to count, to debug, and to build prompts of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.responses import Response

from tokenrelay.model.chat_template import ChatTemplateError
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.admission.admission import LARGE_TEXT, encode_chat
from tokenrelay.service.api.admission.sampling import require_known
from tokenrelay.service.api.assistant.prompt import template_arguments
from tokenrelay.service.api.catalogue import Catalogue
from tokenrelay.service.api.dependencies import CatalogueDep, Model
from tokenrelay.service.api.event_loop import off_loop_if_large
from tokenrelay.service.api.http.body import json_body, validate
from tokenrelay.service.api.openapi.operation import documented
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.tokenization import (
    ApplyTemplateRequest,
    ConversationFields,
    Detokenized,
    DetokenizeRequest,
    Piece,
    RenderedPrompt,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import InvalidRequestError

router = APIRouter(prefix="/v1", tags=["tokenizer"])


@router.post("/tokenize", **documented(TokenizeRequest, Tokenized, queued=False))
async def tokenize(
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))], model: Model, catalogue: CatalogueDep
) -> Response:
    """A text, or a chat as the model's template renders it, as token ids."""
    return await _answer(catalogue, body.model, body.size, lambda: _tokenized(model, body))


@router.post("/detokenize", **documented(DetokenizeRequest, Detokenized, queued=False))
async def detokenize(
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))], model: Model, catalogue: CatalogueDep
) -> Response:
    """Token ids as text, special tokens included."""
    return await _answer(catalogue, body.model, len(body.tokens), lambda: _detokenized(model.tokenizer, body.tokens))


@router.post("/apply-template", **documented(ApplyTemplateRequest, RenderedPrompt, queued=False))
async def apply_template(
    body: Annotated[ApplyTemplateRequest, Depends(json_body(ApplyTemplateRequest))],
    model: Model,
    catalogue: CatalogueDep,
) -> Response:
    """A chat as the text that the model's template makes of it."""
    return await _answer(catalogue, body.model, body.size, lambda: _rendered(model, body))


@router.get("/tokenizer_info")
async def tokenizer_info(model: Model) -> TokenizerInfo:
    """The tokenizer and the chat template that the model came with."""
    tokenizer = model.tokenizer
    return TokenizerInfo(
        tokenizer_class=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        model_max_length=model.max_model_len,
        eos_token_ids=list(tokenizer.eos_token_ids),
        special_tokens=tokenizer.special_tokens,
        chat_template=tokenizer.chat_template.source,
    )


async def _answer(catalogue: Catalogue, name: str | None, size: int, work: Callable[[], BaseModel]) -> Response:
    """The work and its writing down in one thread, if it is large: a body may hold megabytes. An adapter's tokens are
    its model's."""
    if name is not None:
        await catalogue.adapter(name)
    content = await off_loop_if_large(size, LARGE_TEXT, lambda: work().model_dump_json())
    return Response(content, media_type="application/json")


def _tokenized(model: ServedModel, body: TokenizeRequest) -> Tokenized:
    if body.text is None:
        ids = encode_chat(model, _chat(model, body))
    else:
        ids = model.tokenizer.encode(
            body.text, add_special_tokens=body.adds_special_tokens, parse_special=body.parse_special is not False
        )
    return Tokenized(
        count=len(ids),
        max_model_len=model.max_model_len,
        tokens=[_piece(model.tokenizer, i) for i in ids] if body.with_pieces else ids,
        token_strs=[model.tokenizer.spelling(i) for i in ids] if body.return_token_strs else None,
    )


def _detokenized(tokenizer: Tokenizer, token_ids: list[int]) -> Detokenized:
    require_known(token_ids, tokenizer, "tokens")
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return Detokenized(prompt=text, content=text)


def _rendered(model: ServedModel, body: ApplyTemplateRequest) -> RenderedPrompt:
    arguments = template_arguments(_chat(model, body), model.dialect)
    try:
        return RenderedPrompt(prompt=model.tokenizer.render_chat(**arguments))
    except ChatTemplateError as error:
        raise InvalidRequestError(f"{str(error)[:300]}.", param="messages") from error


def _chat(model: ServedModel, body: ConversationFields) -> ChatCompletionRequest:
    return validate(ChatCompletionRequest, body.conversation | {"model": model.name})


def _piece(tokenizer: Tokenizer, token_id: int) -> Piece:
    content = tokenizer.token_bytes(token_id)
    try:
        return Piece(id=token_id, piece=content.decode())
    except UnicodeDecodeError:
        return Piece(id=token_id, piece=list(content))

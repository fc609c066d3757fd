"""The inputs of an embedding request as token ids. What is wrong with one is told with its place."""

from __future__ import annotations

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.admission.sampling import require_known
from tokenrelay.service.api.schemas.embeddings import EmbeddingRequest
from tokenrelay.service.errors import ContextLengthExceeded, InvalidRequestError


def encode_inputs(body: EmbeddingRequest, tokenizer: Tokenizer, limit: int) -> list[list[int]]:
    """Raises InvalidRequestError for one that is empty, unknown or longer than ``limit`` tokens."""
    add_special_tokens = body.add_special_tokens is not False
    inputs = []
    for index, given in enumerate(body.inputs):
        param = "input" if body.has_one_input else f"input.{index}"
        if isinstance(given, str):
            given = tokenizer.encode(given, add_special_tokens=add_special_tokens)
        else:
            require_known(given, tokenizer, param)
        inputs.append(_fitting(given[-(body.truncate_prompt_tokens or 0) :], limit, param))
    return inputs


def _fitting(token_ids: list[int], limit: int, param: str) -> list[int]:
    if not token_ids:
        raise InvalidRequestError(f"'{param}' must hold at least one token.", param=param)
    if len(token_ids) > limit:
        raise ContextLengthExceeded(
            f"'{param}' has {len(token_ids)} tokens, and this model's context holds {limit}; shorten or split it.",
            param=param,
        )
    return token_ids


def require_dimensions(body: EmbeddingRequest, size: int) -> None:
    """Raises InvalidRequestError when more numbers are asked for than there are."""
    if body.dimensions is not None and body.dimensions > size:
        raise InvalidRequestError(
            f"'dimensions': this model's embeddings have {size}; ask for at most that.", param="dimensions"
        )

"""Between text and token ids: vLLM's fields, and llama.cpp's where they do not clash."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.chat import (
    MAX_MESSAGES,
    MAX_TEMPLATE_ARGUMENTS,
    TemplateArgument,
)
from tokenrelay.service.api.schemas.messages import ChatMessage
from tokenrelay.service.api.schemas.not_built import IN_CONVERSATIONS, Neutral
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.tools import MAX_TOOLS, FunctionTool

Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ConversationFields(RequestSchema):
    """A chat, and how the model's template is to render it."""

    not_built: ClassVar[Neutral] = IN_CONVERSATIONS

    model: str | None = Field(None, description="The served model's name. Default: that.")
    messages: Messages | None = Field(None, description="A chat, rendered by the model's template.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    chat_template_kwargs: Annotated[dict[str, TemplateArgument], Field(max_length=MAX_TEMPLATE_ARGUMENTS)] | None = None
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's turn. Default true.")
    continue_final_message: bool | None = Field(None, description="Leave the last message open. Default false.")

    @property
    def conversation(self) -> dict[str, Any]:
        """The fields of a chat completion that are set."""
        names = ConversationFields.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names}

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(message.size for message in self.messages or ()) + sum(tool.size for tool in self.tools or ())


class ApplyTemplateRequest(ConversationFields):
    messages: Messages = Field(description="A chat, rendered by the model's template.")


class TokenizeRequest(ConversationFields):
    """One of ``prompt``, ``content`` and ``messages``."""

    prompt: str | None = None
    content: str | None = Field(None, description="llama.cpp's name of prompt; no special tokens are added then.")
    add_special_tokens: bool | None = Field(
        None, description="Put the model's first token before a prompt. Default true; a chat has its template's."
    )
    add_special: bool | None = Field(None, description="llama.cpp's name of add_special_tokens. Default false.")
    parse_special: bool | None = Field(None, description="Read special tokens' spellings as such. Default true.")
    return_token_strs: bool | None = Field(None, description="Answer with the vocabulary's spellings, too.")
    with_pieces: bool | None = Field(None, description="Answer with ids and texts. (llama.cpp)")

    @property
    def size(self) -> int:
        return len(self.text or "") + super().size

    @property
    def text(self) -> str | None:
        return self.prompt if self.content is None else self.content

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens is not False if self.content is None else bool(self.add_special)

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if sum(given is not None for given in (self.prompt, self.content, self.messages)) != 1:
            raise PydanticCustomError("one_of", "send either prompt, content or messages", {"name": "prompt"})
        if self.messages is not None and (self.add_special_tokens or self.add_special):
            raise PydanticCustomError(
                "template_adds", "is only allowed with a prompt: the template adds them", {"name": "add_special_tokens"}
            )
        return self


class DetokenizeRequest(RequestSchema):
    model: str | None = Field(None, description="The served model's name. Default: that.")
    tokens: list[int]


class Piece(BaseModel):
    """A token's text; its bytes, if they are only a part of a character."""

    id: int
    piece: str | list[int]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int] | list[Piece]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str
    content: str = Field(description="The same, under llama.cpp's name.")


class RenderedPrompt(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str = Field(description="The kind of its model: BPE, Unigram …")
    vocab_size: int
    model_max_length: int
    eos_token_ids: list[int]
    special_tokens: dict[str, int]
    chat_template: str | None

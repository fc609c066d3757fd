"""What a response is made from: messages, calls of functions, their outputs, and earlier thoughts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.messages import MAX_PARTS
from tokenrelay.service.api.schemas.not_built import Neutral
from tokenrelay.service.api.schemas.request_schema import RequestSchema

MAX_ITEM_ID_CHARACTERS = 64

Model = TypeVar("Model", bound=BaseModel)
ItemId = Annotated[str, Field(max_length=MAX_ITEM_ID_CHARACTERS)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ItemTextPart(RequestSchema):
    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Of an earlier answer; have no effect here.")
    logprobs: list[Any] | None = Field(None, description="Of an earlier answer; have no effect here.")


class RefusalPart(RequestSchema):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def chosen(kinds: dict[str, type[Model]], default: str = "") -> BeforeValidator:
    """Of several schemas the one that ``type`` names, so that an error is about that one. Others are refused by name.

    ``default`` is meant by an object without a type.
    """

    def read(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        kind = value.get("type", default) if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            known = ", ".join(kinds)
            raise PydanticCustomError(
                "unsupported_parameter", "is not supported by this server; it knows {known}", {"known": known}
            )
        return kinds[kind].model_validate(value)

    return BeforeValidator(read)


_PARTS: dict[str, type[RequestSchema]] = {
    "input_text": ItemTextPart,
    "output_text": ItemTextPart,
    "reasoning_text": ItemTextPart,
    "refusal": RefusalPart,
}
Part = Annotated[ItemTextPart | RefusalPart, chosen(_PARTS)]
Content = str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


def text_of(content: Content) -> str:
    """Parts are joined by line breaks, as in a chat completion."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class MessageItem(RequestSchema):
    not_built: ClassVar[Neutral] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: ItemId | None = None
    status: ItemStatus | None = None


class FunctionCallItem(RequestSchema):
    """A call that the model made earlier."""

    not_built: ClassVar[Neutral] = {"caller": (), "namespace": ()}

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: ItemId | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(RequestSchema):
    """What your function returned."""

    not_built: ClassVar[Neutral] = {"caller": (), "namespace": (), "name": ()}

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: ItemId | None = None
    status: ItemStatus | None = None


class ReasoningInputItem(RequestSchema):
    """What the model thought earlier."""

    not_built: ClassVar[Neutral] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: Content | None = None
    id: ItemId | None = None
    status: ItemStatus | None = None


class ItemReference(RequestSchema):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: ItemId


_ITEMS: dict[str, type[RequestSchema]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningInputItem,
    "item_reference": ItemReference,
}
InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningInputItem | ItemReference,
    chosen(_ITEMS, default="message"),
]

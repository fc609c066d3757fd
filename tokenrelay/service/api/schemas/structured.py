"""What the text must be: a schema, a regex, a choice or a grammar, under OpenAI's, vLLM's, llama.cpp's and SGLang's
names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.not_built import IN_STRUCTURED_OUTPUTS, Neutral
from tokenrelay.service.api.schemas.request_schema import RequestSchema

MAX_CHOICES = 4096
MAX_NAME_CHARACTERS = 64

Choice = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Schema = dict[str, Any]


class Structure(NamedTuple):
    """One wish. ``param`` is where it came from, ``kind`` names the maker of ``model.structured.grammars``."""

    param: str
    kind: Literal["json_schema", "regex", "choice", "ebnf", "ready"]
    source: Any


ANY_OBJECT: Schema = {"type": "object"}


class JsonSchemaFormat(RequestSchema):
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    json_schema: Schema = Field(alias="schema", description="The JSON schema; its properties come in its order.")
    description: str | None = Field(None, description="What it is for; has no effect here.")
    strict: bool | None = Field(None, description="Has no effect: the schema is always kept.")


class ResponseFormat(RequestSchema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "schema_and_type", 'belongs to type "json_schema", and that to it', {"name": "json_schema"}
            )
        return self


class StructuredOutputs(RequestSchema):
    """vLLM's."""

    not_built: ClassVar[Neutral] = IN_STRUCTURED_OUTPUTS

    json_schema: Schema | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="GBNF or Lark.")
    json_object: bool | None = None


class StructuredFields(BaseModel):
    """At most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = Field(None, description="Older name of structured_outputs.json.")
    guided_regex: str | None = Field(None, description="Older name of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="Older name of structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="Older name of structured_outputs.grammar.")
    grammar: str | None = Field(None, description="llama.cpp's: GBNF, or Lark.")
    json_schema: Schema | None = Field(None, description="llama.cpp's: a JSON schema.")
    regex: str | None = Field(None, description="SGLang's.")
    ebnf: str | None = Field(None, description="SGLang's: GBNF, or Lark.")

    @property
    def structure(self) -> Structure | None:
        return next(self._structures(), None)

    @model_validator(mode="after")
    def _one_structure(self) -> StructuredFields:
        first, second, *_ = [*(structure.param for structure in self._structures()), None, None]
        if first and second:
            raise PydanticCustomError(
                "two_structures", "contradicts '{first}'; send one of them", {"name": second, "first": first}
            )
        return self

    def _structures(self) -> Iterator[Structure]:
        if self.response_format is not None:
            yield from _of_response_format(self.response_format)
        if self.structured_outputs is not None:
            yield from _of_structured_outputs(self.structured_outputs)
        yield from _given(
            Structure("guided_json", "json_schema", self.guided_json),
            Structure("guided_regex", "regex", self.guided_regex),
            Structure("guided_choice", "choice", self.guided_choice),
            Structure("guided_grammar", "ebnf", self.guided_grammar),
            Structure("grammar", "ebnf", self.grammar or None),  # llama.cpp's clients send an empty one for none
            Structure("json_schema", "json_schema", self.json_schema),
            Structure("regex", "regex", self.regex),
            Structure("ebnf", "ebnf", self.ebnf),
        )


def _given(*structures: Structure) -> Iterator[Structure]:
    return (structure for structure in structures if structure.source is not None)


def _of_response_format(given: ResponseFormat) -> Iterator[Structure]:
    if given.json_schema is not None:
        yield Structure("response_format.json_schema.schema", "json_schema", given.json_schema.json_schema)
    elif given.type == "json_object":
        yield Structure("response_format", "json_schema", ANY_OBJECT)


def _of_structured_outputs(given: StructuredOutputs) -> Iterator[Structure]:
    return _given(
        Structure("structured_outputs.json", "json_schema", given.json_schema),
        Structure("structured_outputs.regex", "regex", given.regex),
        Structure("structured_outputs.choice", "choice", given.choice),
        Structure("structured_outputs.grammar", "ebnf", given.grammar),
        Structure("structured_outputs.json_object", "json_schema", ANY_OBJECT if given.json_object else None),
    )

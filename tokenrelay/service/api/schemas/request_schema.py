"""What every JSON object from a client has in common: strict types, finite numbers, no unknown fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from tokenrelay.service.api.schemas.not_built import Neutral, asks_for_nothing


class RequestSchema(BaseModel):
    """A JSON object from a client. ``not_built`` lists the parameters it may only carry with a neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    not_built: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in cls.not_built.keys() & fields.keys():
            if not asks_for_nothing(fields[name], cls.not_built[name]):
                raise PydanticCustomError(
                    "unsupported_parameter", "is not supported by this server; leave it out", {"name": name}
                )
        return {name: value for name, value in fields.items() if name not in cls.not_built}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, neutral in cls.not_built.items():
            properties[name] = {"enum": [None, *neutral], "description": "Not built: only values that ask for nothing."}
        return schema

"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.settings import ADAPTER_NAME

Name = Annotated[
    str,
    Field(
        pattern=ADAPTER_NAME, max_length=256, description="What clients send as `model`: letters, digits and `._:/-`."
    ),
]


class LoadAdapterRequest(RequestSchema):
    lora_name: Name
    lora_path: str = Field(
        min_length=1, max_length=4096, description="PEFT's folder, as this server and its workers see it."
    )
    load_inplace: bool | None = Field(None, description="Replace an adapter of this name. Default false.")


class UnloadAdapterRequest(RequestSchema):
    lora_name: Name


class UnloadedAdapter(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True

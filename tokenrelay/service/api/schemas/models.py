"""GET /v1/models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenrelay"
    max_model_len: int
    parent: str | None = Field(None, description="Of an adapter: the model it changes.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]

"""GET /v1/usage: what a tenant used."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class UsageCounts(BaseModel):
    requests: int
    prompt_tokens: int
    cached_tokens: int = Field(description="Of the prompt tokens: found in the prefix cache.")
    completion_tokens: int


class DayUsage(UsageCounts):
    date: str = Field(description="As 2026-11-22, in UTC.")


class TenantUsage(BaseModel):
    object: Literal["usage"] = "usage"
    tenant: str
    total: UsageCounts
    days: list[DayUsage]

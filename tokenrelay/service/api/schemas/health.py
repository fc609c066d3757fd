"""What orchestrators are told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Ready(BaseModel):
    status: Literal["ok"] = "ok"


class Unready(BaseModel):
    status: Literal["unavailable"] = "unavailable"
    reason: str


class Version(BaseModel):
    version: str

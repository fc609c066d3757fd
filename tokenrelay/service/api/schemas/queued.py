"""What every route that queues its work takes, whatever the work is."""

from __future__ import annotations

from pydantic import Field

from tokenrelay.service.api.schemas.request_schema import RequestSchema

MAX_PRIORITY = 100  # either way: what the queue's order has room for
MAX_SALT_CHARACTERS = 256
MAX_TIMEOUT_SECONDS = 24 * 3600  # what the broker keeps of a live request


class QueuedRequest(RequestSchema):
    """A null is as good as a field left out."""

    model: str = Field(description="The served model's name, as in GET /v1/models.")
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="Use only so many last tokens of the prompt.")
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower is served sooner. Default 0."
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_SALT_CHARACTERS,
        description="Cached prefixes are shared only with requests of the same salt.",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_SECONDS,
        description="Seconds until the request must be done, its time in the queue included.",
    )
    user: str | None = Field(None, description="Your end user; has no effect here.")

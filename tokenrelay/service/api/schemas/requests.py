"""What is told about requests by their ids."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ChoiceProgress(BaseModel):
    index: int
    completion_tokens: int
    finish_reason: str | None


class TimelineEntry(BaseModel):
    """Only the fields that say something about the event are there."""

    at: float = Field(description="Unix time in seconds, of the broker's clock.")
    event: Literal["queued", "claimed", "first_token", "preempted", "resumed", "requeued", "finished"]
    worker: str | None = Field(None, description="Who claimed it.")
    epoch: int | None = Field(None, description="Counts the claims.")
    prompt: int | None = Field(None, description="Which prompt's, if the request has several.")


class RequestStatus(BaseModel):
    """Of several prompts: the sums, and the state of the slowest."""

    id: str = Field(description="That of the response object.")
    object: Literal["request"] = "request"
    created: int
    model: str
    state: Literal["waiting", "running", "finished"]
    outcome: str | None = Field(description="The finish_reason, or an error's code, once it is finished.")
    queue_position: int | None = Field(description="While it waits: requests that will be claimed before it.")
    attempts: int = Field(description="Workers that tried since it last made progress.")
    epoch: int = Field(description="Claims so far.")
    on_disconnect: Literal["cancel", "continue"]
    deadline: float | None = Field(description="Unix time in seconds, of the broker's clock.")
    prompt_tokens: int
    computed_prompt_tokens: int = Field(description="Of these, how many the model has seen.")
    choices: list[ChoiceProgress]
    last_event_id: str = Field(description="The newest there is: a stream after it begins with what comes next.")
    timeline: list[TimelineEntry]


class Cancellation(BaseModel):
    """The answer to a cancellation, which may be repeated."""

    id: str
    object: Literal["request.cancellation"] = "request.cancellation"
    was: Literal["waiting", "running", "finished"] = Field(
        description="The request's state: it has ended, its worker was told to end it, or it was too late."
    )

"""From what the broker knows of a request to what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tokenrelay.service.api.lifecycle.cursor import Cursor
from tokenrelay.service.api.schemas.requests import ChoiceProgress, RequestStatus, TimelineEntry
from tokenrelay.service.messages import Event
from tokenrelay.service.request_records import Moment, RequestRecord

Log = Sequence[tuple[int, Event]]


def status_of(answer_id: str, records: Sequence[RequestRecord], logs: Sequence[Log]) -> RequestStatus:
    """``records`` and ``logs``: one per prompt."""
    answer = records[0].answer
    positions = [record.position for record in records if record.position is not None]
    return RequestStatus(
        id=answer_id,
        object="request",
        created=answer.created,
        model=answer.model,
        state=_state({record.state for record in records}),
        outcome=_outcome(logs),
        queue_position=max(positions, default=None),
        attempts=max(record.attempts for record in records),
        epoch=max(record.epoch for record in records),
        on_disconnect=answer.on_disconnect,
        deadline=records[0].deadline,
        prompt_tokens=sum(record.answer.num_prompt_tokens for record in records),
        computed_prompt_tokens=sum(map(_num_computed, records, logs)),
        choices=[choice for record, log in zip(records, logs, strict=True) for choice in _choices(record, log)],
        last_event_id=str(Cursor.behind([log[-1][0] if log else 0 for log in logs])),
        timeline=_timeline(records),
    )


def _state(states: set[str]) -> Literal["waiting", "running", "finished"]:
    if states == {"finished"}:
        return "finished"
    return "waiting" if states == {"waiting"} else "running"


def _outcome(logs: Sequence[Log]) -> str | None:
    """How the last of the prompts ended; an error counts before a finish reason."""
    ends = [log[-1][1] for log in logs if log and log[-1][1].terminal]
    if len(ends) < len(logs):
        return None
    errors = [end.error.code for end in ends if end.error]
    return errors[0] if errors else ends[-1].finish_reason


def _num_computed(record: RequestRecord, log: Log) -> int:
    """A token, or an embedding, can only have come behind the whole prompt."""
    num_prompt_tokens = record.answer.num_prompt_tokens
    begun = any(event.token_ids or event.embedding for _, event in log)
    return num_prompt_tokens if begun else min(record.num_computed_prompt_tokens, num_prompt_tokens)


def _choices(record: RequestRecord, log: Log) -> list[ChoiceProgress]:
    num_tokens = [0] * record.answer.num_generated
    reasons: list[str | None] = [None] * record.answer.num_generated
    for _, event in log:
        num_tokens[event.choice] += len(event.token_ids)
        reasons[event.choice] = event.finish_reason or reasons[event.choice]
    first = record.answer.prompt * record.answer.num_generated
    return [
        ChoiceProgress(index=first + i, completion_tokens=count, finish_reason=reason)
        for i, (count, reason) in enumerate(zip(num_tokens, reasons, strict=True))
    ]


def _timeline(records: Sequence[RequestRecord]) -> list[TimelineEntry]:
    """Of all prompts, in the order of time."""
    entries = [
        TimelineEntry(**_fields(moment), **({"prompt": record.answer.prompt} if len(records) > 1 else {}))
        for record in records
        for moment in record.timeline
    ]
    return sorted(entries, key=lambda entry: entry.at)


def _fields(moment: Moment) -> dict[str, Any]:
    return {name: value for name, value in moment._asdict().items() if value}

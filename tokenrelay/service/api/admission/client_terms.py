"""From a request's body and headers to its terms: how to answer it, until when, and whether it is a repetition."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence

from fastapi import Request

from tokenrelay.service.api.admission.answer_specs import AnyBody, Wording, answer_specs
from tokenrelay.service.api.schemas.queued import MAX_TIMEOUT_SECONDS, QueuedRequest
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import InvalidRequestError
from tokenrelay.service.messages import Submission
from tokenrelay.service.terms import Terms

IDEMPOTENCY_KEY = "Idempotency-Key"
TIMEOUT = "X-Request-Timeout"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def terms_of(
    request: Request,
    body: AnyBody,
    wording: Wording,
    submissions: Sequence[Submission],
    model: ServedModel,
    default_timeout: float,
) -> list[Terms]:
    """One per submission; an idempotency key, which stands for all of them, with the first. Raises
    InvalidRequestError."""
    first, *others = answer_specs(body, wording, submissions, model)
    timeout, key = _timeout(request, body) or default_timeout, _idempotency_key(request)
    fingerprint = _fingerprint(request, body, wording) if key else ""
    limits = request.state.tenant.limits
    return [
        Terms(first, timeout, key, fingerprint, limits=limits),
        *(Terms(spec, timeout, limits=limits) for spec in others),
    ]


def _timeout(request: Request, body: QueuedRequest) -> float | None:
    """Seconds, the shorter of what header and body ask for."""
    given = request.headers.get(TIMEOUT)
    try:
        in_header = math.inf if given is None else float(given)
    except ValueError:
        in_header = math.nan
    if given is not None and not 0 < in_header <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequestError(
            f"'{TIMEOUT}' must be a number of seconds, above 0 and at most {MAX_TIMEOUT_SECONDS}.", param=TIMEOUT
        )
    shortest = min(in_header, math.inf if body.timeout is None else body.timeout)
    return None if math.isinf(shortest) else shortest


def _idempotency_key(request: Request) -> str:
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError(
            f"'{IDEMPOTENCY_KEY}' must be 1 to 255 visible ASCII characters; a UUID will do.", param=IDEMPOTENCY_KEY
        )
    return key or ""


def _fingerprint(request: Request, body: QueuedRequest, wording: Wording) -> str:
    """Of everything that decides the answer. A null is as good as a field left out."""
    extra = json.dumps(wording.extra, sort_keys=True)
    content = f"{request.scope['path']}\n{extra}\n{body.model_dump_json(exclude_none=True)}"
    return hashlib.sha256(content.encode()).hexdigest()

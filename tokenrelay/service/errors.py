"""Every error a client can meet, as one tree. Each class knows its HTTP status and OpenAI error fields.

::

    ServiceError                     500 server_error           internal_error
    ├── InvalidRequestError          400 invalid_request_error  (code per case)
    │   ├── UnsupportedParameter     400 invalid_request_error  unsupported_parameter
    │   ├── InvalidGrammar           400 invalid_request_error  invalid_grammar
    │   ├── ContextLengthExceeded    400 invalid_request_error  context_length_exceeded
    │   ├── Unauthorized             401 invalid_request_error  invalid_api_key
    │   ├── Forbidden                403 invalid_request_error  forbidden
    │   ├── RequestTimeout           408 invalid_request_error  request_timeout
    │   ├── RequestTooLarge          413 invalid_request_error  request_too_large
    │   ├── UnsupportedMediaType     415 invalid_request_error  unsupported_media_type
    │   ├── IdempotencyKeyReused     422 invalid_request_error  idempotency_key_reused
    │   ├── NotFoundError            404 invalid_request_error  not_found / model_not_found
    │   └── Cancelled                499 invalid_request_error  cancelled
    ├── RateLimited                  429 rate_limit_error       rate_limit_exceeded     retryable
    ├── Unavailable                  503 server_error                                   retryable
    │   ├── QueueFull                503 server_error           server_is_overloaded    retryable
    │   ├── DeadlineUnreachable      503 server_error           deadline_unreachable    retryable
    │   ├── BrokerUnavailable        503 server_error           broker_unavailable      retryable
    │   └── NoWorker                 503 server_error           no_worker               retryable
    ├── DeadlineExceeded             504 server_error           deadline_exceeded
    ├── WorkerLost                   500 server_error           worker_lost
    └── AdapterUnavailable           500 server_error           adapter_unavailable
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of the tree: something of ours failed.

    Args:
        message: one sentence for the client: what is wrong and the remedy. Never a prompt, key or traceback.
        param: the request field at fault, if one is.
        code: replaces the class's code where one class has several.
        retry_after: seconds until a retry makes sense; sent as Retry-After.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    retryable: ClassVar[bool] = False
    headers: Mapping[str, str] = MappingProxyType({})  # that its response carries

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error in the OpenAI shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ServiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequestError):
    code = "unsupported_parameter"


class InvalidGrammar(InvalidRequestError):
    """A schema, regex or grammar that cannot be followed; sometimes this shows only while a text is written."""

    code = "invalid_grammar"


class ContextLengthExceeded(InvalidRequestError):
    code = "context_length_exceeded"


class RequestTimeout(InvalidRequestError):
    status = 408
    code = "request_timeout"


class RequestTooLarge(InvalidRequestError):
    status = 413
    code = "request_too_large"


class UnsupportedMediaType(InvalidRequestError):
    status = 415
    code = "unsupported_media_type"


class IdempotencyKeyReused(InvalidRequestError):
    """422 as in the IETF's draft of the header: clients retry a 409, and this one would never succeed."""

    status = 422
    code = "idempotency_key_reused"


class Unauthorized(InvalidRequestError):
    """Without a key, or with one that is unknown. The header is what RFC 6750 asks for."""

    status = 401
    code = "invalid_api_key"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class Forbidden(InvalidRequestError):
    """The key is known, and not meant for this."""

    status = 403
    code = "forbidden"


class NotFoundError(InvalidRequestError):
    status = 404
    code = "not_found"


class Cancelled(InvalidRequestError):
    """Met by another reader of a request whose own client gave it up."""

    status = 499
    code = "cancelled"


class RateLimited(ServiceError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class Unavailable(ServiceError):
    status = 503
    code = "unavailable"
    retryable = True


class QueueFull(Unavailable):
    code = "server_is_overloaded"


class DeadlineUnreachable(Unavailable):
    """The queue is too long for the request to be begun in time."""

    code = "deadline_unreachable"


class BrokerUnavailable(Unavailable):
    code = "broker_unavailable"


class NoWorker(Unavailable):
    code = "no_worker"


class DeadlineExceeded(ServiceError):
    status = 504
    code = "deadline_exceeded"


class WorkerLost(ServiceError):
    code = "worker_lost"


class AdapterUnavailable(ServiceError):
    """The worker that has the request cannot load its adapter: the files are not there, or not the same any more."""

    code = "adapter_unavailable"

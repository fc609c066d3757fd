"""What travels through the broker: versioned, schema-checked msgpack. Never pickle.

A newer sender may add fields: they are ignored. An unknown version is refused. ``Event`` is the unit of the
token log and of a client's ``Last-Event-ID``: event ``index`` of a request, counted from 1.
"""

from __future__ import annotations

import msgspec

from tokenrelay.model.sampling_params import Pooling, SamplingParams, TokenLogprobs
from tokenrelay.service.tenants import DEFAULT_TENANT

VERSION = 1  # what messages are written in …
ADAPTER_VERSION = 2  # … but a submission with an adapter: who knows of none must leave it alone
NEWEST = ADAPTER_VERSION  # of submissions that are read here
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)  # what decoders raise: text that is no UTF-8 is an error apart


class MessageError(ValueError):
    """A payload that is not a message of ours, or of a version we do not speak."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A LoRA adapter (PEFT's two files in the folder ``path``) under the name that clients use as a model's.

    ``digest`` is of the files: whoever loads another content under this path notices.
    """

    name: str
    path: str
    digest: str
    created: int = 0  # Unix time in seconds


class Submission(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted request, as the API hands it to whichever worker claims it.

    ``weight`` is the tenant's share of the queue. ``cache_salt`` divides its prefix cache further. A lower ``priority``
    is served sooner. ``prompt_only`` asks for no output at all: the one token that is sampled anyway is dropped, and
    counted nowhere. With ``pooling`` nothing is sampled: the answer is the prompt's embedding.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    tenant: str = DEFAULT_TENANT.name
    weight: float = 1.0
    cache_salt: str = ""
    priority: int = 0
    skip_special_tokens: bool = True
    prompt_only: bool = False
    pooling: Pooling | None = None
    adapter: Adapter | None = None
    version: int = msgspec.field(default_factory=lambda: VERSION)  # a factory, or it would be left out when encoded

    def __post_init__(self) -> None:
        if self.adapter is not None and self.version < ADAPTER_VERSION:
            raise ValueError(f"a submission with an adapter is of version {ADAPTER_VERSION}, not {self.version}")

    @property
    def cost(self) -> int:
        """Tokens this request may occupy: what fair queueing and admission count."""
        num_choices = 0 if self.pooling else max(self.params.n, self.params.beam_width)
        return len(self.prompt_token_ids) + num_choices * self.params.max_tokens

    @property
    def turn(self) -> int:
        """Virtual time in which fair queueing lets its tenant have no other: twice the weight, half the time."""
        return max(1, round(self.cost / self.weight))

    @property
    def prompt_tail(self) -> list[int]:
        """The prompt's last tokens: the output may complete a character, of up to four bytes, that was begun there."""
        return self.prompt_token_ids[-4:]


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of a whole request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    forgotten_tokens: int = 0  # of the longest choice: too far back for attention to see any more


class Error(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request failed, in the fields of ``errors.ServiceError``."""

    message: str
    code: str
    status: int = 500


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of a request's log.

    ``token_ids`` are the ids sampled in this step for one choice; ``text`` is what became printable, which lags
    behind the ids while a stop string or a UTF-8 sequence is incomplete. ``logprobs`` has one entry per token id,
    ``prompt_logprobs`` one per prompt token, None for the first, and comes with the log's first event; both only if
    asked for. ``mirostat_mu`` is the sampler's state behind these tokens, which a resumed choice begins with.
    ``embedding``, float32 numbers, little endian, is all that comes of a pooled prompt. ``finish_reason`` ends the
    choice, and ``stop_string`` is what made it ``stop``, unless a token did. The entry with ``usage`` or ``error`` is
    terminal: exactly one, the last of the log.
    """

    choice: int = 0
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] = []
    mirostat_mu: float | None = None
    embedding: bytes = b""
    finish_reason: str | None = None
    stop_string: str = ""
    usage: Usage | None = None
    error: Error | None = None

    @property
    def terminal(self) -> bool:
        return self.usage is not None or self.error is not None


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """One event on its way to a client, through the mailbox of the client's API process."""

    request_id: str
    index: int
    event: Event


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model worker announces of itself, several times a lease.

    ``stalled``: its engine has been at one step for far longer than usual. ``spare``: it claims nothing while enough
    others live. ``protocol`` is the newest version of a submission it can read.
    """

    worker_id: str
    model: str
    max_model_len: int
    step_counter: int  # grows while the engine lives
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    draining: bool = False
    stalled: bool = False
    spare: bool = False
    version: str = ""
    protocol: int = msgspec.field(default_factory=lambda: NEWEST)

    @property
    def active(self) -> bool:
        """Whether it takes new requests, and works on them."""
        return not (self.draining or self.stalled or self.spare)


_encoder = msgspec.msgpack.Encoder()
_submission = msgspec.msgpack.Decoder(Submission)
_event = msgspec.msgpack.Decoder(Event)
_deliveries = msgspec.msgpack.Decoder(list[Delivery])
_facts = msgspec.msgpack.Decoder(WorkerFacts)
_adapter = msgspec.msgpack.Decoder(Adapter)

encode = _encoder.encode


def decode_submission(payload: bytes) -> Submission:
    """Raises MessageError when the payload is malformed, out of range or of an unknown version."""
    try:
        submission = _submission.decode(payload)
    except (msgspec.DecodeError, ValueError) as error:
        raise MessageError(f"not a submission: {error}") from error
    if not VERSION <= submission.version <= NEWEST:
        raise MessageError(f"submission of version {submission.version}, this process speaks {VERSION} to {NEWEST}")
    return submission


def decode_event(payload: bytes) -> Event:
    """Raises MessageError when the payload is malformed."""
    try:
        return _event.decode(payload)
    except UNREADABLE as error:
        raise MessageError(f"not an event: {error}") from error


def decode_deliveries(payload: bytes) -> list[Delivery]:
    """Raises MessageError when the payload is malformed."""
    try:
        return _deliveries.decode(payload)
    except UNREADABLE as error:
        raise MessageError(f"not a mailbox entry: {error}") from error


def decode_facts(payload: bytes) -> WorkerFacts:
    """Raises MessageError when the payload is malformed."""
    try:
        return _facts.decode(payload)
    except UNREADABLE as error:
        raise MessageError(f"not a worker's announcement: {error}") from error


def decode_adapter(payload: bytes) -> Adapter:
    """Raises MessageError when the payload is malformed."""
    try:
        return _adapter.decode(payload)
    except UNREADABLE as error:
        raise MessageError(f"not an adapter: {error}") from error

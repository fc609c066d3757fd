"""What a client asks for beside the computation: how to be answered, until when, and whether this is a repetition.

The broker keeps the ``AnswerSpec`` as long as the log, so that any API process can render any request's log, in the
chunks that the process which accepted it would have sent.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from tokenrelay.service.lua import packed
from tokenrelay.service.messages import VERSION, MessageError, encode

Route = Literal["chat", "completion", "responses", "messages", "ollama_chat", "ollama_generate"]
_NUMBERING = ("responses", "messages")  # routes whose events count those before them


class AnswerSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one prompt's output becomes chunks, or an answer. A newer version may add fields: they are ignored.

    ``n`` choices are answered with, the best of ``num_generated``. ``echo`` is text in front of each choice.
    ``prompt_token_ids`` and ``prompt_tail`` (its last few) are only there if the answer tells something about them: a
    finished request's prompt is kept no longer than it is needed. ``extra`` is the route's own, in words of msgpack.
    """

    route: Route
    model: str  # as the client called it
    created: int  # Unix time in seconds
    num_prompt_tokens: int
    prompt: int = 0  # which of the HTTP request's prompts this is …
    num_prompts: int = 1  # … and how many there are, each a queued request of its own
    n: int = 1
    num_generated: int = 1
    include_usage: bool = False
    include_queue: bool = False  # tell the place in the queue …
    return_progress: bool = False  # … and the prompt's progress, before there is any text
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    skip_special_tokens: bool = True
    echo: str | None = None
    prompt_token_ids: list[int] = []
    prompt_tail: list[int] = []
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    tool_format: str = ""  # how calls of tools stand in the text …
    reasoning_format: str = ""  # … and reasoning; "": nothing in it is meant so
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    system_fingerprint: str = ""  # of what decides the text beside the request
    service_tier: str = ""  # as it was granted, if one was asked for
    include_continuous_usage: bool = False  # with every chunk …
    include_timings: bool = False  # … and how long it took, at the end
    extra: dict[str, Any] = {}
    version: int = msgspec.field(default_factory=lambda: VERSION)  # a factory, or it would be left out when encoded

    @property
    def looks_back(self) -> bool:
        """Whether chunks depend on those before them, so that reading on means rendering from the beginning."""
        tells_of_prompt = self.num_prompt_logprobs is not None or self.echo is not None or self.return_token_ids
        has_offsets = self.route == "completion" and self.num_logprobs is not None
        needs_text = self.counts_or_parses or self.route in _NUMBERING
        return self.num_prompts > 1 or tells_of_prompt or has_offsets or needs_text

    @property
    def counts_or_parses(self) -> bool:
        """Whether chunks tell sums, or the text is more than an answer."""
        return bool(self.include_continuous_usage or self.tool_format or self.reasoning_format)

    @property
    def asks_for_interim(self) -> bool:
        """Whether a stream has something to say before its first text."""
        return self.include_queue or self.return_progress


class Terms(NamedTuple):
    """What is submitted together with a request. ``timeout`` is in seconds; 0: none.

    ``fingerprint`` identifies the body that an idempotency key stands for.
    """

    answer: AnswerSpec | None = None
    timeout: float = 0.0
    idempotency_key: str = ""
    fingerprint: str = ""

    @property
    def encoded(self) -> bytes:
        answer = encode(self.answer) if self.answer else b""
        return encode([packed(answer), round(self.timeout * 1000), self.fingerprint])


NO_TERMS = Terms()

_decoder = msgspec.msgpack.Decoder(AnswerSpec)


def decode_answer_spec(payload: bytes) -> AnswerSpec:
    """Raises MessageError when the payload is malformed or of an unknown version."""
    try:
        spec = _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise MessageError(f"not an answer's description: {error}") from error
    if spec.version != VERSION:
        raise MessageError(f"an answer's description of version {spec.version}, this process speaks {VERSION}")
    return spec


def part_ids(relay_id: str, num_prompts: int) -> list[str]:
    """The ids of the queued requests that one HTTP request consists of."""
    return [relay_id] if num_prompts == 1 else [f"{relay_id}-{i}" for i in range(num_prompts)]

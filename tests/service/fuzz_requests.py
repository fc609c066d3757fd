"""Request bodies at random, each a function of its seed: mostly valid ones over all parameters, and damaged ones.

The schemas say which parameters there are and what they allow; the makers below give those a sense that no schema can
tell: a prompt, a grammar, token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.service.fuzz_structures import STRUCTURES
from tests.service.fuzz_values import TEXTS, WEIRD, Maker, Values
from tests.service.tiny_model import CONTEXT, VOCABULARY
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import CompletionRequest
from tokenrelay.service.api.schemas.request import GenerationRequest

Body = dict[str, Any]

ROUTES: Mapping[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
SCHEMAS = {route: schema.model_json_schema() for route, schema in ROUTES.items()}


@dataclass(frozen=True, slots=True)
class FuzzedRequest:
    """What is sent, and whether the client closes its connection early."""

    seed: int
    route: str
    content: bytes
    headers: Mapping[str, str]
    leaves_after_lines: int | None  # of a stream
    leaves_after_seconds: float | None  # whatever has come until then

    @property
    def body(self) -> Body:
        """Only of an accepted request: then it is a JSON object."""
        body: Body = json.loads(self.content)
        return body

    @property
    def has_deadline(self) -> bool:
        return "X-Request-Timeout" in self.headers or b'"timeout"' in self.content


def fuzzed_request(seed: int, model: str) -> FuzzedRequest:
    """Always the same for the same arguments and schemas."""
    random = Random(seed)
    route = random.choice(list(ROUTES))
    body = _sensible_body(random, route, model)
    damage = random.choices((None, _misfit, _misplace, _misname, _omit), (74, 9, 7, 2, 1))[0]
    if damage:
        damage(random, route, body)
    content = _serialized(random, body)
    lines = random.randint(1, 20) if random.random() < 0.05 else None
    seconds = random.uniform(0, 0.5) if random.random() < 0.03 else None
    return FuzzedRequest(seed, route, content, _headers(random), lines, seconds)


# --- a body that makes sense ------------------------------------------------------------------------------------------


def _sensible_body(random: Random, route: str, model: str) -> Body:
    """A few parameters of many. Rules between them are mostly kept, so that most such bodies run."""
    schema = SCHEMAS[route]
    properties = schema["properties"]
    values = Values(random, schema["$defs"])
    prompt = "messages" if "messages" in properties else "prompt"
    body = {"model": model, prompt: MAKERS[prompt](random), "stream": random.random() < 0.5}
    if random.random() < 0.95:
        body["max_tokens"] = MAKERS["max_tokens"](random)
    for name in _some_names(random, properties):
        body[name] = MAKERS[name](random) if name in MAKERS else values.fitting(properties[name])
    if random.random() < 0.2:
        body |= random.choice(STRUCTURES)(random)
    if random.random() < 0.1:
        body |= _neutral(random, route)
    return body if random.random() < 0.04 else _reconciled(random, body)


def _some_names(random: Random, properties: Mapping[str, Any]) -> list[str]:
    """A few of all, or most of those that meet in one place of the engine."""
    if random.random() < 0.5:
        weights = [WEIGHTS.get(name, 1.0) for name in properties]
        return random.choices(list(properties), weights, k=random.choice((0, 1, 2, 3, 4, 6, 9)))
    group = random.choice(THAT_MEET)
    return [name for name in group if name in properties and random.random() < 0.7]


def _neutral(random: Random, route: str) -> Body:
    """A parameter that is not built, asking for nothing."""
    name = random.choice(sorted(ROUTES[route].not_built))
    return {name: random.choice([None, *ROUTES[route].not_built[name]])}


def _reconciled(random: Random, body: Body) -> Body:
    """Without the contradictions that a random choice of parameters is full of."""
    if body.get("use_beam_search"):
        body = {name: value for name, value in body.items() if name in BESIDE_BEAMS} | {"stream": False}
        body["n"], body["best_of"] = random.randint(1, 3), random.randint(3, 10)
    for name, needed in NEEDS.items():
        if body.get(name) not in (None, False, 0) and not body.get(needed):
            body.pop(name)
    if (body.get("best_of") or 1) < (body.get("n") or 1) or body.get("stream"):
        body.pop("best_of", None)
    for name, other in ONE_OF:
        if name in body and other in body:
            del body[other]
    if body.get("min_tokens") and body["min_tokens"] > (body.get("max_tokens") or 16):
        del body["min_tokens"]
    if body.get("max_tokens") == 0:
        body["prompt_logprobs"] = random.randint(0, 3)
    return body


def _prompt(random: Random) -> Any:
    kind = random.choices(("text", "ids", "texts", "lists", "long"), (45, 25, 10, 10, 10))[0]
    if kind == "text":
        return _text(random)
    if kind == "ids":
        return _token_ids(random, random.randint(1, 40))
    if kind == "texts":
        return [_text(random) for _ in range(random.randint(1, 4))]
    if kind == "lists":
        return [_token_ids(random, random.randint(1, 20)) for _ in range(random.randint(1, 4))]
    return _long_prompt(random)


def _long_prompt(random: Random) -> Any:
    """Near the end of the context and behind it, and prompts that hold nothing, or no tokens of this vocabulary."""
    near = _token_ids(random, CONTEXT - random.randint(-2, 14))
    strange: tuple[Any, ...] = ("", [""], [], [[]], [VOCABULARY], [-1], [2**40], [[0], [VOCABULARY]], "word " * 2000)
    return near if random.random() < 0.6 else random.choice(strange)


def _messages(random: Random) -> list[Body]:
    if random.random() < 0.05:
        return [{"role": "user", "content": "word " * random.choice((60, 90, 100, 2000))}]
    roles = ("system", "developer", "user", "assistant", "tool")
    return [_message(random, random.choice(roles)) for _ in range(random.choice((1, 1, 2, 3, 5)))]


def _message(random: Random, role: str) -> Body:
    parts = [{"type": "text", "text": _text(random)} for _ in range(random.randint(1, 3))]
    content = _text(random) if random.random() < 0.8 else parts
    return {"role": role, "content": content, **({"name": "Ada"} if random.random() < 0.1 else {})}


def _text(random: Random) -> str:
    return "".join(random.choices(TEXTS, k=random.randint(1, 8)))


def _token_ids(random: Random, count: int) -> list[int]:
    """Some of few tokens, so that prompts share beginnings and repeat themselves."""
    few = random.random() < 0.5
    return [random.randrange(20, 24) if few else random.randrange(VOCABULARY) for _ in range(count)]


def _some_ids(random: Random) -> list[int]:
    ids = _token_ids(random, random.choice((1, 3, 60)))
    return ids if random.random() < 0.95 else [*ids, random.choice((VOCABULARY, -1, 2**70))]


def _stop(random: Random) -> Any:
    strings = ["e", "x", "}", "\n", " ", "ab", "\ufffd", "日", "zz", "never", "a" * 1024]
    chosen = random.sample(strings, random.randint(0, 5))
    return random.choice(strings) if random.random() < 0.4 else chosen


MAKERS: dict[str, Maker] = {
    "model": lambda random: random.choice(("", "other", "\0", "x" * 300)),
    "prompt": _prompt,
    "messages": _messages,
    "max_tokens": lambda random: random.choices((random.randint(1, 12), 0, 60, 500, 10**12), (90, 4, 4, 1, 1))[0],
    "max_completion_tokens": lambda random: random.randint(1, 12),
    "min_tokens": lambda random: random.choice((0, 1, 3, 8, 20)),
    "n": lambda random: random.choices((1, 2, 3, 4, 16, 17), (3, 4, 3, 1, 1, 1))[0],
    "best_of": lambda random: random.choice((1, 2, 4, 5)),
    "stop": _stop,
    "stop_token_ids": _some_ids,
    "allowed_token_ids": _some_ids,
    "logit_bias": lambda random: {str(i): random.choice((-100, 100, 0, 1.5, -3)) for i in _some_ids(random)},
    "dry_sequence_breakers": lambda random: [*random.sample(TEXTS, 3), *_some_ids(random)[:9]],
    "truncate_prompt_tokens": lambda random: random.choice((1, 2, 20, 10**9)),
    "stream_options": lambda random: {"include_usage": random.random() < 0.8},
}
WEIGHTS = {  # of being chosen; 1 if not listed
    **dict.fromkeys(("model", "stream", "prompt", "messages"), 0.02),  # every body has them
    **{name: 0.0 for structure in STRUCTURES for name in structure(Random(0))},  # at most one of them is added
    "use_beam_search": 0.5,
    **dict.fromkeys(("stream_options", "n", "logprobs", "stop", "ignore_eos"), 3.0),
}
THAT_MEET = (
    ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids", "temperature"),
    ("n", "best_of", "logprobs", "top_logprobs", "echo", "prompt_logprobs", "return_token_ids", "stream_options"),
    ("mirostat", "mirostat_tau", "mirostat_eta", "temperature", "dynatemp_range", "dynatemp_exponent", "logprobs"),
    ("stop", "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "echo", "n", "stop_token_ids"),
    ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "temperature", "top_k"),
    ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    ("top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "temperature"),
    ("truncate_prompt_tokens", "echo", "logprobs", "prompt_logprobs", "return_token_ids", "add_special_tokens"),
    ("use_beam_search", "length_penalty", "early_stopping", "min_tokens", "ignore_eos", "stop_token_ids"),
)
BESIDE_BEAMS = {
    *("model", "prompt", "messages", "max_tokens", "use_beam_search", "length_penalty", "early_stopping", "seed"),
    *("ignore_eos", "stop_token_ids", "min_tokens", "user", "cache_salt", "priority"),
}
NEEDS = {
    "stream_options": "stream",
    "return_progress": "stream",
    "top_logprobs": "logprobs",
    "return_tokens_as_token_ids": "logprobs",
    "length_penalty": "use_beam_search",
    "early_stopping": "use_beam_search",
}
ONE_OF = (("max_tokens", "max_completion_tokens"), ("repetition_penalty", "repeat_penalty"))


def _headers(random: Random) -> dict[str, str]:
    """An idempotency key that is new, was sent with another body, or is none; and a deadline."""
    headers = {"Content-Type": "application/json"}
    if random.random() < 0.05:
        headers["Idempotency-Key"] = random.choice((str(random.random()), "again", "a" * 256, "a b", ""))
    if random.random() < 0.03:
        headers["X-Request-Timeout"] = random.choice(("30", "1e-9", "0", "-1", "nan", "inf", "1e9", "soon", ""))
    return headers


# --- damage -----------------------------------------------------------------------------------------------------------


def _misfit(random: Random, route: str, body: Body) -> None:
    """A parameter beyond its range, or of another type; or one that is not built, asking for something."""
    schema = SCHEMAS[route]
    name = random.choice([*schema["properties"], *body])
    if random.random() < 0.1 or name not in schema["properties"]:
        body[random.choice(sorted(ROUTES[route].not_built))] = random.choice(WEIRD)
    else:
        body[name] = Values(random, schema["$defs"]).unfitting(schema["properties"][name])


def _misplace(random: Random, route: str, body: Body) -> None:
    """Anything at all, anywhere in the body."""
    container, key = random.choice(list(_places(body)))
    container[key] = random.choice(WEIRD)


def _misname(random: Random, route: str, body: Body) -> None:
    container = random.choice([body, *(value for value in body.values() if isinstance(value, dict))])
    container[random.choice(("temprature", "", "\0", "x" * 3000, "__class__", "model_config"))] = random.choice(WEIRD)


def _omit(random: Random, route: str, body: Body) -> None:
    del body[random.choice(list(body))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside ``value``."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items[:50]:
        yield value, key
        yield from _places(inner)


def _serialized(random: Random, body: Body) -> bytes:
    """JSON, now and then not quite."""
    text = json.dumps(body, ensure_ascii=random.random() < 0.8)
    content = text.encode(errors="surrogatepass")
    if random.random() >= 0.04:
        return content
    at = random.randrange(len(content))
    byte = bytes([random.randrange(256)])
    first_field = text[1:].partition(", ")[0]
    return random.choice(
        (
            content[:at],
            content[:at] + byte + content[at + 1 :],
            content[:at] + byte + content[at:],
            content + random.choice((b"}", b" ", b"{}", b"\0")),
            b"\xef\xbb\xbf" + content,
            b"{" + first_field.encode(errors="surrogatepass") + b", " + content[1:],
            content.replace(b": 1", b": 1e400"),
            content.replace(b": 1", b": 00001"),
            content.replace(b": ", b": -Infinity, ", 1),
            b'{"a": ' * 5000,
            content[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
            content.decode(errors="replace").encode("utf-16"),
        )
    )

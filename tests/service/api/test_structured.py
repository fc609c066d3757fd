"""The fields that ask for structure: one at most, tried before anything is queued, and what the worker gets."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.service.api.conftest import accepted
from tests.service.api.serving import PacedWorker, Server, refused
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.structured import grammars

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}, "required": ["z"]}
GBNF = 'root ::= "a" | "b"'
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}

WISHES: dict[str, tuple[dict[str, Any], str]] = {
    "OpenAI's schema": ({"response_format": FORMAT}, grammars.json_schema(SCHEMA)),
    "OpenAI's object": ({"response_format": {"type": "json_object"}}, grammars.json_object()),
    "vLLM's schema": ({"structured_outputs": {"json": SCHEMA}}, grammars.json_schema(SCHEMA)),
    "vLLM's schema as text": ({"structured_outputs": {"json": '{"const": 1}'}}, grammars.json_schema({"const": 1})),
    "vLLM's regex": ({"structured_outputs": {"regex": "a+"}}, grammars.regex("a+")),
    "vLLM's choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, grammars.choice(["yes", "no"])),
    "vLLM's grammar": ({"structured_outputs": {"grammar": GBNF}}, grammars.ebnf(GBNF)),
    "vLLM's object": ({"structured_outputs": {"json_object": True}}, grammars.json_object()),
    "guided_json": ({"guided_json": SCHEMA}, grammars.json_schema(SCHEMA)),
    "guided_regex": ({"guided_regex": "a+"}, grammars.regex("a+")),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, grammars.choice(["yes", "no"])),
    "guided_grammar": ({"guided_grammar": GBNF}, grammars.ebnf(GBNF)),
    "llama.cpp's grammar": ({"grammar": GBNF}, grammars.ebnf(GBNF)),
    "llama.cpp's schema": ({"json_schema": SCHEMA}, grammars.json_schema(SCHEMA)),
    "SGLang's regex": ({"regex": "a+"}, grammars.regex("a+")),
    "SGLang's ebnf": ({"ebnf": GBNF}, grammars.ebnf(GBNF)),
    "Lark": ({"grammar": 'start: "a"'}, grammars.lark('start: "a"')),
}


async def params_of(server: Server, client: AsyncOpenAI, worker: PacedWorker, **fields: Any) -> SamplingParams:
    await client.completions.create(model=server.model, prompt="Once", extra_body=fields)
    return worker.claims[-1].submission.params


@pytest.mark.parametrize("name", WISHES)
async def test_the_worker_gets_the_grammar(server: Server, client: AsyncOpenAI, worker: PacedWorker, name: str) -> None:
    fields, grammar = WISHES[name]
    assert (await params_of(server, client, worker, **fields)).grammar == grammar


async def test_chat_takes_the_same(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    await client.chat.completions.create(model=server.model, messages=messages, extra_body={"response_format": FORMAT})
    assert worker.claims[-1].submission.params.grammar == grammars.json_schema(SCHEMA)


async def test_neutral_values_ask_for_nothing(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    for fields in (
        {"response_format": {"type": "text"}},
        {"grammar": "", "json_schema": None, "response_format": None, "regex": None, "guided_json": None},
        {"structured_outputs": {"json_object": False, "disable_fallback": False, "structural_tag": None}},
    ):
        assert (await params_of(server, client, worker, **fields)).grammar == ""


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": "Hi", **fields}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unsupported keyword": (
        {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"items": {"uniqueItems": True}}}}},
        "response_format.json_schema.schema",
        'at #/items: Unimplemented keys: ["uniqueItems"]',
    ),
    "bad type": ({"json_schema": {"type": "text"}}, "json_schema", "Invalid type: text"),
    "not JSON": ({"guided_json": "{"}, "guided_json", "it is not JSON"),
    "bad regex": ({"regex": "a("}, "regex", "unclosed group at character 2 of the regex a("),
    "bad regex of vLLM": ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed group"),
    "bad GBNF": ({"grammar": 'root ::= "a" b'}, "grammar", "Rule 'b' not found"),
    "bad Lark": ({"ebnf": "start: b"}, "ebnf", 'line 1, column 8: unknown name: "b"'),
    "bomb": ({"json_schema": {"type": "integer", "multipleOf": 999_983}}, "json_schema", "more than 1 s"),
    "huge": ({"guided_choice": ["x" * 300_000]}, "guided_choice", "131072 are allowed"),
    "nothing": ({"grammar": "start: start"}, "grammar", "nothing that it allows can come here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_one_is_refused_with_field_and_place(server: Server, post: httpx.Client, name: str) -> None:
    fields, param, message = BAD[name]
    before = accepted(server)
    error = refused(post.post("/v1/completions", json=ask(server, **fields)))
    assert (error["code"], error["param"]) == ("invalid_grammar", param)
    assert error["message"].startswith(f"'{param}': ")
    assert message in error["message"]
    assert accepted(server) == before


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "structural tag": ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "schema of text": ({"response_format": FORMAT | {"type": "text"}}, "response_format.json_schema"),
    "no name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "schema as text": ({"json_schema": "{}"}, "json_schema"),
    "schema as list": ({"guided_json": []}, "guided_json"),
    "regex as number": ({"regex": 1}, "regex"),
    "no choice": ({"guided_choice": []}, "guided_choice"),
    "empty choice": ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
    "too many choices": ({"guided_choice": ["x"] * 100_000}, "guided_choice"),
    "unknown": ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_one_is_refused_by_name(server: Server, post: httpx.Client, name: str) -> None:
    fields, param = MALFORMED[name]
    assert refused(post.post("/v1/completions", json=ask(server, **fields)))["param"] == param


@pytest.mark.parametrize("option", [{"structural_tag": "{}"}, {"whitespace_pattern": " "}, {"disable_fallback": True}])
def test_vllm_s_other_options_are_refused_by_name(
    server: Server, post: httpx.Client, option: dict[str, object]
) -> None:
    error = refused(post.post("/v1/completions", json=ask(server, structured_outputs={"regex": "a", **option})))
    assert (error["code"], error["param"]) == ("unsupported_parameter", f"structured_outputs.{next(iter(option))}")


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"regex": "a", "grammar": GBNF}, "grammar", "regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "response_format", "guided_json"),
        (
            {"structured_outputs": {"json": {}, "choice": ["a"]}},
            "structured_outputs.json",
            "structured_outputs.choice",
        ),
    ],
)
def test_two_are_refused_and_both_named(
    server: Server, post: httpx.Client, fields: dict[str, object], first: str, second: str
) -> None:
    error = refused(post.post("/v1/completions", json=ask(server, **fields)))
    assert error["param"] == second
    assert first in error["message"]


def test_beams_are_not_constrained(server: Server, post: httpx.Client) -> None:
    error = refused(post.post("/v1/completions", json=ask(server, use_beam_search=True, n=2, regex="a")))
    assert error["param"] == "regex"


async def test_a_bomb_delays_nobody_else(server: Server, http: httpx.AsyncClient) -> None:
    """The event loop answers while one is being tried; the best of three, as others may have the processor."""
    assert min([await slowest_beside_a_bomb(server, http, factor) for factor in (999_979, 999_961, 999_959)]) < 0.5


async def slowest_beside_a_bomb(server: Server, http: httpx.AsyncClient, factor: int) -> float:
    bomb = ask(server, json_schema={"type": "integer", "multipleOf": factor})
    trial = asyncio.create_task(http.post("/v1/completions", json=bomb))
    slowest = 0.0
    while not trial.done():
        started = time.monotonic()
        assert (await http.get("/livez")).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    assert refused(trial.result())["code"] == "invalid_grammar"
    return slowest

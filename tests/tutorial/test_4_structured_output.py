"""Texts of a given form, one way to ask per test. Everything is real: HTTP, Valkey, the worker, the model."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from jsonschema import validate

from tests.service.running import MODEL

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"enum": ["tea", "coffee"]},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Describe a person as JSON."}],
    "max_tokens": 200,
    "temperature": 0,
}


def answer(client: openai.OpenAI, **fields: Any) -> str:
    completion = client.chat.completions.create(**{**ASK, **fields})
    assert completion.choices[0].finish_reason == "stop"
    return completion.choices[0].message.content or ""


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    person = json.loads(answer(client, response_format=schema_format(PERSON)))
    validate(person, PERSON)
    assert list(person) == ["name", "age", "likes"]


def test_it_is_kept_at_any_temperature_in_every_choice_and_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        **{**ASK, "temperature": 3, "seed": 5, "n": 3, "stream": True, "response_format": schema_format(PERSON)}
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts)) == 3
    for text in texts:
        validate(json.loads(text), PERSON)


def test_any_json_object(client: openai.OpenAI) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3}
    assert isinstance(json.loads(answer(client, response_format=schema_format(schema))), dict)
    cut = client.chat.completions.create(**{**ASK, "max_tokens": 8}, response_format={"type": "json_object"})
    assert (cut.choices[0].message.content or "").startswith("{")


def test_one_of_several_choices(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Is Paris in France? Answer yes or no."}]
    fields = {"structured_outputs": {"choice": ["definitely not", "probably"]}}
    assert answer(client, messages=question, extra_body=fields) in ("definitely not", "probably")


def test_a_regex(client: openai.OpenAI) -> None:
    date = answer(client, extra_body={"regex": r"20\d\d-(0[1-9]|1[0-2])-[0-3]\d"})
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])-[0-3]\d", date)


def test_a_grammar(client: openai.OpenAI) -> None:
    grammar = 'root ::= number (" + " number){1,3}\nnumber ::= [1-9] [0-9]?'
    terms = answer(client, extra_body={"grammar": grammar}).split(" + ")
    assert 2 <= len(terms) <= 4
    assert all(term.isdigit() for term in terms)


def test_the_text_does_not_depend_on_what_else_runs(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        fields: dict[str, Any] = {"temperature": 1, "seed": seed, "response_format": schema_format(PERSON)}
        return answer(client, **fields)

    alone = [ask(seed) for seed in range(3)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, [0, 1, 2] * 2)) == alone * 2


def test_a_mistake_in_a_schema_is_answered_with_its_place(client: openai.OpenAI) -> None:
    wrong = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError, match=r"#/properties/tags.*uniqueItems") as caught:
        answer(client, response_format=schema_format(wrong))
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code == "invalid_grammar"

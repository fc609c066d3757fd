"""Embeddings of the real model, by the whole service: the same numbers alone and under load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.service.running import MODEL, RunningService

TEXTS = [
    *("The cat sat on the mat.", "A kitten is resting on a rug.", "Interest rates rose by half a percent."),
    *("one", "The central bank decided. " * 12, "def reverse(text): return text[::-1]"),
]
Vectors = list[list[float]]


def embed(client: openai.OpenAI, texts: Sequence[str]) -> Vectors:
    answer = client.embeddings.create(model=MODEL, input=list(texts))
    return [one.embedding for one in answer.data]


@pytest.fixture(scope="module")
def alone(service: RunningService) -> Vectors:
    """Each by itself."""
    with service.client() as client:
        return [embed(client, [text])[0] for text in TEXTS]


def test_they_have_the_length_1(alone: Vectors) -> None:
    assert [math.hypot(*vector) for vector in alone] == pytest.approx([1.0] * len(TEXTS), abs=1e-6)


def test_company_changes_no_bit(client: openai.OpenAI, alone: Vectors) -> None:
    """In one request, in many at once, and beside streams."""
    with ThreadPoolExecutor(5) as threads:
        chats = [threads.submit(chat, client, i) for i in range(2)]
        together = [threads.submit(embed, client, TEXTS[i:] + TEXTS[:i]) for i in range(3)]
        for i, found in enumerate(together):
            assert found.result() == alone[i:] + alone[:i]
        assert all(one.result() for one in chats)


def test_alike_is_what_means_alike(alone: Vectors) -> None:
    cat, kitten, rates, *_ = alone
    assert cosine(cat, kitten) > cosine(cat, rates)


def chat(client: openai.OpenAI, i: int) -> str | None:
    question = f"Tell me about the number {i}."
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=16
    )
    return answer.choices[0].message.content


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

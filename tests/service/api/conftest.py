"""One API process per test module; after every test, what was accepted has ended, and is counted
once, and every answer was what OpenAI's document says."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import PacedWorker, Server, serving, wait_for, working
from tokenrelay.service.api.served_model import ServedModel, load_served_model
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings


@pytest.fixture(scope="session")
def loaded_model(smollm2_path: Path) -> ServedModel:
    return load_served_model(Settings(model=str(smollm2_path), max_model_len=2048))


@pytest.fixture(scope="module")
def served_model(loaded_model: ServedModel) -> ServedModel:
    """Under a name of its own, so that modules do not meet in the broker."""
    return dataclasses.replace(loaded_model, name=f"smollm2-{uuid.uuid4().hex[:8]}")


@pytest.fixture(scope="module")
def api_settings(valkey: EmbeddedValkey) -> Settings:
    return Settings(redis_url=valkey.url, keep_alive_seconds=0.2, drain_seconds=0.5)


@pytest.fixture(scope="module")
def running_server(api_settings: Settings, served_model: ServedModel) -> Iterator[Server]:
    with serving(api_settings, served_model) as server:
        yield server


@pytest.fixture(scope="module")
def other_server(api_settings: Settings, served_model: ServedModel) -> Iterator[Server]:
    """A second API process's application, at the same broker."""
    with serving(api_settings, served_model) as server:
        yield server


@pytest.fixture
async def other(other_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=other_server.base_url, timeout=60) as http:
        yield http


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    yield running_server
    wait_for(lambda: in_flight(running_server) == 0)
    assert accepted(running_server) == ended(running_server)
    assert running_server.judge.complaints() == []


@pytest.fixture
async def worker(server: Server) -> AsyncIterator[PacedWorker]:
    async with working(server) as worker:
        yield worker


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def post(running_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running_server.base_url, timeout=60) as client:
        yield client


def in_flight(server: Server) -> float:
    return _sample(server, "tokenrelay_requests_in_flight")


def accepted(server: Server) -> float:
    return _sample(server, "tokenrelay_requests_accepted_total")


def ended(server: Server, outcome: str | None = None) -> float:
    """Requests that ended, with this outcome or with any."""
    return sum(
        sample.value
        for family in server.metrics.collect()
        for sample in family.samples
        if sample.name == "tokenrelay_requests_total" and outcome in (None, sample.labels["outcome"])
    )


def _sample(server: Server, name: str) -> float:
    return server.metrics.get_sample_value(name, {"model_name": server.model}) or 0.0

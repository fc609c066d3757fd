"""Fixtures that every part of the suite may use."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, settings

from tests.service.running import RunningService
from tokenrelay.model.weights.sources import pull

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: downloaded into the user's cache once, by the code under test."""
    return pull("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[RunningService]:
    """``tokenrelay serve``, ready. The model is in the cache already."""
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


def pytest_collection_finish() -> None:
    """What is imported stays: to walk it all took the garbage collector half a second in the middle of timed things."""
    gc.collect()
    gc.freeze()

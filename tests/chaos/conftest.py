"""Services to kill parts of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from tests.chaos.streams import Recording, mixed_requests, read_all
from tests.service.running import MODEL, RunningService, wait_until
from tests.service.tiny_model import write_tiny_model
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys

EIGHT = mixed_requests(8, 40)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A broker for the processes that a test starts itself."""
    server = EmbeddedValkey(tmp_path, memory_mb=32)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Two layers, random weights, SmolLM2's first tokens: so small that what is around it is tested."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", smollm2_path)


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> dict[str, Any]:
    """The options of a service with the tiny model."""
    return {"model": str(tiny_model), "served_model_name": MODEL, "kv_cache_mb": 64}


@pytest.fixture(scope="package")
def running_tiny_service(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Iterator[RunningService]:
    """With the tiny model and a spare worker."""
    with RunningService(tmp_path_factory.mktemp("tiny"), spare_workers=1, **tiny) as service:
        yield service


@pytest.fixture
def tiny_service(running_tiny_service: RunningService) -> RunningService:
    """Whatever an earlier test killed of it is there again."""
    wait_until(lambda: num_announced(running_tiny_service) == 2, "both workers are ready")
    return running_tiny_service


def num_announced(service: RunningService) -> int:
    """Workers that live, and have their models loaded."""
    keys = Keys(MODEL)
    with Redis.from_url(service.broker_url) as redis:
        names = [name.decode() for name in redis.zrange(keys.workers, 0, -1)]
        return sum(redis.exists(keys.worker(name)) for name in names)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[RunningService]:
    """With the real model, and one process of each kind: the next test finds it as if nobody had killed any."""
    with RunningService(tmp_path_factory.mktemp("service"), drain_seconds=20) as running:
        yield running


@pytest.fixture(scope="package")
def undisturbed(service: RunningService) -> list[Recording]:
    """What ``EIGHT`` requests answer when nobody is killed."""
    with httpx.Client(base_url=service.url, timeout=60) as http:
        recordings = read_all(http, EIGHT)
    for recording in recordings:
        recording.assert_whole()
    return recordings

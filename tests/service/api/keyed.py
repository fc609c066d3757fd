"""A server that wants keys, and clients that have some."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from tests.service.api.serving import Endpoint, Server, serving
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.key_file import create_api_key
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import Limits


class KeyFile:
    """``secrets`` are by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secrets: dict[str, str] = {}

    def create(self, name: str, *, tenant: str = "", weight: float = 1.0, operator: bool = False, **limits: int) -> str:
        """A key, which is called as its tenant unless that is named."""
        self.secrets[name] = create_api_key(
            self.path, name, tenant or name, weight=weight, limits=Limits(**limits), operator=operator
        )
        return self.secrets[name]


@contextmanager
def keyed(settings: Settings, model: ServedModel, file: KeyFile, **options: object) -> Iterator[Server]:
    with serving(settings.model_copy(update={"api_keys_file": str(file.path), **options}), model) as server:
        yield server


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@asynccontextmanager
async def asking_as(server: Endpoint, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=60, headers=bearer(secret)) as http:
        yield http

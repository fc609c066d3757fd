"""The list of adapters in the broker: bounded, shared by all API processes, never above the settings."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tokenrelay.service import adapters
from tokenrelay.service.adapters import AdapterDirectory
from tokenrelay.service.errors import InvalidRequestError
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Adapter


def adapter(name: str, digest: str = "0", created: int = 0) -> Adapter:
    return Adapter(name=name, path=f"/{name}", digest=digest, created=created)


async def test_they_are_many_but_not_endless(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_ADAPTERS", 2)
    directory = AdapterDirectory(redis, keys, {})
    for name in "ab":
        await directory.load(adapter(name))
    with pytest.raises(InvalidRequestError, match="2 adapters are loaded"):
        await directory.load(adapter("c"))
    await directory.load(adapter("a", digest="1"), replace=True)  # one that is there takes no more room
    assert await directory.unload("b")
    await directory.load(adapter("c"))
    assert [found.name for found in await directory.all()] == ["a", "c"]


async def test_the_settings_come_first(redis: Redis, keys: Keys) -> None:
    """Even before what was loaded by a process that knew nothing of them."""
    await AdapterDirectory(redis, keys, {}).load(adapter("b", digest="old"))
    await AdapterDirectory(redis, keys, {}).load(adapter("a", created=1))
    directory = AdapterDirectory(redis, keys, {"b": adapter("b", digest="new")})
    found = await directory.find("b")
    assert found is not None
    assert found.digest == "new"
    assert [found.digest for found in await directory.all()] == ["new", "0"]

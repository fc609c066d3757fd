"""The LoRA adapters of a deployment: those that the settings name, and those loaded since by the admin's route.

The latter are in the broker, where every API process finds them at once. Workers need no list: a request brings its
adapter along, and goes on with it even if that was unloaded meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.weights.lora import read_lora
from tokenrelay.service.broker import broker_errors
from tokenrelay.service.errors import InvalidRequestError
from tokenrelay.service.keys import MAX_ADAPTERS, Keys
from tokenrelay.service.messages import Adapter, decode_adapter, encode
from tokenrelay.service.settings import Settings


def describe_adapter(name: str, path: str, network: ModelConfig, max_rank: int) -> Adapter:
    """Raises LoRAError for a folder that no worker could load."""
    folder = Path(path).expanduser().absolute()
    lora = read_lora(folder, network, max_rank)
    return Adapter(name=name, path=str(folder), digest=lora.digest, created=int(time.time()))


def named_adapters(settings: Settings, model: str, network: ModelConfig) -> dict[str, Adapter]:
    """Those of the setting ``lora_modules``. Raises ValueError for one that cannot be served."""
    paths = settings.adapter_paths
    if model in paths:
        raise ValueError(f"lora_modules names an adapter {model!r}, as the model itself is called")
    return {name: describe_adapter(name, path, network, settings.max_lora_rank) for name, path in paths.items()}


class AdapterDirectory:
    """By name. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys, named: Mapping[str, Adapter]) -> None:
        """``named``: by the settings; nothing can replace or unload these."""
        self._redis = redis
        self._key = keys.adapters
        self._named = named

    async def find(self, name: str) -> Adapter | None:
        if name in self._named:
            return self._named[name]
        async with broker_errors():
            found: Any = await self._redis.hget(self._key, name)
        return decode_adapter(found) if found else None

    async def all(self) -> list[Adapter]:
        """Those of the settings first, the others as they were loaded."""
        async with broker_errors():
            found: Any = await self._redis.hgetall(self._key)
        loaded = sorted(map(decode_adapter, found.values()), key=lambda adapter: (adapter.created, adapter.name))
        return [*self._named.values(), *(adapter for adapter in loaded if adapter.name not in self._named)]

    async def load(self, adapter: Adapter, *, replace: bool = False) -> None:
        """Raises InvalidRequestError for a name that is taken by another adapter, unless it may be replaced."""
        known = await self.find(adapter.name)
        if known and (known.path, known.digest) == (adapter.path, adapter.digest):
            return
        if known and (adapter.name in self._named or not replace):
            raise InvalidRequestError(
                f"An adapter '{adapter.name}' is loaded already; unload it first, or choose another name.",
                param="lora_name",
                code="adapter_exists",
            )
        async with broker_errors():
            if not known and await self._redis.hlen(self._key) >= MAX_ADAPTERS:
                raise InvalidRequestError(f"{MAX_ADAPTERS} adapters are loaded; unload one first.", param="lora_name")
            await self._redis.hset(self._key, adapter.name, encode(adapter))

    async def unload(self, name: str) -> bool:
        """False if there is none. Raises InvalidRequestError for one of the settings."""
        if name in self._named:
            raise InvalidRequestError(
                f"The adapter '{name}' is named by the setting lora_modules; remove it there.", param="lora_name"
            )
        async with broker_errors():
            removed: Any = await self._redis.hdel(self._key, name)
        return bool(removed)

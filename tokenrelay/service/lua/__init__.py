"""The scripts of the relay's protocol: each is one atomic step, and may be sent again when its reply was lost."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.keys import LUA_CONSTANTS, Keys
from tokenrelay.service.messages import VERSION


class Scripts:
    """Calls scripts by name, loaded when first needed. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._prefix = keys.prefix
        self._scripts: dict[str, Any] = {}

    @broker_errors()
    async def call(self, name: str, keys: list[str], *args: str | bytes | int) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._redis.register_script(source(name))
        return await script(keys, (self._prefix, *args))


def packed(encoded: bytes) -> msgspec.Raw:
    """Bytes as a msgpack string: the ``cmsgpack`` of scripts does not know the binary type."""
    return msgspec.Raw(b"\xdb" + len(encoded).to_bytes(4, "big") + encoded)


@cache
def source(name: str) -> str:
    """The whole text of a script: the constants of ``keys.py``, ``library.lua``, then its own file.

    Only ``submit`` is refused when the broker's memory is full: what was accepted may always be carried on and ended,
    which is also what frees memory again.
    """
    shebang = "#!lua" if name == "submit" else "#!lua flags=allow-oom"
    named = {**LUA_CONSTANTS, "VERSION": VERSION}
    constants = "\n".join(f"local {constant} = {value}" for constant, value in named.items())
    return "\n".join((shebang, constants, _read("library"), _read(name)))


def _read(name: str) -> str:
    return (files(__name__) / f"{name}.lua").read_text(encoding="utf-8")

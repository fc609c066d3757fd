"""The scripts of the relay's protocol: each is one atomic step, and may be sent again when its reply was lost."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.keys import LUA_CONSTANTS, Keys
from tokenrelay.service.messages import NEWEST

_ACCEPTING = ("submit", "store_response")


class Scripts:
    """Calls scripts by name. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._prefix = keys.prefix

    @broker_errors()
    async def call(self, name: str, keys: list[str], *args: str | bytes | int) -> Any:
        """By its digest; a broker that does not know that (any more) gets the script itself.

        To load it first and then to call it would leave a moment in which a restarted broker has forgotten it again.
        """
        arguments: Any = (len(keys), *keys, self._prefix, *args)
        try:
            return await self._redis.evalsha(digest(name), *arguments)
        except NoScriptError:
            return await self._redis.eval(source(name), *arguments)


def packed(encoded: bytes) -> msgspec.Raw:
    """Bytes as a msgpack string: the ``cmsgpack`` of scripts does not know the binary type."""
    return msgspec.Raw(b"\xdb" + len(encoded).to_bytes(4, "big") + encoded)


@cache
def digest(name: str) -> str:
    """By which the broker knows a script."""
    return hashlib.sha1(source(name).encode()).hexdigest()


@cache
def source(name: str) -> str:
    """The whole text of a script: the constants of ``keys.py``, ``library.lua``, ``tenants.lua``, then its own file.

    Only what accepts something new is refused when the broker's memory is full: what was accepted may always be carried
    on and ended, which is also what frees memory again.
    """
    shebang = "#!lua" if name in _ACCEPTING else "#!lua flags=allow-oom"
    named = {**LUA_CONSTANTS, "NEWEST": NEWEST}
    constants = "\n".join(f"local {constant} = {value}" for constant, value in named.items())
    return "\n".join((shebang, constants, _read("library"), _read("tenants"), _read(name)))


def _read(name: str) -> str:
    return (files(__name__) / f"{name}.lua").read_text(encoding="utf-8")

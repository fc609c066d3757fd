"""Clients of Redis or Valkey, with a retry policy per use, and the one translation of their errors.

A client may send a command again when its connection broke; every script of ours allows that, a bare write may not.
A broker that is connected and does not answer is not asked twice: who waits for a 503 shall have it within a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from tokenrelay.service.broker_pool import QueuedPool
from tokenrelay.service.errors import BrokerUnavailable

BLOCK_SECONDS = 1.0  # how long one blocking read may wait, and so how long a shutdown may
BLOCKING_SOCKET_TIMEOUT = 2.5  # above BLOCK_SECONDS, or every idle read would look like a dead broker
SOCKET_TIMEOUT = 0.6  # without a byte from the broker
MAX_CONNECTIONS = 3  # callers beyond wait their turn: one process fills no more, and a broker serves few at a time
LATE_SECONDS = 0.05  # that a timer of an event loop with little to do may be
RETRY_AFTER = 2.0

SENTINEL = "redis+sentinel"
SENTINEL_PORT = 26379

# Replies that say "not now", where redis-py has no class or one that is not a ConnectionError.
_NOT_NOW = ("OOM", "MISCONF", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "UNBLOCKED")


def connect(url: str, *, blocking: bool = False, ca_file: str = "") -> Redis:
    """A client of ``unix://``, ``redis://``, ``rediss://`` or ``redis+sentinel://host:port,host:port/name``.

    ``blocking`` ones never retry and wait longer. ``ca_file`` is whom a ``rediss://`` broker's certificate must be
    signed by, instead of the system's authorities. Raises ValueError for a URL that is none of these.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "max_connections": MAX_CONNECTIONS,
        "patience": SOCKET_TIMEOUT,
        "socket_timeout": BLOCKING_SOCKET_TIMEOUT if blocking else SOCKET_TIMEOUT,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 0) if blocking else _RetryWhatBreaks(ExponentialWithJitterBackoff(0.2, 0.02), 2),
    }
    if url.startswith(f"{SENTINEL}://"):
        return Redis.from_pool(_sentinel_pool(url, options))
    if ca_file and url.startswith("rediss://"):
        options["ssl_ca_certs"] = ca_file
    return Redis.from_pool(QueuedPool.from_url(url, **options))


class _RetryWhatBreaks(Retry):
    """For a connection that was closed, not for silence: an error that took long to come is the last.

    Unless it is late even for that: then this process was busy, and the broker may well have answered.
    """

    async def call_with_retry(self, do: Any, fail: Any, *_: Any, **options: Any) -> Any:
        started = time.monotonic()

        async def timed() -> Any:
            nonlocal started
            started = time.monotonic()
            return await do()

        def worthwhile(error: Exception) -> bool:
            return not SOCKET_TIMEOUT / 2 < time.monotonic() - started < SOCKET_TIMEOUT + LATE_SECONDS

        return await super().call_with_retry(timed, fail, worthwhile, **options)


class _SentinelPool(QueuedPool, SentinelConnectionPool):
    """Asks the sentinels who the master is at every new connection."""

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()  # redis-py leaves the connections to them open


def _sentinel_pool(url: str, options: dict[str, Any]) -> _SentinelPool:
    """``redis+sentinel://user:password@host:port,host:port/name/db``; user and password are the data servers'."""
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, db = parts.path.strip("/").partition("/")
    if not (hosts and name):
        raise ValueError(f"not a Sentinel URL: it must read {SENTINEL}://host:port,host:port/name")
    user, _, password = credentials.partition(":")
    login = {"username": unquote(user) or None, "password": unquote(password)} if credentials else {}
    patience = {"socket_timeout": SOCKET_TIMEOUT, "socket_connect_timeout": SOCKET_TIMEOUT}
    asked_once = {**patience, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
    addresses = [_address(host) for host in hosts.split(",")]
    sentinel = Sentinel(addresses, sentinel_kwargs=asked_once)  # type: ignore[no-untyped-call]
    return _SentinelPool(service_name=name, sentinel_manager=sentinel, db=int(db or 0), **(options | login))


def _address(host: str) -> tuple[str, int]:
    address = urlsplit(f"//{host}")
    if not address.hostname:
        raise ValueError(f"not a Sentinel URL: {host!r} is not host:port")
    return address.hostname, address.port or SENTINEL_PORT


@asynccontextmanager
async def broker_errors() -> AsyncIterator[None]:
    """Turn "the broker cannot do this now" into BrokerUnavailable; also a decorator: ``@broker_errors()``.

    Raises a cancellation again that redis-py swallowed: it sends with ``asyncio.wait_for``, which before Python 3.12
    forgets a cancellation that arrives together with the result. Without this a task could not be stopped reliably.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        raise BrokerUnavailable("The broker does not answer; try again shortly.", retry_after=RETRY_AFTER) from error
    except ResponseError as error:
        if not _is_temporary(error):
            raise
        raise BrokerUnavailable("The broker refuses writes; try again shortly.", retry_after=RETRY_AFTER) from error
    finally:
        if task and task.cancelling() > cancellations:
            raise asyncio.CancelledError


def _is_temporary(error: ResponseError) -> bool:
    code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
    return str(code).startswith(_NOT_NOW) or type(error).__name__ in ("OutOfMemoryError", "ReadOnlyError")

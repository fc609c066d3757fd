"""Clients of Redis or Valkey, with a retry policy per use, and the one translation of their errors.

A client may send a command again when its reply was lost; every script of ours allows that, a bare write may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from tokenrelay.service.errors import BrokerUnavailable

BLOCK_SECONDS = 1.0  # how long one blocking read may wait, and so how long a shutdown may
BLOCKING_SOCKET_TIMEOUT = 5.0  # above BLOCK_SECONDS, or every idle read would look like a dead broker
SOCKET_TIMEOUT = 2.0
MAX_CONNECTIONS = 32  # callers beyond wait their turn; redis-py's default is to fail at the hundredth
RETRY_AFTER = 2.0

# Replies that say "not now", where redis-py has no class or one that is not a ConnectionError.
_NOT_NOW = ("OOM", "MISCONF", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "UNBLOCKED")


def connect(url: str, *, blocking: bool = False) -> Redis:
    """A client of ``unix://``, ``redis://`` or ``rediss://``; ``blocking`` ones never retry and wait longer."""
    retry = Retry(NoBackoff(), 0) if blocking else Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), 2)
    pool = BlockingConnectionPool.from_url(
        url,
        protocol=2,
        max_connections=MAX_CONNECTIONS,
        timeout=SOCKET_TIMEOUT,
        socket_timeout=BLOCKING_SOCKET_TIMEOUT if blocking else SOCKET_TIMEOUT,
        socket_connect_timeout=SOCKET_TIMEOUT,
        retry=retry,
    )
    return Redis.from_pool(pool)


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

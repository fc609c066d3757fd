"""Behind Sentinel: the master dies, a replica takes its place, and the stream goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from tests.service.broker_process import broker_process, options
from tests.service.relay import claim_one, ending, publication, submit, token
from tests.service.running import free_port, wait_until
from tokenrelay.service.broker import connect
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog

WATCH = """
port {sentinel}
sentinel monitor relay 127.0.0.1 {master} 1
sentinel down-after-milliseconds relay 300
sentinel failover-timeout relay 2000
"""


class Site:
    """A master, its replica, and a sentinel that watches them; all die with the test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.master_port, self.replica_port, self.sentinel_port = free_port(), free_port(), free_port()
        for name in ("master", "replica", "sentinel"):
            (folder / name).mkdir()
        served = options(port=self.master_port, repl_diskless_sync_delay=0)
        self.master = stack.enter_context(broker_process(folder / "master", *served, port=self.master_port))
        following = options(port=self.replica_port, replicaof=f"127.0.0.1 {self.master_port}")
        stack.enter_context(broker_process(folder / "replica", *following, port=self.replica_port))
        self._await_replica()
        watch = folder / "sentinel" / "sentinel.conf"  # it keeps what it finds out in there
        watch.write_text(WATCH.format(sentinel=self.sentinel_port, master=self.master_port))
        stack.enter_context(broker_process(folder / "sentinel", str(watch), "--sentinel", port=self.sentinel_port))
        self._await_sentinel()

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel_port},127.0.0.1:1/relay"

    def await_copy(self, stream: str) -> None:
        with sync_redis.Redis(port=self.replica_port) as replica:
            wait_until(lambda: replica.xlen(stream), "the replica has it, too")

    def _await_replica(self) -> None:
        with sync_redis.Redis(port=self.master_port) as master:
            wait_until(lambda: master.info("replication").get("slave0", {}).get("state") == "online", "a replica")

    def _await_sentinel(self) -> None:
        """It must know the replica before it can promote it."""
        with sync_redis.Redis(port=self.sentinel_port) as sentinel:
            wait_until(lambda: sentinel.sentinel_masters()["relay"]["num-slaves"] == 1, "the sentinel knows both", 20)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


@pytest.fixture
async def client(site: Site) -> AsyncIterator[Redis]:
    async with connect(site.url) as redis:
        yield redis


async def test_a_stream_survives_a_failover(site: Site, client: Redis) -> None:
    settings, keys = Settings(lease_seconds=600), Keys("m")
    queue, log = Queue(client, keys, settings), TokenLog(client, keys, settings)
    async with connect(site.url, blocking=True) as blocking:
        mailbox = Mailbox(blocking, client, keys, log, "api")
        running = asyncio.create_task(mailbox.run())
        async with mailbox.subscribe("a") as subscription:
            await submit(queue, "a")
            claim = await claim_one(queue)
            assert await log.publish("worker", [publication(claim, 1, token(1))]) == []
            assert await anext(subscription) == (1, token(1))
            site.await_copy(keys.log("a"))  # replication is asynchronous: what was not replicated would be lost
            site.master.kill()
            with pytest.raises(BrokerUnavailable):
                await submit(queue, "b")
            async with asyncio.timeout(60):
                await publish_patiently(log, publication(claim, 2, token(2)))
                assert await anext(subscription) == (2, token(2))
            assert await log.finish("worker", publication(claim, 3, ending(2)))
        running.cancel()
    assert (await client.info("replication"))["role"] == "master"


async def publish_patiently(log: TokenLog, step: object) -> None:
    """As a worker does."""
    while True:
        try:
            assert await log.publish("worker", [step]) == []  # type: ignore[list-item]
            return
        except BrokerUnavailable:
            await asyncio.sleep(0.1)


async def test_without_a_sentinel_the_broker_is_unavailable_at_once() -> None:
    async with connect("redis+sentinel://127.0.0.1:1,localhost:1/relay") as redis:
        with pytest.raises(BrokerUnavailable):
            async with asyncio.timeout(2):
                await Queue(redis, Keys("m"), Settings()).num_waiting()


@pytest.mark.parametrize("url", ["redis+sentinel:///relay", "redis+sentinel://host:26379", "redis+sentinel://:1/relay"])
def test_a_sentinel_url_names_hosts_and_the_master(url: str) -> None:
    with pytest.raises(ValueError, match="not a Sentinel URL"):
        connect(url)

"""The user of deploy/acl can do all that the relay does, and nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from tests.service.api.serving import serving
from tests.service.broker_process import broker_process, options
from tests.service.relay import submit
from tests.service.running import free_port
from tests.service.worker.working import working
from tokenrelay.service import lua
from tokenrelay.service.api.served_model import ServedModel, load_served_model
from tokenrelay.service.broker import connect
from tokenrelay.service.dead_letters import DeadLetters
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import CancelOutcome, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.worker.role import Role

USERS = Path(__file__).parents[2] / "deploy/acl/users.acl"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, for that user."""
    port = free_port()
    folder = tmp_path_factory.mktemp("acl")
    with broker_process(folder, *options(port=port, aclfile=str(USERS)), port=port):
        yield f"redis://tokenrelay:replace-this-password@127.0.0.1:{port}"


@pytest.fixture
async def restricted(broker: str) -> AsyncIterator[Redis]:
    async with connect(broker) as redis:
        yield redis


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> ServedModel:
    return load_served_model(Settings(model=str(smollm2_path), served_model_name="counting", max_model_len=512))


def test_every_command_of_a_script_is_allowed() -> None:
    allowed = set(re.findall(r"\+([a-z|]+)", USERS.read_text()))
    scripts = "".join(path.read_text() for path in files(lua).iterdir() if path.name.endswith(".lua"))
    assert {command.lower() for command in re.findall(r"redis\.call\('(\w+)'", scripts)} - allowed == set()


async def test_api_and_worker_need_nothing_more(broker: str, model: ServedModel) -> None:
    settings = Settings(redis_url=broker, lease_seconds=2, drain_seconds=1, watchdog_seconds=0)
    body = {"model": model.name, "prompt": "Once", "max_tokens": 20, "ignore_eos": True}
    with serving(settings, model) as server:
        async with (
            connect(broker) as redis,
            working(redis, Keys(model.name), settings, Role("worker")) as hand,
            httpx.AsyncClient(base_url=server.base_url, timeout=60) as http,
        ):
            while (await http.get("/readyz")).status_code != 200:
                pass
            answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == "x" * 20
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                await anext(stream.aiter_text())
                hand.network.gate.clear()
            hand.network.gate.set()  # its client went away: it is cancelled


async def test_operators_need_nothing_more(restricted: Redis) -> None:
    settings, keys = Settings(lease_seconds=600, max_attempts=1), Keys("m")
    queue = Queue(restricted, keys, settings)
    await submit(queue, "dead", "cancelled")
    [claim] = await queue.claim("worker", 1)
    assert await queue.evict("worker") == [claim.submission.request_id]
    letters = DeadLetters(restricted, settings)
    assert await queue.cancel(await letters.requeue(await letters.find("dead"))) is CancelOutcome.WAITING
    assert await queue.cancel("cancelled") is CancelOutcome.WAITING
    assert await letters.purge() == 0
    assert len(await TokenLog(restricted, keys, settings).read("cancelled")) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "another:key"),
        ("SET", "another:key", "value"),
        ("XREAD", "STREAMS", "another:key", "0"),
        ("PUBLISH", "another:channel", "value"),
        ("SUBSCRIBE", "another:channel"),
        ("KEYS", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
    ],
    ids=lambda command: command[0],
)
async def test_other_keys_and_commands_are_refused(restricted: Redis, command: tuple[str, ...]) -> None:
    with pytest.raises(NoPermissionError):
        await restricted.execute_command(*command)  # type: ignore[no-untyped-call]


async def test_a_script_may_not_touch_other_keys_either(restricted: Redis) -> None:
    script = "#!lua\nreturn redis.call('GET', 'another:key')"
    sha = await restricted.script_load(script)
    for call in (restricted.evalsha(sha, 0), restricted.eval(script, 0)):
        with pytest.raises(Exception, match=r"can't access|permission|ACL"):
            await call

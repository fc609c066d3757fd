"""A request that kills its workers is given up in the end, alone, and kept for an operator to look at."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import typer.testing
from redis.asyncio import Redis

from tests.service.relay import claim_one, ending, publication, submission, submit, token
from tokenrelay.service import cli
from tokenrelay.service.broker import connect
from tokenrelay.service.dead_letters import DeadLetters
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import DEAD_TTL, Keys
from tokenrelay.service.messages import MessageError
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import AnswerSpec, Terms
from tokenrelay.service.token_log import TokenLog

NUM_GOOD, NUM_TOKENS = 12, 5


class Worker:
    """Works as the real one does, and dies when it comes to compute the poison."""

    def __init__(self, name: str, queue: Queue, log: TokenLog, dies_at: int) -> None:
        self.name, self.queue, self.log, self.dies_at = name, queue, log, dies_at
        self.claims: list[Claim] = []
        self.next: dict[str, int] = {}
        self.unproven: set[str] = set()

    async def live(self) -> bool:
        """False if it died, True if there is nothing left to do."""
        while True:
            if not any(self.on_trial(claim) for claim in self.claims):
                for claim in await self.queue.claim(self.name, 100, unsuspected=not self.unproven):
                    self.claims.append(claim)
                    self.next[claim.submission.request_id] = len(claim.log) + 1
                    self.unproven.add(claim.submission.request_id)
            if not self.claims:
                return True
            for claim in list(self.claims):
                if not await self.step(claim):
                    await self.queue.evict(self.name)
                    return False

    def on_trial(self, claim: Claim) -> bool:
        return claim.attempts == 3 and claim.submission.request_id in self.unproven

    async def step(self, claim: Claim) -> bool:
        name = claim.submission.request_id
        index = self.next[name]
        if name == "poison" and index == self.dies_at:
            return False
        if index <= NUM_TOKENS:
            assert await self.log.publish(self.name, [publication(claim, index, token(index))]) == []
        else:
            assert await self.log.finish(self.name, publication(claim, index, ending(NUM_TOKENS)))
            self.claims.remove(claim)
        self.next[name] += 1
        self.unproven.discard(name)
        return True


@pytest.mark.parametrize(("dies_at", "deaths"), [(1, 3), (3, 3)], ids=["at once", "after two tokens"])
async def test_poison_among_good_requests(
    queue: Queue, token_log: TokenLog, redis: Redis, settings: Settings, dies_at: int, deaths: int
) -> None:
    """Those that were there when it killed are not blamed for it, wherever it stands in the queue."""
    good = [f"good-{i}" for i in range(NUM_GOOD)]
    await submit(queue, *good[:5], "poison", *good[5:])
    num_deaths = 0
    while not await Worker(f"worker-{num_deaths}", queue, token_log, dies_at).live():
        num_deaths += 1
    assert num_deaths == deaths
    for name in good:
        assert [event for _, event in await token_log.read(name)] == [
            *map(token, range(1, NUM_TOKENS + 1)),
            ending(NUM_TOKENS),
        ]
    *_, (_, last) = await token_log.read("poison")
    assert last.error
    assert last.error.code == "worker_lost"
    [letter] = await DeadLetters(redis, settings).all()
    assert (letter.request_id, letter.reason, letter.attempts, letter.num_events) == (
        *("poison", "worker_lost", 3, dies_at - 1),
    )


async def bury(queue: Queue, request_id: str, **fields: Any) -> None:
    await queue.submit(submission(request_id, **fields), mailbox="api", terms=Terms(answer=ANSWER, timeout=60))
    for _ in range(3):
        await claim_one(queue)
        await queue.evict("worker")


ANSWER = AnswerSpec(route="completion", model="m", created=1, num_prompt_tokens=3, prompt=1, num_prompts=2)


async def test_a_letter_says_whose_it_was_and_what_happened(
    queue: Queue, redis: Redis, keys: Keys, settings: Settings
) -> None:
    await bury(queue, "a", tenant="alice")
    letter = await DeadLetters(redis, settings).find("a")
    assert letter.submission == submission("a", tenant="alice")
    assert letter.worker_id == "worker"
    assert keys.prefix == Keys(letter.model).prefix
    seconds, micros = await redis.time()
    assert abs(letter.died_at.timestamp() - seconds - micros / 1e6) < 10
    assert 0 < await redis.ttl(keys.dead) <= DEAD_TTL


async def test_old_letters_go_although_new_ones_come(
    queue: Queue, redis: Redis, keys: Keys, settings: Settings
) -> None:
    await bury(queue, "old")
    entries: Any = await redis.xrange(keys.dead)
    [(_, fields)] = entries
    seconds, _ = await redis.time()
    await redis.delete(keys.dead)
    await redis.xadd(keys.dead, fields, id=f"{(seconds - DEAD_TTL - 1) * 1000}-0")
    await bury(queue, "new")
    assert [letter.request_id for letter in await DeadLetters(redis, settings).all()] == ["new"]


async def test_a_requeued_letter_is_a_new_request(
    queue: Queue, redis: Redis, keys: Keys, settings: Settings, token_log: TokenLog
) -> None:
    await bury(queue, "a", tenant="alice")
    letters = DeadLetters(redis, settings)
    letter = await letters.find("a")
    new_id = await letters.requeue(letter)
    assert await letters.requeue(letter) == new_id  # its answer was lost, say
    assert await letters.all() == []
    claim = await claim_one(queue)
    assert claim.submission == submission(new_id, tenant="alice")
    assert (claim.attempts, claim.log) == (1, [])
    assert await token_log.finish("worker", publication(claim, 1, ending()))
    assert await queue.num_waiting() == 0


async def test_one_that_nobody_can_read_is_shown_but_not_sent_again(
    queue: Queue, redis: Redis, keys: Keys, settings: Settings
) -> None:
    await submit(queue, "a")
    await redis.hset(keys.request("a"), "payload", b"\xc1")
    assert await queue.claim("worker", 1) == []
    letters = DeadLetters(redis, settings)
    letter = await letters.find("a")
    assert letter.submission is None
    with pytest.raises(MessageError, match="cannot be sent again"):
        await letters.requeue(letter)
    with pytest.raises(NotFoundError):
        await letters.find("b")


class TestCommands:
    """Each command is a process of its own; here they share this one."""

    @pytest.fixture
    def dead(self, url: str, keys: Keys, settings: Settings) -> Callable[..., typer.testing.Result]:
        async def prepare() -> None:
            async with connect(url) as redis:
                await bury(Queue(redis, keys, settings), "a", tenant="alice")

        asyncio.run(prepare())
        return lambda *words: typer.testing.CliRunner().invoke(
            cli.app, ["dead", *words, "--redis-url", url], env={"COLUMNS": "200"}
        )

    def test_list_shows_no_prompt_and_show_does(self, dead: Callable[..., typer.testing.Result]) -> None:
        listed = dead("list").stdout
        assert "alice" in listed
        assert "worker_lost" in listed
        shown = json.loads(dead("show", "a").stdout)
        assert shown["submission"]["prompt_token_ids"] == [1, 2, 3]
        assert shown["submission"]["params"]["max_tokens"] == 10
        assert shown["attempts"] == 3

    def test_requeue_prints_the_new_id(self, dead: Callable[..., typer.testing.Result]) -> None:
        done = dead("requeue", "a")
        assert len(done.stdout.strip()) == 32
        assert isinstance(dead("show", "a").exception, NotFoundError)

    def test_purge_prints_how_many_there_were(self, dead: Callable[..., typer.testing.Result]) -> None:
        assert [dead("purge").stdout.strip() for _ in range(2)] == ["1", "0"]

    def test_help_says_that_prompts_are_in_it(self) -> None:
        assert "prompts" in typer.testing.CliRunner().invoke(cli.app, ["dead", "--help"]).stdout

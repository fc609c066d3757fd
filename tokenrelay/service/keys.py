"""Every Redis key name, lifetime and size of the relay, each with its reason. Knows no commands.

All keys of one model share a hash tag, so a script may touch any of them, in a cluster too.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

LIVE_TTL = 24 * 3600  # seconds; an unfinished request nobody works on or waits for may not stay for ever
MAILBOX_TTL = 60  # seconds; a dead API process's mailbox goes away, a paused one's survives
MAILBOX_ENTRIES = 1024  # about ten seconds of engine steps: a reader further behind reads the log instead
DEAD_ENTRIES = 100  # dead letters carry their payload, so few are kept …
DEAD_TTL = 7 * 24 * 3600  # … and not for long
USAGE_TTL = 92 * 24 * 3600  # what a tenant used on one day: for a bill of the last quarter
DRAIN_WINDOW_MS = 60_000  # of waiting: how far back "how fast the queue drains" looks

MAX_ADAPTERS = 1000  # loaded at run time: the hash has no TTL, so it has a bound
TIMELINE_BYTES = 4096  # of one request: some hundred entries, so that endless preemptions cannot fill the broker
EXPIRY_BATCH = 64  # requests ended per call when their deadlines have passed: meanwhile the broker serves nobody else

LUA_CONSTANTS = {
    name: globals()[name]
    for name in (
        *("LIVE_TTL", "MAILBOX_ENTRIES", "DEAD_ENTRIES", "DEAD_TTL", "DRAIN_WINDOW_MS", "USAGE_TTL"),
        *("TIMELINE_BYTES", "EXPIRY_BATCH"),
    )
}


class Keys:
    """The keys of one model. Those that ``permanent`` lists are bounded; every other key has a TTL."""

    def __init__(self, model: str) -> None:
        self.prefix = f"tokenrelay:{{{quote(model, safe='')}}}:"
        self.waiting = self.prefix + "waiting"  # sorted set: id by priority class, then virtual finish time
        self.leases = self.prefix + "leases"  # sorted set: id by lease expiry, milliseconds of Redis TIME
        self.deadlines = self.prefix + "deadlines"  # sorted set: unfinished id by deadline, milliseconds of Redis TIME
        self.fair = self.prefix + "fair"  # sorted set: virtual finish time per tenant, and the virtual clock
        self.dead = self.prefix + "dead"  # stream: requests no worker survived or could read (DEAD_TTL)
        self.sizes = self.prefix + "sizes"  # hash: tenant, tokens and bytes of each id that waits
        self.load = self.prefix + "load"  # hash: sums over the sizes, altogether and per tenant
        self.drain = self.prefix + "drain"  # hash: how fast the queue drains, and since when anything waits
        self.usage = self.prefix + "usage"  # hash: what each tenant used altogether, a few counters per tenant
        self.workers = self.prefix + "workers"  # sorted set: worker id by expiry of its announcement
        self.responses = self.prefix + "responses"  # sorted set: stored response by when it was last written
        self.response_sizes = self.prefix + "response_sizes"  # hash: bytes of each of them, and of "all"
        self.adapters = self.prefix + "adapters"  # hash: name → adapter loaded by the admin's route (MAX_ADAPTERS)
        self.wakeup = self.prefix + "wakeup"  # pub/sub channel: "submit", "cancel <id>" and "drop <id>"; may lose some

    @property
    def permanent(self) -> frozenset[str]:
        """The only keys without a TTL."""
        return frozenset(
            {
                *(self.waiting, self.sizes, self.load, self.drain, self.leases, self.deadlines, self.fair),
                *(self.workers, self.usage, self.responses, self.response_sizes, self.adapters),
            }
        )

    def request(self, request_id: str) -> str:
        """Hash: payload, state, owner, epoch, attempts, next, mailboxes, timeline … (LIVE_TTL, then its retention)."""
        return f"{self.prefix}request:{request_id}"

    def log(self, request_id: str) -> str:
        """Stream: entry ``i-0`` is event i. Lives as long as the request."""
        return f"{self.prefix}log:{request_id}"

    def limits(self, tenant: str) -> str:
        """Hash: when a tenant's buckets of requests and of tokens are full again (until they are: a minute at most)."""
        return f"{self.prefix}limits:{tenant}"

    def live(self, tenant: str) -> str:
        """Sorted set: a tenant's unfinished ids, if their number is limited (LIVE_TTL, renewed by every new one)."""
        return f"{self.prefix}live:{tenant}"

    def usage_on(self, day: int) -> str:
        """Hash: what each tenant used on this day, counted from 1970-01-01 UTC (USAGE_TTL)."""
        return f"{self.prefix}usage:{day}"

    def response(self, relay_id: str) -> str:
        """Hash: tenant, input and, once it has ended, the response as JSON (response_ttl_seconds)."""
        return f"{self.prefix}response:{relay_id}"

    def mailbox(self, api_id: str) -> str:
        """Stream: one entry per engine step for one API process (MAILBOX_TTL, renewed by its owner)."""
        return f"{self.prefix}mailbox:{api_id}"

    def worker(self, worker_id: str) -> str:
        """String: what a worker announces (one lease, renewed with every heartbeat)."""
        return f"{self.prefix}worker:{worker_id}"

    def claim(self, worker_id: str) -> str:
        """String: a worker's last claim, so that a repeated one finds the same requests (one lease)."""
        return f"{self.prefix}claim:{worker_id}"

    def idempotency(self, tenant: str, key: str) -> str:
        """String: the request a caller's idempotency key stands for. Hashed: both halves come from outside."""
        digest = hashlib.sha256(f"{len(tenant)}:{tenant}{key}".encode()).hexdigest()
        return f"{self.prefix}idempotency:{digest}"

"""Where requests stand until something comes of them: one question to the broker for all streams that want to know."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence

from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.load import QueueLoad, Whereabouts

LOOK_SECONDS = 0.5


class QueueWatch:
    """Asks while anybody follows. ``run`` must run."""

    def __init__(self, load: QueueLoad) -> None:
        self._load = load
        self._wanted: Counter[str] = Counter()  # by request: how many follow it
        self._somebody = asyncio.Event()
        self._known: Mapping[str, Whereabouts] = {}
        self._looked = asyncio.Event()  # set, and replaced, with every look

    async def run(self) -> None:
        while True:
            await self._somebody.wait()
            await asyncio.sleep(LOOK_SECONDS)
            self._known = await self._look(list(self._wanted))
            self._looked.set()
            self._looked = asyncio.Event()

    async def follow(self, request_ids: Sequence[str]) -> AsyncGenerator[dict[str, Whereabouts], None]:
        """What is known of these requests, now and from now on; does not end by itself."""
        self._wanted.update(request_ids)
        self._somebody.set()
        try:
            yield await self._look(request_ids)
            while True:
                await self._looked.wait()
                yield {name: self._known[name] for name in request_ids if name in self._known}
        finally:
            self._wanted -= Counter(request_ids)
            if not self._wanted:
                self._somebody.clear()

    async def _look(self, request_ids: Sequence[str]) -> dict[str, Whereabouts]:
        """Nothing is known of any while the broker is away."""
        try:
            return await self._load.whereabouts(request_ids)
        except BrokerUnavailable:
            return {}

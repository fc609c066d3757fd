"""Which adapters a worker has in memory, and for whom: loaded when a claimed request needs one, beside the engine."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from tokenrelay.model.transformer.lora import Adapter as Weights
from tokenrelay.service.messages import Adapter
from tokenrelay.service.worker.engine_thread import EngineThread

User = tuple[str, int]  # a request and the epoch of its claim


class AdapterShelf:
    """Holds ``max_loras``. The least recently used one that nobody uses makes room; if all are in use, who asks for
    another one waits, those behind it wait too, and nothing more should be claimed: so nobody is passed for ever."""

    def __init__(self, engine: EngineThread, load: Callable[[Adapter], Weights], max_loras: int) -> None:
        """``load`` runs in a thread of its own, and raises what is wrong with the files."""
        self.is_full = False  # somebody waits for room
        self._engine = engine
        self._load = load
        self._max_loras = max_loras
        self._users: OrderedDict[str, set[User]] = OrderedDict()  # by digest, least recently used first
        self._taking = asyncio.Lock()  # first come, first served
        self._released = asyncio.Event()

    async def take(self, adapter: Adapter, user: User) -> None:
        """Return once it is in the engine's memory; it stays there until ``release``."""
        if adapter.digest not in self._users or self.is_full:
            async with self._taking:
                if adapter.digest not in self._users:
                    await self._make_room()
                    self._engine.add_adapter(adapter.digest, await asyncio.to_thread(self._load, adapter))
                    self._users[adapter.digest] = set()
                self._use(adapter.digest, user)
        else:
            self._use(adapter.digest, user)

    def _use(self, digest: str, user: User) -> None:
        self._users[digest].add(user)
        self._users.move_to_end(digest)

    def release(self, user: User) -> None:
        """Does nothing for a user of none. The engine must have forgotten the request, or been told to."""
        for users in self._users.values():
            users.discard(user)
        self._released.set()

    async def _make_room(self) -> None:
        while len(self._users) >= self._max_loras:
            idle = next((digest for digest, users in self._users.items() if not users), None)
            if idle is not None:
                del self._users[idle]
                self._engine.remove_adapter(idle)
                continue
            await self._wait_for_release()

    async def _wait_for_release(self) -> None:
        self.is_full = True
        self._released.clear()
        try:
            await self._released.wait()
        finally:
            self.is_full = False

"""From a body's wish for structure to the grammar that a worker compiles: tried first, where it can do no harm."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.sandbox import Sandbox
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.schemas.structured import Structure
from tokenrelay.service.errors import InvalidGrammar, Unavailable

NUM_TRIALS = 2  # at once
MAX_WAITING = 64  # at the sandbox's limit of a second each, half a minute


class Grammars:
    """Tries grammars off the event loop. ``close`` it, or its process lives as long as this one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._sandbox = Sandbox(tokenizer)
        self._threads = ThreadPoolExecutor(NUM_TRIALS, thread_name_prefix="grammar")
        self._num_waiting = 0

    async def grammar_of(self, structure: Structure | None) -> str:
        """What ``SamplingParams.grammar`` is to be; "" without a structure.

        Raises:
            InvalidGrammar: it cannot be used; the message says why and where.
            Unavailable: too many are being tried.
        """
        if structure is None:
            return ""
        if self._num_waiting >= MAX_WAITING:
            raise Unavailable("Too many grammars are being checked at this moment; try again.")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._sandbox.try_out, structure.kind, structure.source
            )
        except GrammarError as error:
            raise InvalidGrammar(f"'{structure.param}': {error}.", param=structure.param) from None
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

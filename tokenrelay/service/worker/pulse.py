"""The engine's pulse: how long its thread has been busy with one turn, and what follows when that is too long.

A thread that waits, for work or for the broker, rests: that may take any time. The watchdog is the interpreter's own
(``faulthandler``): it needs no lock that a wedged engine could hold, writes where every thread stood, and exits with 1.
"""

from __future__ import annotations

import faulthandler
import time
from collections import deque
from collections.abc import Callable

STALL_SECONDS = 1.0  # an engine this long at one turn stands still …
STALL_FACTOR = 2  # … unless turns of that length are usual: a long prompt, a large model
RECENT_TURNS = 64
REARM_SECONDS = 1.0  # the watchdog is wound up this often: it starts a thread every time


class Pulse:
    """``beat`` and ``rest`` are for the engine's thread, ``stalled`` for any.

    Args:
        watchdog_seconds: a turn of this length ends the process; 0: none does.
    """

    def __init__(self, watchdog_seconds: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._watchdog_seconds = watchdog_seconds
        self._clock = clock
        self._turn_began: float | None = None
        self._wound_up_at: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_TURNS)  # lengths of turns, seconds

    def beat(self) -> None:
        """A turn begins; the one before is over."""
        now = self._clock()
        self._end_turn(now)
        self._turn_began = now
        if self._watchdog_seconds and (self._wound_up_at is None or now - self._wound_up_at >= REARM_SECONDS):
            faulthandler.dump_traceback_later(self._watchdog_seconds + REARM_SECONDS, exit=True)
            self._wound_up_at = now

    def rest(self) -> None:
        """The turn is over, and the thread waits for others."""
        self._end_turn(self._clock())
        self._turn_began = None
        if self._wound_up_at is not None:
            faulthandler.cancel_dump_traceback_later()
            self._wound_up_at = None

    @property
    def stalled(self) -> bool:
        """Whether the current turn is longer than any that was usual of late."""
        began = self._turn_began
        usual = max(list(self._recent), default=0.0)
        return began is not None and self._clock() - began > max(STALL_SECONDS, STALL_FACTOR * usual)

    def _end_turn(self, now: float) -> None:
        if self._turn_began is not None:
            self._recent.append(now - self._turn_began)

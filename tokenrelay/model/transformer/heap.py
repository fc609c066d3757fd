"""What the C library keeps of freed memory: nothing large while weights are loaded, all of it while steps are computed.

Only glibc can be told. Elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them


@contextmanager
def returning_memory() -> Iterator[None]:
    """Blocks of 128 KiB and more are mapped one by one: what is needed for a moment leaves no holes between weights.

    Afterwards the thresholds are the largest that glibc would have found itself: a step's buffers stay for the next.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    _set_thresholds(libc, 1 << 17)
    try:
        yield
    finally:
        _set_thresholds(libc, 1 << 25)
        libc.malloc_trim(0)


def _set_thresholds(libc: ctypes.CDLL, size: int) -> None:
    libc.mallopt(_MMAP_THRESHOLD, size)
    libc.mallopt(_TRIM_THRESHOLD, 2 * size)

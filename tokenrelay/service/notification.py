"""How a process tells its supervisor that it is ready: one newline on an inherited pipe, as s6's services do."""

from __future__ import annotations

import os


def tell_ready(fd: int) -> None:
    """Once per process. -1: nobody wants to know."""
    if fd >= 0:
        os.write(fd, b"\n")
        os.close(fd)

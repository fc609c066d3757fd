"""Who a worker is, among those of its model."""

from __future__ import annotations

import os
import secrets
from typing import NamedTuple


class Role(NamedTuple):
    """A ``spare`` worker claims only while fewer than the setting ``workers`` others are active."""

    worker_id: str
    spare: bool = False


def new_worker_id() -> str:
    """One that no other process has, had or will have."""
    return f"{os.uname().nodename}-{secrets.token_hex(8)}"

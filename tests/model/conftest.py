"""The native kernels may use every core, as in a worker."""

from __future__ import annotations

import os

import pytest

from tokenrelay.model.transformer.kernels import native


@pytest.fixture(scope="session", autouse=True)
def _all_cores() -> None:
    if native.is_available():
        native.set_num_threads(len(os.sched_getaffinity(0)))

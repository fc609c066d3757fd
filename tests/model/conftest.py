"""The native kernels may use every core and torch one thread, as in a worker: two pools fight for the cores."""

from __future__ import annotations

import os

import pytest
import torch

from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import cuda, native


@pytest.fixture(scope="session", autouse=True)
def _all_cores() -> None:
    if native.is_available():
        native.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cuda_operations() -> None:
    """Registered as on a machine with a GPU: fake tensors have that device."""
    if not torch.cuda.is_available():
        kernels.register("cuda", cuda)

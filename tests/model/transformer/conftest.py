"""The CUDA operations are registered as on a machine with a GPU: fake tensors have that device."""

from __future__ import annotations

import pytest
import torch

from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import cuda


@pytest.fixture(scope="session", autouse=True)
def _cuda_operations() -> None:
    if not torch.cuda.is_available():
        kernels.register("cuda", cuda)

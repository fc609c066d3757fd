"""A GPU that is not there: tensors with shapes, types and devices, but no numbers.

Our operations run as CUDA runs them, down to torch's own: ``FakeTensorMode`` alone would take the shapes we declare.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.engine.executor import EagerExecutor
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import cuda, reference
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.loading import add_tables, materialise, typed

CUDA = torch.device("cuda")
BLOCK = kernels.cuda.BLOCK_SIZE


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Everything made inside is fake."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        for name in kernels._names:
            patch.setattr(kernels, f"_{name}", getattr(cuda, name, None) or getattr(reference, name))
        patch.setattr(Tensor, "pin_memory", lambda self: self)  # which asks for a real GPU
        with FakeTensorMode():
            yield


def fake_executor(config: ModelConfig, dtype: torch.dtype, context: int, num_blocks: int = 8) -> EagerExecutor:
    """A network and its cache, as loading makes them for CUDA."""
    with unset_fake_temporarily():  # a fake parameter cannot change its type
        model = typed(config, context, 0, dtype, CUDA)
    materialise(model, CUDA)
    add_tables(model, CUDA)
    return EagerExecutor(model, allocate_kv_cache(config, num_blocks, BLOCK, dtype, CUDA), CUDA)

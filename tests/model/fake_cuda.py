"""A GPU that is not there: tensors with shapes, types and devices, but no numbers.

Our operations run as CUDA runs them, down to torch's own: ``FakeTensorMode`` alone would take the shapes we declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.engine.executor import EagerExecutor
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import cuda, reference
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.loading import empty, typed

CUDA = torch.device("cuda")
BLOCK = kernels.cuda.BLOCK_SIZE


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Everything made inside is fake."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in kernels._names:
            patch.setattr(kernels, f"_{name}", getattr(cuda, name, None) or getattr(reference, name))
        for name, method in _METHODS.items():  # not of Tensor: undone, it would look like a sequence to C code
            patch.setattr(FakeTensor, name, method, raising=False)
        with FakeTensorMode():
            yield


_real_to = Tensor.to


def _to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    if args == (CUDA,):
        return torch.empty_like(tensor, device=CUDA)
    return _real_to(tensor, *args, **options)


def _getitem(tensor: Tensor, key: Any) -> Tensor:
    dim = 0
    index: list[Tensor | None] = []
    keys = key if isinstance(key, tuple) else (key,)
    for position, one in enumerate(keys):
        if one is Ellipsis:
            dim = tensor.dim() - sum(other is not None for other in keys[position + 1 :])
        elif one is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(one, slice):
            tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1), dim + 1
        elif isinstance(one, int):
            tensor = tensor.select(dim, one)
        else:
            index += [None] * (dim - len(index)) + [one]
            dim += 1
    return torch.ops.aten.index.Tensor(tensor, index) if index else tensor


def _setitem(tensor: Tensor, key: Any, value: Any) -> None:
    value = value if isinstance(value, Tensor) else torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if isinstance(key, Tensor):
        torch.ops.aten.index_put_(tensor, [key], value)
    elif isinstance(key, tuple) and isinstance(key[0], Tensor):  # the others come after it
        rest = [torch.full_like(key[0], one) if isinstance(one, int) else one for one in key[1:]]
        torch.ops.aten.index_put_(tensor, [key[0], *rest], value)
    else:
        _getitem(tensor, key).copy_(value)


_METHODS: dict[str, Callable[..., Any]] = {  # torch's own ask for a real GPU before they come to the fake one
    "to": _to,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "__invert__": lambda self: torch.bitwise_not(self),
    "contiguous": lambda self: torch.clone(self),
    "copy_": lambda self, other, non_blocking=False: torch.ops.aten.copy_.default(self, other, non_blocking),
    "pin_memory": lambda self: self,
}


def fake_executor(config: ModelConfig, dtype: torch.dtype, context: int, num_blocks: int = 8) -> EagerExecutor:
    """A network and its cache, as loading makes them for CUDA."""
    with unset_fake_temporarily():  # a fake parameter cannot change its type
        shapes = typed(config, context, 0, dtype, CUDA)
    return EagerExecutor(empty(shapes, context, CUDA), allocate_kv_cache(config, num_blocks, BLOCK, dtype, CUDA), CUDA)

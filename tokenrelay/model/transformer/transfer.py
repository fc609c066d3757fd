"""From the host's memory to a device's, without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """Where ``device`` can fetch it by itself. torch gives such memory out again only when the copies from it are done,
    so it may be dropped at once."""
    return host.pin_memory() if device.type == "cuda" else host


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that is behind what the device has to do already; on a CPU the tensor itself."""
    return pinned(host, device).to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> Tensor:
    """``torch.tensor(values)``, which would wait for a GPU."""
    return to_device(torch.tensor(values, dtype=dtype), device)

"""A test may choose instruction set and threads of the native kernels, and has the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenrelay.model.transformer.kernels import native


@pytest.fixture
def restored_settings() -> Iterator[None]:
    torch.manual_seed(0)
    isa, threads = native.isa(), native.num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)

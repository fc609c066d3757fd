"""What an adapter adds to one matrix's output, and on which devices."""

from __future__ import annotations

import pytest
import torch

from tests.model.fake_cuda import fake_cuda, fake_executor
from tests.model.transformer.test_fake_cuda import CONTEXT, LLAMA, mixed_step
from tests.model.transformer.test_native_layers import PLAIN, random_model
from tokenrelay.model.transformer.adapters import Adapters
from tokenrelay.model.transformer.lora import Part, update


@pytest.mark.parametrize("scale", [2.0, 1 / 3])
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([0, 3, 6])], ids=["side by side", "apart"])
def test_the_parts_of_a_matrix_are_added_at_once(rows: slice | torch.Tensor, scale: float) -> None:
    """Of q and v, say: k, which is between them, stays as it was, and so do the rows of others."""
    parts = [
        Part(first, torch.randn(rank, 24).bfloat16(), torch.randn(width, rank).bfloat16(), scale)
        for first, rank, width in ((40, 3, 17), (0, 5, 20))
    ]
    x, out = torch.randn(7, 24), torch.randn(7, 64)
    expected = out.clone().double()
    for first, a, b, _ in parts:
        expected[rows, first : first + len(b)] += scale * (x[rows].double() @ a.double().T @ b.double().T)
    update(parts, random_model(PLAIN)).add_to(out, x, rows)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_step_with_adapters_runs_on_a_gpu_that_is_not_there() -> None:
    spans = [("one", 10), ("", 4), ("one", 6), ("two", 1)]  # numbered rows, and a slice
    with fake_cuda():
        executor = fake_executor(LLAMA, torch.bfloat16, CONTEXT)
        adapters = Adapters(executor._model)
        for name in ("one", "two"):
            parts = [Part(64, torch.zeros(4, LLAMA.hidden_size), torch.zeros(32, 4), 0.5)]
            adapters.add(name, {"layers.1.attention.qkv_proj": update(parts, executor._model)})
        adapters.use(spans)
        hidden = executor.forward(mixed_step(), capturable=not adapters.in_use)
    assert adapters.in_use
    assert (tuple(hidden.shape), hidden.dtype, hidden.device.type) == ((21, 128), torch.bfloat16, "cuda")

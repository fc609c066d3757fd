"""A network so small that what is around it is tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Two layers, random weights, SmolLM2's first tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", smollm2_path)

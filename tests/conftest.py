"""Fixtures that every part of the suite may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrelay.model.weights.sources import pull


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: downloaded into the user's cache once, by the code under test."""
    return pull("smollm2-135m-instruct", progress=False)

"""One tokenizer of a real model, and one compiler for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.structured.writing import Writer
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(resolve(str(smollm2_path)))


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture(scope="session")
def writer(tokenizer: Tokenizer) -> Writer:
    return Writer(tokenizer)

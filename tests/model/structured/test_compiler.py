"""Compiling: once per grammar while it is remembered, by many threads at once, and never for longer than allowed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.model.structured.writing import Writer
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import MAX_THREADS, GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.matching import new_matcher
from tokenrelay.model.tokenizer import Tokenizer


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    grammar = grammars.regex("once")
    assert compiler.compile(grammar) is compiler.compile(grammar)


def test_the_least_recently_used_is_forgotten(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, max_cached=2)
    first, second, third = (grammars.regex(letter) for letter in "abc")
    kept, forgotten = compiler.compile(first), compiler.compile(second)
    compiler.compile(first)
    compiler.compile(third)
    assert compiler.compile(first) is kept
    assert compiler.compile(second) is not forgotten


def test_threads_compile_and_write_at_once(compiler: GrammarCompiler, writer: Writer) -> None:
    def write(seed: int) -> str:
        grammar = grammars.choice([f"answer {seed % 5}", f"other {seed % 5}"])
        return writer.write(compiler.compile(grammar).constraint(), seed)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(write, range(40)))
    assert all(text in (f"answer {seed % 5}", f"other {seed % 5}") for seed, text in enumerate(texts))


def test_what_takes_too_long_is_left_behind(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only so many may be: then there is no thread for others, until one has ended."""
    compiler, gate = GrammarCompiler(tokenizer, seconds=0.02), threading.Event()

    def slowly(llguidance_tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
        gate.wait(30)
        return new_matcher(llguidance_tokenizer, grammar)

    monkeypatch.setattr("tokenrelay.model.structured.compiler.new_matcher", slowly)
    for i in range(MAX_THREADS):
        with pytest.raises(GrammarError, match=r"longer than 0\.02 seconds"):
            compiler.compile(grammars.regex(f"slow{i}"))
    with pytest.raises(GrammarError, match="other grammars are taking long"):
        compiler.compile(grammars.regex("starved"))
    gate.set()
    patient = GrammarCompiler(tokenizer)
    assert patient.compile(grammars.regex("patient")).constraint().masks(()).any()

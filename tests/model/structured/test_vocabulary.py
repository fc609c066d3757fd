"""Tokens become bytes as the detokenizer has them, whatever the kind of tokenizer and the size of the network."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.model.sentencepiece import write_sentencepiece
from tests.model.structured.writing import Writer, allowed
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.vocabulary import Vocabulary, llguidance_tokenizer
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve

PIECES = [*'▁abcdehlorstwz<>/{}":', "▁t", "he", "▁the", "ll", "lo", "hello", "▁wor", "ld", "or", '":', '{"', "▁▁"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte fallback, and a space before every text."""
    path = write_sentencepiece(tmp_path_factory.mktemp("spm") / "spm.gguf", PIECES)
    return Tokenizer.from_source(resolve(str(path)))


def test_a_special_token_is_never_text(compiler: GrammarCompiler, writer: Writer) -> None:
    """Though its spelling is text, and is written in other tokens."""
    spelling = "<|im_start|>"
    (special,) = writer.tokenizer.encode(spelling, add_special_tokens=False)
    constraint = compiler.compile(grammars.choice([spelling])).constraint()
    text = b""
    while special not in (ids := list(allowed(constraint.masks(())[0]))) and text != spelling.encode():
        text += writer.tokenizer.token_bytes(ids[0])
        constraint.accept(ids[:1])
    assert text.decode() == spelling
    anything = compiler.compile(grammars.regex(r"(.|\n)*")).constraint().masks(())[0]
    assert writer.tokenizer.special_ids & set(allowed(anything).tolist()) == set(writer.tokenizer.eos_token_ids)


def test_a_grammar_may_name_a_special_token(compiler: GrammarCompiler, writer: Writer) -> None:
    (special,) = writer.tokenizer.encode("<|im_start|>", add_special_tokens=False)
    constraint = compiler.compile(grammars.lark('start: <|im_start|> "x"')).constraint()
    assert list(allowed(constraint.masks(())[0])) == [special]


def test_tokens_of_parts_of_a_character(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(grammars.regex("[🗼🙂東]{3}"))
    for seed in range(10):
        assert set(writer.write(compiled.constraint(), seed)) <= set("🗼🙂東")


def test_a_network_larger_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + 70
    compiler = GrammarCompiler(tokenizer, vocab_size=size)
    for grammar in (grammars.regex(r"(.|\n)*"), grammars.json_object(), grammars.lark('start: <[*]> "x"')):
        masks = compiler.compile(grammar).constraint().masks([tokenizer.vocab_size + 1])
        assert masks.shape == (2, -(-size // 32))
        assert allowed(masks[0]).max() < tokenizer.vocab_size


def test_several_ends(tokenizer: Tokenizer) -> None:
    ends = (2, 0, 17)  # the last is not marked as special
    vocabulary = dataclasses.replace(Vocabulary.of(tokenizer), eos_token_ids=ends)
    several = _Table(tokenizer, eos_token_ids=ends)
    assert Vocabulary.of(several).special_ids == sorted({*tokenizer.special_ids, 17})
    assert llguidance_tokenizer(vocabulary).eos_tokens == list(ends)
    compiler = GrammarCompiler(several)  # type: ignore[arg-type]
    constraint = compiler.compile(grammars.regex("a?")).constraint()
    a = tokenizer.encode("a", add_special_tokens=False)
    assert sorted(allowed(constraint.masks(())[0])) == sorted({*ends, *a})
    for end in ends:
        constraint = compiler.compile(grammars.regex("a?")).constraint()
        constraint.accept([end])
        assert constraint.error == ""
        assert set(allowed(constraint.masks(())[0])) == set(ends)


def test_a_model_without_an_end_has_no_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="end-of-sequence"):
        GrammarCompiler(_Table(tokenizer, eos_token_ids=())).compile(grammars.json_object())  # type: ignore[arg-type]


def test_sentencepiece_with_byte_fallback(sentencepiece: Tokenizer) -> None:
    """Characters without a piece are written in bytes, and each way of writing counts."""
    writer, compiler = Writer(sentencepiece), GrammarCompiler(sentencepiece)
    compiled = compiler.compile(grammars.choice(["hello world", '{"é":"🙂"}']))
    texts = {writer.write(compiled.constraint(), seed) for seed in range(30)}
    assert texts == {"hello world", '{"é":"🙂"}'}
    letter = sentencepiece.encode("h", add_special_tokens=False)[-1]
    assert {letter, 3 + ord("h")} <= set(allowed(compiled.constraint().masks(())[0]).tolist())


def test_sentencepiece_s_space_is_not_forced_upon_a_text(sentencepiece: Tokenizer) -> None:
    """The tokenizer writes one before every text; the grammar has none."""
    for text in ("hello world", "hé", "the", "é"):
        forced = GrammarCompiler(sentencepiece).compile(grammars.choice([text])).constraint().forced()
        spelled = b"".join(map(sentencepiece.token_bytes, forced))
        assert text.encode().startswith(spelled)
        assert spelled
        assert forced[0] == sentencepiece.encode("a" + text, add_special_tokens=False)[2] or forced[0] < 259


class _Table:
    """A tokenizer with other ends."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

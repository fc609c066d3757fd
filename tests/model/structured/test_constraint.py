"""The promises that the engine relies on, at every step of texts written by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from llguidance import LLParserLimits

from tests.model.structured.schemas import SCHEMAS, closed
from tests.model.structured.test_grammars import SUM_GBNF
from tests.model.structured.writing import Writer, allowed
from tokenrelay.model.structured import grammars, matching
from tokenrelay.model.structured.compiler import CompiledGrammar, GrammarCompiler
from tokenrelay.model.structured.constraint import Constraint
from tokenrelay.model.tokenizer import Tokenizer

GRAMMARS = {
    **{name: grammars.json_schema(SCHEMAS[name]) for name in ("fixed keys", "enum", "recursion", "one of by kind")},
    "object": grammars.json_object(),
    "regex": grammars.regex(r"[a-zé]{1,40}( \d+)?"),
    "sums": grammars.ebnf(SUM_GBNF),
    "limited lexeme": grammars.lark('start: word "!"\nword[max_tokens=3]: /[a-z]+/'),  # cannot be rolled back
}


@pytest.fixture(params=GRAMMARS)
def compiled(request: pytest.FixtureRequest, compiler: GrammarCompiler) -> CompiledGrammar:
    return compiler.compile(GRAMMARS[request.param])


def walk(compiled: CompiledGrammar, writer: Writer, seed: int, num_tokens: int = 30) -> list[int]:
    return writer.ids(compiled.constraint(), random.Random(seed), num_tokens)


def after(compiled: CompiledGrammar, ids: Sequence[int]) -> Constraint:
    constraint = compiled.constraint()
    constraint.accept(ids)
    assert constraint.error == ""
    return constraint


def test_what_a_mask_allows_can_be_accepted_and_nothing_else(compiled: CompiledGrammar, writer: Writer) -> None:
    chance = random.Random(0)
    ids = walk(compiled, writer, 0)
    for cut in range(len(ids)):
        before = after(compiled, ids[:cut])
        tokens = allowed(before.masks(())[0])
        for token_id in chance.sample(list(tokens), min(3, len(tokens))):
            assert before.num_valid([token_id]) == 1
            assert after(compiled, [*ids[:cut], token_id]).error == ""
        if not before.forced():
            for token_id in chance.sample(range(writer.tokenizer.vocab_size), 5):
                assert (before.num_valid([token_id]) == 1) == (token_id in tokens)


def test_a_token_that_is_not_allowed_ends_it(compiler: GrammarCompiler, writer: Writer) -> None:
    constraint = compiler.compile(grammars.regex("[a-z]{3}")).constraint()
    constraint.accept(writer.encode("7"))
    assert constraint.error
    assert list(allowed(constraint.masks([5, 6])[2])) == list(writer.tokenizer.eos_token_ids)
    assert constraint.forced() == []
    assert constraint.num_valid(writer.encode("a")) == 0
    constraint.accept(writer.encode("a"))


def test_masks_behind_drafts_are_those_of_the_accepted_tokens(compiled: CompiledGrammar, writer: Writer) -> None:
    for seed in range(4):
        ids = walk(compiled, writer, seed)
        constraint = compiled.constraint()
        for cut in range(0, len(ids), 4):
            drafts = ids[cut : cut + 4]
            masks = constraint.masks(drafts)
            assert masks.dtype == np.int32
            for i in range(len(drafts) + 1):
                assert (masks[i] == after(compiled, ids[: cut + i]).masks(())[0]).all()
            constraint.accept(drafts)


def test_asking_leaves_the_state_as_it_was(compiled: CompiledGrammar, writer: Writer) -> None:
    ids = walk(compiled, writer, 1)
    asked, undisturbed = compiled.constraint(), compiled.constraint()
    for token_id in ids:
        asked.masks(ids[:3])
        asked.masks([token_id, token_id, 2])
        asked.forced()
        asked.num_valid([token_id, 7, 2])
        assert (asked.masks(())[0] == undisturbed.masks(())[0]).all()
        asked.accept([token_id])
        undisturbed.accept([token_id])
    assert asked.error == ""


def test_a_draft_that_is_not_allowed_leaves_only_the_end_behind_it(compiler: GrammarCompiler, writer: Writer) -> None:
    constraint = compiler.compile(grammars.regex("[a-z]{1,9}")).constraint()
    a, one = writer.encode("a")[0], writer.encode("1")[0]
    masks = constraint.masks([a, one, a])
    assert a in allowed(masks[1])
    assert one not in allowed(masks[1])
    assert [list(allowed(mask)) for mask in masks[2:]] == [list(writer.tokenizer.eos_token_ids)] * 2
    assert constraint.num_valid([a, one, a]) == 1
    assert constraint.error == ""


def test_the_end_is_allowed_exactly_where_a_text_is_whole(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(grammars.regex("ab(cd)?"))
    (eos,) = writer.tokenizer.eos_token_ids
    for text, whole in (("", False), ("a", False), ("ab", True), ("abc", False), ("abcd", True)):
        constraint = after(compiled, writer.encode(text))
        assert (eos in allowed(constraint.masks(())[0])) == whole
        assert constraint.num_valid([eos, eos]) == int(whole)


def test_behind_a_whole_text_only_the_end_may_come(compiler: GrammarCompiler, writer: Writer) -> None:
    eos = list(writer.tokenizer.eos_token_ids)
    constraint = after(compiler.compile(grammars.choice(["yes", "no"])), writer.encode("no"))
    for _ in range(3):  # an engine that ignores the end goes on with it
        assert list(allowed(constraint.masks(())[0])) == eos
        assert list(allowed(constraint.masks([*eos, *eos])[2])) == eos
        assert constraint.num_valid(writer.encode("a")) == 0
        constraint.accept(eos)
    assert constraint.error == ""


def test_fixed_keys_are_forced_as_the_tokenizer_writes_them(compiler: GrammarCompiler, writer: Writer) -> None:
    schema = closed(temperature={"const": 21}, unit={"enum": ["celsius", "kelvin"]})
    options = {"x-guidance": {"whitespace_flexible": False}}
    constraint = compiler.compile(grammars.json_schema(schema | options)).constraint()
    text = ""
    while forced := constraint.forced():
        assert constraint.num_valid(forced) == len(forced)
        for token_id, mask in zip(forced, constraint.masks(forced), strict=False):
            assert list(allowed(mask)) == [token_id]
        constraint.accept(forced)
        text += writer.tokenizer.decode(forced)
    assert text == '{"temperature":21,"unit":"'
    constraint.accept(writer.encode("kel"))
    assert writer.tokenizer.decode(constraint.forced()).startswith("vin")


def test_constraints_of_one_grammar_do_not_disturb_each_other(compiled: CompiledGrammar, writer: Writer) -> None:
    first, second = walk(compiled, writer, 2), walk(compiled, writer, 3)
    one, other = compiled.constraint(), compiled.constraint()
    for i in range(max(len(first), len(second))):
        for constraint, ids in ((one, first), (other, second)):
            alone = after(compiled, ids[:i])
            assert (constraint.masks(())[0] == alone.masks(())[0]).all()
            constraint.accept(ids[i : i + 1])


def test_a_resumed_text_goes_on_as_the_undisturbed(compiled: CompiledGrammar, writer: Writer) -> None:
    ids = walk(compiled, writer, 4)
    undisturbed = compiled.constraint()
    for cut, token_id in enumerate(ids):
        resumed = after(compiled, ids[:cut])
        assert resumed.forced() == undisturbed.forced()
        assert (resumed.masks(())[0] == undisturbed.masks(())[0]).all()
        undisturbed.accept([token_id])


def test_an_exhausted_automaton_is_replaced(
    tokenizer: Tokenizer, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every constraint of a grammar shares its automaton, which has a limit. Here it needs 2^60 states."""
    monkeypatch.setattr(matching, "_LIMITS", LLParserLimits(max_lexer_states=1000, verbose_errors=False))
    compiler = GrammarCompiler(tokenizer)
    grammar = grammars.regex("[ab]*a[ab]{60}c")
    compiled, chance = compiler.compile(grammar), random.Random(0)
    letters = [writer.encode("a")[0], writer.encode("b")[0]]
    while not compiled.failed:
        constraint = compiled.constraint()
        for _ in range(500):
            constraint.masks(())
            constraint.accept([chance.choice(letters)])
    assert "too many" in constraint.error
    assert compiler.compile(grammar) is not compiled
    assert compiler.compile(grammar).constraint().masks(()).any()

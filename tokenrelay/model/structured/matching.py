"""Grammar string → llguidance's matcher, within llguidance's own limits. What these do not bound, ``sandbox`` does."""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tokenrelay.model.structured.errors import GrammarError, explain

MAX_GRAMMAR = 128 << 10  # characters; it waits in the broker as often as there are requests with it
MAX_LEXER_STATES = 50_000  # of one grammar, over all its requests; measured: 0.3 kB each
NUM_TRIAL_TOKENS = 8

_LIMITS = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at its beginning, the first steps tried and so in the lexer's cache, which its copies share.

    Raises:
        GrammarError: it cannot be compiled, is too large, or allows nothing.
    """
    if len(grammar) > MAX_GRAMMAR:
        raise GrammarError(f"it has {len(grammar)} characters, and {MAX_GRAMMAR} are allowed")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    _require_sound(matcher)
    _try_out(matcher.deep_copy(), frozenset(tokenizer.eos_tokens))
    return matcher


def _require_sound(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(explain(matcher.get_error()))


def _try_out(matcher: LLMatcher, eos_token_ids: frozenset[int]) -> None:
    """Some grammars compile, and fail at their first tokens."""
    for _ in range(NUM_TRIAL_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        _require_sound(matcher)
        token = (mask & -mask).bit_length() - 1  # the first that is allowed
        if token in eos_token_ids:
            return
        matcher.consume_token(token)
        _require_sound(matcher)

"""Compiles grammars, and keeps the latest. Many requests share one automaton, which grows with what they write."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

from llguidance import LLMatcher, LLTokenizer

from tokenrelay.model.structured.constraint import Constraint, VocabularyMasks
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.matching import new_matcher
from tokenrelay.model.structured.vocabulary import Vocabulary, llguidance_tokenizer
from tokenrelay.model.tokenizer import Tokenizer

MAX_CACHED = 32  # each may grow to MAX_LEXER_STATES
COMPILE_SECONDS = 10.0  # several times what the sandbox allows: the engine may have the cores
MAX_THREADS = 4  # that compile, or were left behind
STACK_BYTES = 16 << 20  # eight times the sandbox's

_stack_size = threading.Lock()  # threading.stack_size is the whole process's


class CompiledGrammar:
    """The beginning of every sequence of one grammar. ``failed`` says that its automaton is exhausted."""

    def __init__(self, matcher: LLMatcher, masks: VocabularyMasks) -> None:
        self.failed = False
        self._matcher = matcher
        self._masks = masks

    def constraint(self) -> Constraint:
        """For one more sequence; costs microseconds."""
        return Constraint(self._matcher.deep_copy(), self._masks, self._note_failure)

    def _note_failure(self) -> None:
        self.failed = True


class GrammarCompiler:
    """Thread-safe. The vocabulary is prepared with the first grammar, which takes a moment.

    A compilation that exceeds ``seconds`` is given up, but its thread goes on: let a ``Sandbox`` try strangers'
    grammars before. ``vocab_size`` is the network's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int | None = None,
        max_cached: int = MAX_CACHED,
        seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_cached = max_cached
        self._seconds = seconds
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._threads = threading.BoundedSemaphore(MAX_THREADS)
        self._cached: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._prepared: tuple[LLTokenizer, VocabularyMasks] | None = None

    def compile(self, grammar: str) -> CompiledGrammar:
        """``grammar`` is what ``grammars`` or ``tool_calls`` wrote.

        Raises:
            GrammarError: it cannot be compiled, is too large, allows nothing, or takes too long.
        """
        return self._find(grammar) or self._keep(grammar, self._in_a_thread(grammar))

    def _find(self, grammar: str) -> CompiledGrammar | None:
        with self._lock:
            found = self._cached.get(grammar)
            if found is None or found.failed:
                return None
            self._cached.move_to_end(grammar)
            return found

    def _keep(self, grammar: str, compiled: CompiledGrammar) -> CompiledGrammar:
        with self._lock:
            self._cached[grammar] = compiled
            self._cached.move_to_end(grammar)
            while len(self._cached) > self._max_cached:
                self._cached.popitem(last=False)
        return compiled

    def _in_a_thread(self, grammar: str) -> CompiledGrammar:
        """One with a stack of known size, that may be left behind."""
        if not self._threads.acquire(timeout=self._seconds):
            raise GrammarError("other grammars are taking long to compile; try again")
        result: Future[CompiledGrammar] = Future()
        thread = threading.Thread(target=self._settle, args=(result, grammar), name="grammar", daemon=True)
        with _stack_size:
            before = threading.stack_size(STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        try:
            return result.result(self._seconds)
        except TimeoutError:
            raise GrammarError(f"it takes longer than {self._seconds:g} seconds to compile") from None

    def _settle(self, result: Future[CompiledGrammar], grammar: str) -> None:
        try:
            tokenizer, masks = self._prepare()
            result.set_result(CompiledGrammar(new_matcher(tokenizer, grammar), masks))
        except BaseException as error:
            result.set_exception(error)
        finally:
            self._threads.release()

    def _prepare(self) -> tuple[LLTokenizer, VocabularyMasks]:
        with self._preparing:
            if self._prepared is None:
                vocabulary = Vocabulary.of(self._tokenizer, self._vocab_size)
                self._prepared = llguidance_tokenizer(vocabulary, self._encode), VocabularyMasks(vocabulary)
            return self._prepared

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)

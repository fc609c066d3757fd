"""Tries grammars of strangers where they can do no harm: in processes that are killed at a limit.

Measured with llguidance 1.9: its own limits do not bound ``patternProperties`` (1000 of them: over a minute), a
large ``multipleOf`` (11 s, 0.4 GB) or 10,000 properties (13 s), and a chain of 3000 ``$ref`` overflows a stack of
8 MB, which kills the process. So one process, started with the first grammar, holds the vocabulary, and forks for
each grammar a child with limits of processor time, memory and stack.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.grammars import MAKERS, json_schema
from tokenrelay.model.structured.matching import MAX_GRAMMAR, new_matcher
from tokenrelay.model.structured.places import place_of_error
from tokenrelay.model.structured.vocabulary import TokenTable, Vocabulary, llguidance_tokenizer

CPU_SECONDS = 1.0  # of one grammar
MEMORY_BYTES = 512 << 20  # beyond the vocabulary's
STACK_BYTES = 2 << 20  # a chain of about 590 references
ANSWER_SECONDS = 30  # by the clock: the processor may be busy with others
PLACE_SECONDS = 0.25  # processor time, to find where in a schema the error is
MAX_CACHED = 64

Answer = dict[str, str]  # the "grammar", or the "error"
TOO_HARD = (
    f"it takes more than {CPU_SECONDS:g} s, {MEMORY_BYTES >> 20} MB or {STACK_BYTES >> 20} MB of stack to compile; "
    "simplify it"
)


class Sandbox:
    """Thread-safe. A call waits for a child process, unless the same was asked not long ago."""

    def __init__(self, tokenizer: TokenTable) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def try_out(self, kind: str, source: Any) -> str:
        """The grammar that ``MAKERS[kind]`` makes of ``source``, once it has compiled.

        Raises:
            GrammarError: it cannot be compiled, is too large, allows nothing, or exceeds a limit.
        """
        question = _question(kind, source)
        key = sha256(question).digest()
        with self._lock:
            answer = self._answers.get(key)
        answer = answer or self._ask(question)
        if answer is None:
            raise GrammarError(TOO_HARD)
        self._keep(key, answer)
        if "error" in answer:
            raise GrammarError(answer["error"])
        return answer["grammar"]

    def close(self) -> None:
        """End the process; the next grammar would start another."""
        with self._lock:
            self._end_process()

    def _keep(self, key: bytes, answer: Answer) -> None:
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > MAX_CACHED:
                self._answers.popitem(last=False)

    def _ask(self, question: bytes) -> Answer | None:
        """None: the child was killed before it could answer."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._hand_over(theirs)
            reply = _exchange(ours, question)
        return json.loads(reply) if reply else None

    def _hand_over(self, connection: socket.socket) -> None:
        """Give the process a connection to answer on; start it if it is not there."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end_process()
            if self._control is None:
                self._start_process()
            assert self._control is not None
            socket.send_fds(self._control, [b"?"], [connection.fileno()])

    def _start_process(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(_packed(Vocabulary.of(self._tokenizer)))

    def _end_process(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


def _question(kind: str, source: Any) -> bytes:
    try:
        question = json.dumps([kind, source]).encode()
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    if len(question) > MAX_GRAMMAR:
        raise GrammarError(f"it has {len(question)} characters, and {MAX_GRAMMAR} are allowed")
    return question


def _exchange(connection: socket.socket, question: bytes) -> bytes:
    """The reply; nothing from a child that was killed."""
    connection.settimeout(ANSWER_SECONDS)
    reply = b""
    with suppress(OSError):
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            reply += part
        return reply
    return b""


# --- in the process ---------------------------------------------------------------------------------------------------


def main(control: socket.socket) -> None:
    """Fork a child for every connection that arrives; end with the process at the other end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process at the other end
    tokenizer = llguidance_tokenizer(_unpacked(sys.stdin.buffer.read()))
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            return
        with socket.socket(fileno=fds[0]) as connection:
            if os.fork() == 0:
                _limit()
                _answer(connection, tokenizer)
                os._exit(0)


def _limit() -> None:
    """Beyond these the kernel kills this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(ANSWER_SECONDS)


def _answer(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    with connection.makefile("rb") as incoming:
        kind, source = json.loads(incoming.read())
    try:
        grammar = MAKERS[kind](source)
        new_matcher(tokenizer, grammar)
        answer = {"grammar": grammar}
    except GrammarError as error:
        answer = {"error": f"{_place(kind, source, tokenizer)}{error}"}
    connection.sendall(json.dumps(answer).encode())


def _place(kind: str, source: Any, tokenizer: LLTokenizer) -> str:
    """Where in a schema the error is; nothing of what is no schema."""
    if kind != "json_schema" or not isinstance(source, dict):
        return ""
    deadline = time.process_time() + PLACE_SECONDS

    def error_of(schema: Mapping[str, Any]) -> str:
        try:
            if time.process_time() < deadline:
                new_matcher(tokenizer, json_schema(schema))
        except GrammarError as error:
            return str(error)
        return ""

    place = place_of_error(source, error_of)
    return "" if place == "#" else f"at {place}: "


def _packed(vocabulary: Vocabulary) -> bytes:
    tokens = [token.decode("latin-1") for token in vocabulary.tokens]
    return json.dumps([tokens, list(vocabulary.special_ids), list(vocabulary.eos_token_ids)]).encode()


def _unpacked(packed: bytes) -> Vocabulary:
    tokens, special_ids, eos_token_ids = json.loads(packed)
    encoded = [token.encode("latin-1") for token in tokens]
    return Vocabulary(tokens=encoded, special_ids=special_ids, eos_token_ids=eos_token_ids)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as its_control:
        main(its_control)

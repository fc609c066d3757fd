"""An engine that stands still is noticed by others at once, and ends its process in the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tokenrelay.service.worker.pulse import STALL_FACTOR, STALL_SECONDS, Pulse

WEDGED = """
import ctypes, sys, threading, time
from tokenrelay.service.worker import pulse
pulse.REARM_SECONDS = 0.0
heart = pulse.Pulse(watchdog_seconds={patience})
def turn():
    heart.beat()
    {wedge}
threading.Thread(target=turn, daemon=True).start()
time.sleep(60)
"""
WEDGES = {"waits": "threading.Event().wait()", "holds the interpreter's lock": "ctypes.PyDLL(None).sleep(60)"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(clock=clock)


def test_a_turn_that_takes_long_is_a_stall_until_it_is_over(pulse: Pulse, clock: Clock) -> None:
    pulse.beat()
    clock.now += STALL_SECONDS
    assert not pulse.stalled
    clock.now += 0.01
    assert pulse.stalled
    pulse.beat()
    assert not pulse.stalled


def test_where_turns_are_long_a_long_turn_is_no_stall(pulse: Pulse, clock: Clock) -> None:
    """A large model's steps take seconds; so does a long prompt's."""
    usual = 10 * STALL_SECONDS
    pulse.beat()
    clock.now += usual
    pulse.beat()
    clock.now += STALL_FACTOR * usual
    assert not pulse.stalled
    clock.now += 0.01
    assert pulse.stalled


def test_waiting_for_others_may_take_any_time(pulse: Pulse, clock: Clock) -> None:
    pulse.beat()
    pulse.rest()
    clock.now += 1000 * STALL_SECONDS
    assert not pulse.stalled
    pulse.beat()
    clock.now += STALL_SECONDS + 0.01
    assert pulse.stalled  # the wait does not count as a usual turn


@pytest.mark.parametrize("wedge", WEDGES.values(), ids=WEDGES)
def test_the_watchdog_ends_the_process_and_tells_where_it_hung(wedge: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WEDGED.format(wedge=wedge, patience=0.2)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "in turn" in done.stderr


def test_the_watchdog_sleeps_while_the_engine_waits() -> None:
    wedge = "heart.rest(); time.sleep(2); import os; os._exit(0)"
    program = WEDGED.format(wedge=wedge, patience=1)
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0

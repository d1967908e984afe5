"""The signals that stop a run."""

import signal

import pytest

from jexit.loops import trainer
from jexit.loops.trainer import _StopSignals


@pytest.fixture
def clock(monkeypatch):
    """The trainer's clock, which stands still until told otherwise."""
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    return now


def test_an_echo_of_the_first_signal_is_the_same_request(clock):
    with (stop := _StopSignals()):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 0.9
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.name) == (True, "SIGTERM")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_later_second_signal_stops_at_once(clock, first):
    with (stop := _StopSignals()):
        signal.raise_signal(first)
        clock[0] += 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert stop.name == first.name


def test_a_group_that_gets_an_interrupt_and_then_a_termination_saves(clock):
    with (stop := _StopSignals()):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGINT"
        # Somebody at the keyboard who insists means it.
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with _StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

"""The watch over waits for other hosts: it ends those that hang and spares those that compile."""

import time

import jax
import jax.numpy as jnp
import pytest

from jexit.dist import multihost


@pytest.fixture
def left(monkeypatch):
    """The exit codes with which the watch would have ended this process; its patience is 0.3 s."""
    codes = []
    monkeypatch.setattr(multihost, "several_hosts", lambda: True)
    monkeypatch.setattr(multihost, "leave", codes.append)
    monkeypatch.setattr(multihost, "CLIENT_SECONDS", 0.1)
    monkeypatch.setitem(multihost._settings, "timeout", 0.2)
    return codes


def test_a_wait_that_is_too_long_ends_the_process_and_says_where(left, capsys):
    with multihost.waiting("the test"):
        time.sleep(0.5)
    text = capsys.readouterr().err
    assert left == [multihost.LOST]
    assert "stops at the test: nothing came from the other hosts in 0.2 s" in text
    assert text.rstrip().endswith("time.sleep(0.5)")  # where it stood


def test_a_short_wait_leaves_nothing_behind(left):
    with multihost.waiting("the test"):
        pass
    time.sleep(0.5)
    assert left == []


def test_compiling_is_no_waiting(left):
    @jax.jit
    def slow_to_compile(x):
        for factor in range(1500):
            x = jnp.sin(x * factor)
        return x

    began = time.monotonic()
    with multihost.waiting("the test"):
        slow_to_compile(1.0)
    assert time.monotonic() - began > 0.9, "make it slower to compile"
    assert left == []

"""Processes that meet before JAX's runtime is there, and the watch over waits for other hosts."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from jexit.dist import multihost
from jexit.errors import HOST_LOST, UserError


@pytest.fixture
def address():
    """Of a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def joined(monkeypatch):
    """The processes that would have gone on to JAX's runtime."""
    numbers = []
    monkeypatch.setattr(
        multihost.jax.distributed, "initialize", lambda *given, **_: numbers.append(given[2])
    )
    monkeypatch.setattr(multihost, "POLL_SECONDS", 0.01)
    return numbers


def meet(address, *told, timeout=30):
    """What comes of processes that are told (how many they are, their number), each in a thread."""

    def one(processes, process):
        try:
            multihost.initialize(address, processes, process, timeout=timeout)
        except (ValueError, multihost.HostLost) as error:
            return error

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(one, *zip(*told, strict=True)))


def connected(address):
    """A connection to process 0, once it listens."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_processes_that_agree_go_on(address, joined):
    """Whatever else comes to the port."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, address, (3, 0))
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[null, 7]\n", b""):
            with connected(address) as stranger:
                stranger.sendall(text)
        assert meet(address, (3, 2), (3, 1)) == [None, None]
        assert first.result() == [None]
    assert sorted(joined) == [0, 1, 2]


def test_different_numbers_of_processes_end_both_with_one_sentence(address, joined):
    told = (2, 3)
    errors = meet(address, *((count, process) for process, count in enumerate(told)))
    for error in errors:
        assert isinstance(error, ValueError)
        assert str(error) == (
            f"--processes is {told[0]} on process 0, {told[1]} on process 1, but it must "
            "be the same on every process; set it to the total number of processes"
        )
    assert joined == []


def test_those_that_have_not_come_are_named_on_all_that_have(address, joined):
    errors = meet(address, (4, 0), (4, 2), timeout=1)
    for process, error in zip((0, 2), errors, strict=True):
        assert isinstance(error, multihost.HostLost)
        assert str(error).startswith(
            f"process {process} of 4 waited 1 s, but not all others arrived (missing: 1, 3); "
        )
    assert joined == []


def test_a_port_that_is_taken_is_one_sentence(joined):
    with multihost._listening(0) as taken:
        port = taken.getsockname()[1]
        (error,) = meet(f"127.0.0.1:{port}", (2, 0))
    assert isinstance(error, ValueError) and joined == []
    assert str(error) == (
        f"--coordinator names port {port}, which process 0 cannot open (Address already in use); "
        "choose a port that is free on its host"
    )


def test_what_is_no_meeting_place_is_one_sentence(address, joined):
    for place in ("h", "h:", ":80", "h:0", "h:65536", "h:1000000", "h:-1", "h:http"):
        with pytest.raises(UserError, match="must be HOST:PORT of process 0, with a port from 1"):
            multihost.initialize(place, 2, 1, timeout=1)
    (error,) = meet(address, (1, 0))
    assert "--processes is 1, but it must be at least 2" in str(error) and joined == []


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
    assert left == [HOST_LOST]
    assert "stops at the test: the other hosts did not respond within 0.2 s" in text
    assert text.rstrip().endswith("time.sleep(0.5)")  # where it stood


def test_compiling_is_no_waiting(left):
    @jax.jit
    def slow_to_compile(x):
        for factor in range(4000):
            x = jnp.sin(x * factor)
        return x

    began = time.monotonic()
    with multihost.waiting("the test"):
        slow_to_compile(1.0)
    assert time.monotonic() - began > 0.9, "make it slower to compile"
    assert left == []
    with multihost.waiting("the test"):  # nor does a short wait leave anything behind
        pass
    time.sleep(0.5)
    assert left == []

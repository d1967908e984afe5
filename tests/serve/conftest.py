"""One server of the shipped model for all tests, in a thread of this process."""

import socket
import threading
import time

import pytest
import uvicorn

import jexit
from jexit.serve.app import Server
from jexit.serve.pool import open_pool

MODEL = "jexit/assets/tiny-calibrated"
KEY = "a key"


@pytest.fixture(scope="session")
def loaded():
    return jexit.load(MODEL)


@pytest.fixture(scope="session")
def served():
    """A running `Server`, whose `url` clients use."""
    opened = open_pool(MODEL, name="tiny", max_prompt_tokens=64, max_new_tokens=64, rows=4)
    server = Server(opened=opened, api_key=KEY, most_waiting=40, most_bytes=20_000)
    listening = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    http = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield server
    http.should_exit = True
    thread.join()
    opened.pool.close()


@pytest.fixture
def idle(served):
    """Returns a function that waits until no completion is left in the server and its pool."""

    def wait(seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        pool = served.opened.pool
        while (
            served.completions
            or pool.arrivals.under_way
            or pool._streams
            or pool.drafting.under_way
        ):
            assert time.monotonic() < end, "completions are left behind"
            time.sleep(0.02)

    wait()
    return wait

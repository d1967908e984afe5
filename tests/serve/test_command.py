"""`python -m jexit.serve`: what it refuses, how it ends, and what it says of a failed pool."""

import asyncio
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from jexit.errors import RunEnded
from jexit.model.policies import Sample, Speculate
from jexit.rollout import Grown, Request
from jexit.serve import __main__ as serve
from jexit.serve import pool as serve_pool
from jexit.serve.pool import PoolThread, Stream

MODEL = "jexit/assets/tiny-calibrated"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model=nowhere"], "nowhere"),
        ([f"--model={MODEL}", "--policy=fast"], "policy 'fast' is not known; use full"),
        ([f"--model={MODEL}", "--policy=fixed:5"], "Fixed has depth 5"),
        ([f"--model={MODEL}", "--max-new-tokens=0"], "--max-new-tokens is 0, but it must be at"),
        ([f"--model={MODEL}", "--max-new-tokens=1000"], "add up to 1512, but the model"),
        ([f"--model={MODEL}", "--rows=-1"], "rows"),
        ([f"--model={MODEL}", "--host=256.0.0.1"], "cannot listen on 256.0.0.1:"),
        ([f"--model={MODEL}", "--port=70000"], "--port is 70000, but it must be from 0 to 65535"),
    ],
)  # fmt: skip
def test_what_it_refuses(capsys, flags, said):
    port = [] if any("port" in flag for flag in flags) else ["--port=0"]
    assert serve.main([*flags, *port]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jexit: ") and said in error and error.count("\n") == 1, error


def test_its_options_reach_the_server_and_the_pool(monkeypatch, capsys):
    """The key comes from the environment where no option gives one."""
    asked = {}

    def opened(path, **settings):
        asked.update(settings, path=path)

    monkeypatch.setattr(serve_pool, "open_pool", opened)

    def server(*flags):
        return serve._server(serve._parser().parse_args([f"--model={MODEL}", *flags]))

    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert (server().api_key, server().most_waiting) == ("", 256)
    assert asked == {
        "path": MODEL, "name": "", "policy": "full", "max_prompt_tokens": None,
        "max_new_tokens": None, "rows": 0,
    }  # fmt: skip
    flags = ("--name=mine", "--policy=sample", "--max-prompt-tokens=7", "--max-new-tokens=9")
    found = server(*flags, "--rows=3", "--max-waiting=5", "--api-key=secret")
    assert (found.api_key, found.most_waiting) == ("secret", 5)
    assert asked == {
        "path": MODEL, "name": "mine", "policy": "sample", "max_prompt_tokens": 7,
        "max_new_tokens": 9, "rows": 3,
    }  # fmt: skip
    monkeypatch.setenv(serve.KEY_VARIABLE, "from the environment")
    assert server().api_key == "from the environment"
    with pytest.raises(ValueError, match="--max-waiting is 0, but it must be at least 1"):
        server("--max-waiting=0")


def test_a_port_in_use_is_refused_before_anything_is_compiled(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([f"--model={MODEL}", f"--port={port}"]) == 1
    printed = capsys.readouterr()
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in printed.err
    assert not printed.out


class Fails:
    """A pool that decodes one token and then loses its device."""

    under_way = 1

    def join(self, request):
        return [7]

    def turn(self, steps):
        self.turn = self.lost
        return [Grown(ticket=7, tokens=[1], depths=[2], logprobs=[0.0], hazard_logits=[[0.0]],
                      finished=False)]  # fmt: skip

    def lost(self, steps):
        raise RuntimeError("out of memory")

    def leave(self, ticket):
        pass


def test_a_failed_pool_ends_its_streams():
    pool = PoolThread(Fails())
    request = Request(prompts=[[1]], max_new_tokens=4, eos_ids=(), pad_id=0, key=0)

    async def read():
        found = []
        async with Stream(pool, request) as stream:
            if not pool.is_alive():
                pool.start()
            async for _, grown in stream:
                found.append(grown.tokens)
        return found

    failed = "decoding has failed; see the server's log"
    with pytest.raises(RunEnded, match=failed):
        asyncio.run(read())
    assert str(pool.failure) == "out of memory"
    with pytest.raises(RunEnded, match=failed):  # one that comes later
        asyncio.run(read())
    pool.close()
    with pytest.raises(RunEnded, match="the decoding pool has been closed; open the model again"):
        asyncio.run(read())


def test_a_request_that_cannot_join_fails_alone_and_closing_ends_the_others():
    class Turns(Fails):
        def join(self, request):
            if request.policy == Sample():
                raise MemoryError
            return [7]

        def lost(self, steps):
            time.sleep(0.01)
            return []

    pool = PoolThread(Turns())

    async def both():
        request = Request(prompts=[[1]], max_new_tokens=4, eos_ids=(), pad_id=0, key=0)
        async with Stream(pool, request) as stream:
            pool.start()
            news = aiter(stream)
            assert (await anext(news))[1].tokens == [1]
            alone = dataclasses.replace(request, policy=Sample())
            with pytest.raises(RunEnded, match="decoding has failed"):
                async with Stream(pool, alone) as other:
                    await anext(aiter(other))
            assert pool.failure is None
            await asyncio.to_thread(pool.close)
            with pytest.raises(RunEnded, match="the decoding pool has been closed"):
                await anext(news)

    asyncio.run(both())


def test_the_pool_goes_on_while_drafts_compile_and_a_draft_that_fails_fails_alone(monkeypatch):
    compiled = threading.Event()

    class Drafts:
        def __init__(self, model, request):
            self.ended, self.fails = False, request.prompts == [[2]]

        def turn(self):
            assert compiled.wait(20)
            if self.fails:
                raise MemoryError
            self.ended = True
            return [Grown(ticket=0, tokens=[5], depths=[2], logprobs=[0.0], hazard_logits=[[0.0]],
                          finished=True)]  # fmt: skip

    class Turns(Fails):
        split, under_way = None, 0

        def join(self, request):
            self.under_way = 1
            return [7]

        def lost(self, steps):
            self.under_way = 0
            return [Grown(ticket=7, tokens=[2], depths=[2], logprobs=[0.0], hazard_logits=[[0.0]],
                          finished=True)]  # fmt: skip

    monkeypatch.setattr(serve_pool, "Speculation", Drafts)
    pool = PoolThread(Turns())
    request = Request(prompts=[[1]], max_new_tokens=4, eos_ids=(), pad_id=0, key=0)
    drafted = dataclasses.replace(request, policy=Speculate(1), prompts=[[1], [2]])

    async def both():
        pool.start()
        async with Stream(pool, drafted) as draft:
            async with Stream(pool, request) as stream:
                found = [grown.tokens async for _, grown in stream]
            assert found == [[1], [2]] and not compiled.is_set()
            compiled.set()
            news = aiter(draft)
            assert (await anext(news))[1].tokens == [5]
            with pytest.raises(RunEnded, match="decoding has failed"):
                await anext(news)
        await asyncio.to_thread(pool.close)

    asyncio.run(both())
    assert pool.failure is None and not pool.drafting.under_way


def test_a_server_whose_pool_has_failed_says_so(served, monkeypatch):
    monkeypatch.setattr(served.opened.pool, "failure", RuntimeError("lost"))
    headers = {"Authorization": f"Bearer {served.api_key}"}
    with httpx.Client(base_url=served.url, headers=headers) as http:
        assert http.get("/health").status_code == 503
        body = {"messages": [{"role": "user", "content": "sum 1"}]}
        refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503 and "has failed; restart the server" in refused.text


@pytest.mark.slow
def test_a_signal_lets_answers_end_and_refuses_new_ones():
    command = [sys.executable, "-m", "jexit.serve", f"--model={MODEL}", "--port=0",
               "--max-prompt-tokens=16", "--max-new-tokens=400"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not (found := re.search(r"serving tiny-calibrated on (http://\S+)",
                                      process.stdout.readline())):  # fmt: skip
            assert process.poll() is None
        url, lines = found[1], []
        began = threading.Event()

        def read():
            body = {"prompt": "sum 1", "max_tokens": 400, "temperature": 100, "stream": True,
                    "n": 8, "seed": 1}  # fmt: skip
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    began.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert began.wait(60)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        reader.join(60)
        assert process.wait(60) == 0
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    ended = {c["index"] for part in parts for c in part["choices"] if c["finish_reason"]}
    assert ended == set(range(8))


def test_without_the_extra_it_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main([f"--model={MODEL}"]) == 1
    assert "pip install -e '.[serve]' in the checkout" in capsys.readouterr().err

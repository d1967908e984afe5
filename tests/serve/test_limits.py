"""What clients do wrong, too much of, or half: a sentence, and the server lives on."""

import asyncio
import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time

import httpx
import pydantic
import pytest

from jexit.serve import app
from jexit.serve.protocol import ChatBody, TextBody

GOOD = {"messages": [{"role": "user", "content": "sum 37295"}], "max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def http(served):
    headers = {"Authorization": f"Bearer {served.api_key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
        yield client


def address(served):
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


def post(http, body, path="/v1/chat/completions", **settings):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=data, **settings)


def test_two_hundred_malformed_requests(http):
    """Wrong types and sizes in each field, truncated and deep JSON, bytes that are no text."""
    draw = random.Random(0)
    junk = [None, True, -1, 0, 1e308, -0.5, 2**70, "", "x" * 9_000, "\ud800", [], {}, [[]],
            {"a": 1}, [1, "x"], [{"role": "user"}], ["\x00"], {"include_usage": 3}]  # fmt: skip
    whole = json.dumps(GOOD).encode()
    bodies = [
        *(whole[: draw.randrange(len(whole))] for _ in range(30)),
        *(bytes(draw.randrange(256) for _ in range(draw.randrange(200))) for _ in range(30)),
        b"[" * 5_000, b'{"a":' * 3_000, b"NaN", b'{"temperature": NaN}', b"\xff\xfe{}", b"null",
        b'{"messages": [], "messages": []}', b'{"n": 1e400}', b'"\\ud800"',
    ]  # fmt: skip
    while len(bodies) < 200:
        bodies.append(GOOD | {draw.choice([*ChatBody.model_fields]): draw.choice(junk)})
    refused = 0
    for body in bodies:
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = post(http, body, path)
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code == 200:
                continue
            refused += 1
            error = answer.json()["error"]
            assert answer.status_code in (400, 404, 413), (body, error)
            assert len(error["message"]) < 400 and "\n" not in error["message"], error
            assert "Traceback" not in error["message"] and error["type"]
    assert refused > 300
    assert post(http, GOOD).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 65}, "max_new_tokens is 65, but this pool allows at most 64; lower it"),
        ({"messages": [{"role": "user", "content": "1" * 100}]}, "pool allows at most 64; shorten"),
        ({"policy": "fixed:5"}, "Fixed has depth 5"),
        ({"policy": "threshold:2"}, "policy 'threshold:2' "),
        ({"policy": 3}, "policy is 3, but it must be a valid string; change it"),
        ({"n": 65}, "n is 65, but it must be less than or equal to 64"),
        ({"messages": []}, "messages is [], but it must have at least 1 item"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool', but"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last message must be the user's"),
        ({"stop": ["a", ""]}, "stop contains '', but a stop text must not be empty; correct"),
        ({"stop": "\ufffd"}, "but a stop text must not contain U+FFFD"),
        ({"top_logprobs": 5}, "top_logprobs is 5, but it must be less than or equal to 0"),
        ({"temperature": 1e-9}, "temperature"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
        ({"seed": "7"}, "seed is '7', but it must be a valid integer; change it"),
        ({"policy": "x" * 65}, "policy is 'xxx"),
        ({"stop": ["a"] * 17}, "stop is ['a', 'a', "),
        ({"x" * 900: 1}, "xxx… is not a field that this server knows; leave it out"),
        ({"\ud800": 1}, r"a field's name is '\ud800', but it must be a valid"),
        ({"stream_options": {"x": 1}}, "'x' is not a field of stream_options that this server"),
        ({"messages": [GOOD["messages"][0] | {"type": "text"}]},
         "'type' is not a field of messages[0] that this server knows; leave it out"),
        ({"response_format": {"type": "text", "name": "x"}},
         "'name' is not a field of response_format that this server knows; leave it out"),
        ({"echo": False}, "'echo' is not a field that this server knows; leave it out"),
        ({"hazards": True, "policy": "speculate:4"},
         "hazards is True, but the policy speculate:4 records no hazards; leave hazards out, or"),
        ({f"field{n}": 1 for n in range(70)}, "it must have at most 64 fields, not 73"),
    ],
)  # fmt: skip
def test_each_is_told_what_is_wrong(http, change, said):
    answer = post(http, GOOD | change)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_nulls_and_fields_that_change_nothing_are_taken(http):
    nulls = {"tools": None, "audio": None, "stop": None, "stream_options": None}
    said = GOOD["messages"][0] | {"refusal": None, "tool_calls": None}
    other = {"tools": [], "service_tier": "auto", "metadata": {"a": "b"}, "messages": [said]}
    wanted = post(http, GOOD).json()["choices"]
    assert post(http, GOOD | nulls | other).json()["choices"] == wanted


def test_many_faults_in_a_body_cost_no_more_than_one():
    """pydantic would keep each with its text, six hundred megabytes in a body of one."""
    many = 100_000
    message = {"role": "user", "content": "x"}
    bodies = [
        (TextBody, {"prompt": [None] * many}),
        (TextBody, {"prompt": [-1] * many}),
        (ChatBody, {"messages": [None] * many}),
        (ChatBody, {"messages": [message | {"content": [None] * many}]}),
        (ChatBody, {"messages": [message | {f"{n}": 1 for n in range(many)}]}),
        (ChatBody, {"messages": [message], "stop": [None] * many}),
        (ChatBody, {"messages": [message]} | {f"{n}": 1 for n in range(many)}),
        (ChatBody, {"messages": [message], "logit_bias": {f"{n}": "x" for n in range(many)}}),
    ]
    for model, body in bodies:
        with pytest.raises(pydantic.ValidationError) as caught:
            model.model_validate(body)
        assert caught.value.error_count() < 10, body.keys()


def test_plain_completions_are_refused_alike(http):
    for change, said in [
        ({"prompt": []}, "prompt is [], but it must not be empty"),
        ({"prompt": ["sum 1", ""]}, "but it must not contain an empty prompt"),
        ({"prompt": [[1, 10**6]]}, "contains token 1000000"),
        ({"prompt": "sum 1", "echo": True}, "echo is True"),
        ({"prompt": "sum 1", "logprobs": 3}, "logprobs is 3"),
        ({"prompt": "sum 1", "best_of": 3}, "best_of is 3, but it must equal n"),
        ({"prompt": ["sum 1"] * 20, "n": 4}, "asks for 80 completions"),
        ({"prompt": ["sum 1"] * 65}, "it must have at most 64 items"),
        ({}, "prompt is missing, but a request must have it; add it"),
    ]:
        answer = post(http, {"max_tokens": 4} | change, "/v1/completions")
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_access_size_and_kind(http, served):
    for key in ("", "Bearer", f"Bearer {served.api_key}x", served.api_key[:3], "Bearer \u00e9"):
        headers = {"Authorization": key.encode("latin-1")}
        assert post(http, GOOD, headers=headers).status_code == 401
        assert http.get("/v1/models", headers=headers).status_code == 401
    large = GOOD | {"user": "x" * served.most_bytes}
    answer = post(http, large)
    assert answer.status_code == 413 and "larger than 20000 bytes" in answer.text
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: Bearer {served.api_key}\r\nContent-Type: application/json\r\n\r\n"
    )
    with socket.create_connection(address(served), 20) as connection:  # a body without an end
        connection.sendall(head.encode() + b"1000\r\n" + b" " * 4096 + b"\r\n")
        connection.sendall(5 * (b"1000\r\n" + b" " * 4096 + b"\r\n"))
        assert b"413" in b"".join(iter(lambda: connection.recv(4096), b""))
    answer = post(http, GOOD, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "must be application/json" in answer.text
    answer = http.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    for path in ("/", "/page/index.html", "/page/page.js"):
        assert "script-src 'self'" in http.get(path).headers["content-security-policy"]
    assert http.get("/v2").json()["error"]["message"] == (
        "GET /v2 is not served here; use another path or method, such as GET /v1/models"
    )
    assert http.get("/page/../app.py").status_code == 404
    assert http.get("/page/%2e%2e/app.py").status_code == 404


def test_too_many_at_once_are_told_to_come_later(http, served, idle):
    settings = GOOD | {"n": 36, "temperature": 1.5, "max_tokens": 64, "stream": True}
    with http.stream("POST", "/v1/chat/completions", content=json.dumps(settings)) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = post(http, GOOD | {"n": 5})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert (
            "36 completions wait or are being decoded, and the server takes at most 40"
            in (refused.json()["error"]["message"])
        )
        assert post(http, GOOD | {"n": 4}).status_code == 200
        assert "data: [DONE]" in list(lines)
    idle()


def test_a_burst_is_not_let_in_beyond_the_limit(http, served, idle):
    """All are checked before the first of them is answered."""
    body = GOOD | {"n": 9, "temperature": 1.5, "max_tokens": 64}
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, served.completions)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        asked = [body | {"stream": index % 2 == 0} for index in range(12)]
        codes = list(threads.map(lambda each: post(http, each).status_code, asked))
    done.set()
    watcher.join()
    assert {200, 429} == set(codes) and 9 <= most <= 40
    idle()


def test_who_hangs_up_frees_the_places(http, served, idle):
    wanted = post(http, GOOD).json()["choices"][0]["message"]
    gone = served.metrics.hangups._value.get()
    body = json.dumps(GOOD | {"n": 30, "temperature": 2.0, "max_tokens": 64})
    for stream in (True, False):
        data = body.replace('"n"', f'"stream": {str(stream).lower()}, "n"').encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {served.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(address(served)) as connection:
            connection.sendall(head.encode() + data)
            while served.completions < 30:
                time.sleep(0.005)
            if stream:
                connection.recv(100)
        assert post(http, GOOD).json()["choices"][0]["message"] == wanted
        idle()
    assert served.metrics.hangups._value.get() == gone + 2


def test_a_body_that_does_not_arrive_is_refused(served, monkeypatch):
    monkeypatch.setattr(app, "SENT", 0.2)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.api_key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head.encode())
        answer = client.recv(4096).decode()
        assert client.recv(4096) == b""  # and the connection is closed
    assert answer.startswith("HTTP/1.1 408") and "has not arrived within 0.2 seconds" in answer


def test_who_reads_nothing_has_left(monkeypatch):
    monkeypatch.setattr(app, "STALLED", 0.05)
    freed = []

    async def events():
        try:
            while True:
                yield b"data: {}"
        finally:
            freed.append("pool")

    async def forever(message=None):
        if message is None or message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with contextlib.ExitStack() as admitted:
        admitted.callback(freed.append, "admission")
        answer = app._Events(events(), admitted.pop_all())
    asyncio.run(asyncio.wait_for(answer({"type": "http"}, forever, forever), 20))
    assert freed == ["pool", "admission"]


def test_health_and_metrics(http, served):
    assert http.get("/health").json() == {"status": "ok"}
    before = served.metrics.tokens._value.get()
    answer = post(http, GOOD | {"policy": "threshold:0.5"}).json()
    text = http.get("/metrics").text
    assert f"jexit_tokens_total {before + answer['usage']['completion_tokens']}" in text
    for name in ("layers_run_total", "prompt_tokens_total", "completions 0.0",
                 "first_token_seconds", 'requests_total{status="'):  # fmt: skip
        assert f"jexit_{name}" in text

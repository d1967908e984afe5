"""Throughput of the server with many clients at once, as ratios.

    python tests/benchmarks/serving.py --model DIR [--task word_problems] [--clients 64]
        [--tokens 64] [--rounds 3]

Starts `python -m jexit.serve` and talks to it over the loopback. In each round, in turn: requests
one after the other; clients that arrive at random (Poisson) within the time that 4 of the
sequential requests took, each with 4 requests, one after the other; and the same clients all at
once, without streams, at full depth and at half the depth. At the end, 16 clients hang up in the
middle, and the others must get what they got alone. Decoding is greedy.

Prints tokens a second as ratios, and the time to the first token in units of a sequential request.
Exits 1 if many clients get less than --least (4) times the tokens a second of sequential requests,
if half the depth gives less than 1.4 times the tokens of full depth, or if anything is lost.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time

import httpx
import numpy as np

from jexit.tasks import make_task

HANG_UP = 16
EACH = 4  # requests of a client, and sequential requests within whose time the clients arrive
HALF = 1.4  # least tokens a second at half the depth, of those at full depth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--task", default="word_problems", help="its problems are the prompts")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="most of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=4.0)
    arguments = parser.parse_args()
    command = [
        *(sys.executable, "-m", "jexit.serve", f"--model={arguments.model}", "--port=0"),
        *("--max-prompt-tokens=256", f"--max-new-tokens={arguments.tokens}"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            while not (found := re.search(r"on (http://\S+)", server.stdout.readline())):
                if server.poll() is not None:
                    return 1
            return asyncio.run(measure(found[1], arguments))
        finally:
            server.terminate()


IDLE: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []  # open connections


async def post(url: str, path: str, body: dict) -> dict:
    """Returns the JSON answer to a POST request, at a fraction of what httpx takes."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = IDLE.pop() if IDLE else await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answered = await reader.readuntil(b"\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 200"), answered
    (length,) = re.findall(rb"(?i)\r\ncontent-length: *(\d+)", answered)
    answer = json.loads(await reader.readexactly(int(length)))
    IDLE.append((reader, writer))
    return answer


async def measure(url: str, arguments: argparse.Namespace) -> int:
    task = make_task(arguments.task)
    prompts = [task.problem("train", index).prompt for index in range(arguments.clients)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        (model,) = (await http.get("/v1/models")).json()["data"]
        layers = model["layers"]
        half = min(model["exit_layers"], key=lambda exit_layer: abs(2 * exit_layer - layers))

        async def ask(prompt: str, policy: str = "full", stream: bool = True, cut: bool = False):
            """Returns (text, tokens, seconds to the first token)."""
            body = {
                "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                "max_tokens": arguments.tokens, "stream": stream, "policy": policy,
            }  # fmt: skip
            began, first, text, tokens = time.perf_counter(), None, "", 0
            if not stream:
                answer = await post(url, "/v1/chat/completions", body)
                text = answer["choices"][0]["message"]["content"]
                return text, answer["usage"]["completion_tokens"], time.perf_counter() - began
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    (choice,) = json.loads(line[6:])["choices"]
                    first = first or time.perf_counter() - began
                    text += choice["delta"]["content"]
                    tokens += len(choice["depths"])
                    if cut and tokens > 3:
                        break
            return text, tokens, first

        async def together(policy: str = "full", spread: float = 0.0):
            gaps = np.random.default_rng(0).exponential(size=len(prompts))
            starts = np.cumsum(gaps) * (spread / gaps.sum())
            began = time.perf_counter()

            async def client(number: int):
                await asyncio.sleep(starts[number])
                turn = [prompts[(number + 7 * n) % len(prompts)] for n in range(EACH)]
                return [await ask(prompt, policy, stream=spread > 0) for prompt in turn]

            answers = await asyncio.gather(*map(client, range(len(prompts))))
            made = [answer for each in answers for answer in each]
            return made, sum(tokens for _, tokens, _ in made) / (time.perf_counter() - began)

        await together()  # so that nothing is compiled, and every buffer exists
        alone, rates, firsts = [], {}, []
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            alone = [await ask(prompt) for prompt in prompts]
            seconds = time.perf_counter() - began
            one = seconds / len(prompts)
            rates.setdefault("sequential", []).append(
                sum(tokens for _, tokens, _ in alone) / seconds
            )
            made, rate = await together(spread=EACH * one)
            rates.setdefault("arriving", []).append(rate)
            firsts += [first / one for *_, first in made]
            for policy in ("full", f"fixed:{half}"):
                _, rate = await together(policy)
                rates.setdefault(policy, []).append(rate)
        wanted = [text for text, *_ in alone]
        kept = await asyncio.gather(
            *(ask(prompt, cut=index < HANG_UP) for index, prompt in enumerate(prompts))
        )
        lost = sum(
            a != text for a, (text, *_) in zip(wanted[HANG_UP:], kept[HANG_UP:], strict=True)
        )
        (left,) = re.findall(r"\njexit_completions (\S+)", (await http.get("/metrics")).text)

    def ratio(name: str, of: str) -> float:
        return statistics.median(
            one / other for one, other in zip(rates[name], rates[of], strict=True)
        )

    crowd, deep = ratio("arriving", "sequential"), ratio(f"fixed:{half}", "full")
    p50, p95 = np.percentile(firsts, (50, 95))
    print(f"{arguments.clients} clients, tokens a second of sequential requests: {crowd:.2f} ×")
    print(f"all at once, {half} of {layers} layers against all: {deep:.2f} × the tokens a second")
    print(f"time to the first token, in sequential requests: p50 {p50:.2f}, p95 {p95:.2f}")
    print(f"{HANG_UP} clients hung up: {lost} of the others lost or changed; {left} left behind")
    return int(crowd < arguments.least or deep < HALF or lost > 0 or float(left) > 0)


if __name__ == "__main__":
    sys.exit(main())

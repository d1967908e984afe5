"""Throughput of the decoding engine by depth, against what the work itself promises.

    python tests/benchmarks/engine.py [--prompts 288] [--repeats 2]
    python tests/benchmarks/engine.py --model small-head --prompts 576 --repeats 1

Random weights in the shape of Qwen2.5-0.5B (whose output head holds 28 % of the weights), or with a
vocabulary of 8,192; float32 on the CPU. Every pass of every completion gets a depth drawn at random
among the exits, with a mean of a half or a quarter of the layers. The same completions then come
from the engine at full depth, from the engine at those depths, and, a few of them, from the plain
loop at both, which masks rows that have left and runs as deep as its deepest row. Work that ends
leaves ticks unfilled at its end, the more the fewer completions there are for a row of the pool.

The plain loop reads stacked weights, of which XLA copies each layer's on CPUs; so `stacked` is the
engine at full depth with such weights, and what is due of it says what the engine itself costs.

The ideal counts what must be computed for a token, in multiplications (`decode.work`). Alternatives
take turns; medians.
Exits 1 when a speed-up is under 0.85 of the ideal, or `stacked` under 0.97 of the plain loop's
speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import unittest.mock
from typing import Any

import numpy as np

FULL = 0.97
EXITS = (3, 6, 12, 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("0.5b", "small-head"), default="0.5b")
    parser.add_argument("--prompts", type=int, default=288)
    parser.add_argument("--batches", type=int, default=2, help="of the plain loop")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=25)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--tick-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
    sys.exit(0 if compare(arguments) else 1)


def random_model(name: str) -> Any:
    from flax import nnx

    from jexit.model.transformer import Transformer
    from jexit.presets import PRESETS

    arch = PRESETS["qwen2.5-0.5b"].architecture
    if name == "small-head":
        arch = dataclasses.replace(arch, vocab_size=8192)
    return Transformer(arch, exit_layers=EXITS, rngs=nnx.Rngs(0))


def compare(arguments: argparse.Namespace) -> bool:
    from decode import OF_IDEAL, in_turns, random_depths, work
    from flax import nnx
    from plain_loop import plain

    from jexit.config import EngineSize
    from jexit.model.policies import Full, Prescribed
    from jexit.rollout import engine as engine_module
    from jexit.rollout import rollout, weights

    model = random_model(arguments.model)
    arch, split = model.arch, nnx.split(model)
    count, new, tick_rows = arguments.prompts, arguments.new_tokens, arguments.tick_rows
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, arch.vocab_size, (count, arguments.prompt_tokens)).tolist()
    asked = {"eos_ids": (), "pad_id": 0, "key": 0, "temperature": 0.0}
    size = EngineSize(rows=arguments.rows, tick_rows=tick_rows)
    idle: dict[str, float] = {}
    tokens: dict[str, np.ndarray] = {}

    def engine(name: str, policy: Any, columns: int) -> None:
        made = rollout(split, prompts, policy=policy, max_new_tokens=columns, size=size, **asked)
        idle[name], tokens[f"engine, {name}"] = made.idle, made.tokens_BT

    def stacked() -> None:
        with unittest.mock.patch.multiple(engine_module, on_cpu=lambda: False), \
             unittest.mock.patch.object(weights, "on_cpu", lambda: False):  # fmt: skip
            engine("stacked", Full(), new)

    def loop(name: str, depths: np.ndarray | None, columns: int) -> None:
        made_BT = []
        for start in range(0, arguments.batches * tick_rows, tick_rows):
            part = slice(start, start + tick_rows)
            policy = Full() if depths is None else Prescribed(depths[part])
            made_BT.append(plain(split, prompts[part], policy=policy, max_new_tokens=columns))
        tokens[f"loop, {name}"] = np.concatenate(made_BT)

    means = {"L/2": arch.layers / 2, "L/4": arch.layers / 4}
    depths = {
        name: random_depths(count, new, EXITS, arch.layers, mean) for name, mean in means.items()
    }
    # What is compared runs one after the other: a shared machine changes from minute to minute.
    runs = {"engine, prefill": lambda: engine("prefill", Full(), 1)}
    runs["engine, full"] = lambda: engine("full", Full(), new)
    for name, depth_BT in depths.items():
        runs[f"engine, {name}"] = lambda n=name, d=depth_BT: engine(n, Prescribed(d), new)
    runs["engine, stacked"] = stacked
    runs["loop, prefill"] = lambda: loop("prefill", None, 1)
    runs["loop, full"] = lambda: loop("full", None, new)
    for name, depth_BT in depths.items():
        runs[f"loop, {name}"] = lambda n=name, d=depth_BT: loop(n, d, new)
    turns = in_turns(runs, arguments.repeats)

    def decoding(name: str) -> np.ndarray:
        """Seconds a completion, of every turn."""
        prefill = turns[f"{name.partition(',')[0]}, prefill"]
        return (turns[name] - prefill)[:, 0] / len(tokens[name])

    def times(slow: str, fast: str) -> float:
        """How many times as fast; the median over the turns."""
        return float(np.median(decoding(slow) / decoding(fast)))

    def equal(name: str) -> str:
        few = tokens[f"loop, {name}"]
        same = np.array_equal(tokens[f"engine, {name}"][: len(few)], few)
        return "equal" if same else "differ"

    print(
        f"{arguments.model}: {count} completions of {new} tokens, {arguments.rows} rows, "
        f"{tick_rows} a tick; speed over the plain loop's at full depth, prefill left out"
    )
    print(
        f"{'depths':<8}{'ideal':>8}{'engine':>8}{'of ideal':>10}{'masking':>9}{'idle':>7}  tokens"
    )
    whole = times("loop, full", "engine, stacked")
    good = whole >= FULL
    same = np.array_equal(tokens["engine, stacked"], tokens["engine, full"])
    print(f"{'stacked':<8}{1:>8.2f}{whole:>8.2f}{whole:>10.2f}{1:>9.2f}{idle['stacked']:>7.1%}  "
          f"{'equal' if same else 'differ'}")  # fmt: skip
    full = times("loop, full", "engine, full")
    print(f"{'full':<8}{1:>8.2f}{full:>8.2f}{full:>10.2f}{1:>9.2f}{idle['full']:>7.1%}  "
          f"{equal('full')}")  # fmt: skip
    for name, depth_BT in depths.items():
        wanted = work(arch, arch.layers) / work(arch, float(depth_BT[:, 1:].mean()))
        speed = times("engine, full", f"engine, {name}")
        masking = times("loop, full", f"loop, {name}")
        good &= speed >= OF_IDEAL * wanted
        print(f"{name:<8}{wanted:>8.2f}{speed:>8.2f}{speed / wanted:>10.2f}{masking:>9.2f}"
              f"{idle[name]:>7.1%}  {equal(name)}")  # fmt: skip
    return good


if __name__ == "__main__":
    main()

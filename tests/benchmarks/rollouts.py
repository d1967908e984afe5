"""What the engine spends on padding and idle rows; and a step's time by cache size.

    python tests/benchmarks/rollouts.py --checkpoint DIR --gsm8k DIR [--prompts 64] [--samples 4]

Completions of GSM8K's questions with a real model in float32 on the CPU: which share of the
prefilled positions was padding, and which share of the rows in the ticks stayed empty, at full
depth and at depths drawn at random with a mean of half the layers. Then the same steps with caches
of 96 and of 4,096 slots a row. Exits 1 when a step with the large cache takes over 1.1 times as
long.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from typing import Any

import numpy as np

SLOTS, MOST = (96, 4096), 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="model directory")
    parser.add_argument("--gsm8k", required=True, help="directory of JSONL files")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=8, help="of the timing by cache size")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from decode import read_prompts
    from flax import nnx

    import jexit

    model, tokenizer = jexit.load(arguments.checkpoint, dtype="float32")
    prompts = tokenizer.encode_batch(read_prompts(arguments.gsm8k, arguments.prompts))
    efficiency(model, prompts, tokenizer, arguments)
    same = by_cache(nnx.split(model), prompts[: arguments.rows], arguments)
    sys.exit(0 if same else 1)


def efficiency(model: Any, prompts: list, tokenizer: Any, arguments: argparse.Namespace) -> None:
    from decode import random_depths

    from jexit import Full, Prescribed
    from jexit.rollout import rollout

    count, new, layers = len(prompts) * arguments.samples, arguments.new_tokens, model.arch.layers
    lengths = sorted(map(len, prompts))
    print(
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {arguments.samples} "
        f"completions each, up to {new} new tokens"
    )
    print(f"{'depths':<8}{'padding':>10}{'idle':>8}{'slots':>8}{'tokens':>9}")
    depths = random_depths(count, new, model.exit_layers, layers, layers / 2)
    for name, policy in (("full", Full()), ("L/2", Prescribed(depths))):
        made = rollout(
            model, prompts, policy=policy, max_new_tokens=new, eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id, key=0, samples_per_prompt=arguments.samples,
        )  # fmt: skip
        print(
            f"{name:<8}{made.prompt_padding:>10.1%}{made.idle:>8.1%}"
            f"{made.shape[1]:>8}{int(made.lengths_B.sum()):>9,}",
            flush=True,
        )


def by_cache(split: tuple, prompts: list, arguments: argparse.Namespace) -> bool:
    from flax import nnx

    from jexit.model.cache import Cache
    from jexit.rollout import Decoding, Request

    model = nnx.merge(*split)

    length, steps = 16, 64  # 80 of the slots are used at the end
    seconds: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    for turn in range(arguments.repeats + 1):  # the first compiles
        for slots in SLOTS:
            request = Request(
                prompts=[prompt[:length] for prompt in prompts], temperature=0.0, eos_ids=(),
                max_new_tokens=max(SLOTS) - length + 1, pad_id=0, key=0,
            )  # fmt: skip
            decoding = Decoding(split, request)
            # Left alone, the engine never holds much more than is used.
            cache = Cache.empty(model.arch, len(prompts), slots, model.dtype)
            engine = decoding.engine
            engine.pool, engine.slots = dataclasses.replace(engine.pool, cache=cache), slots
            decoding.turn(1)
            began = time.perf_counter()
            decoding.turn(steps)
            if turn:
                seconds[slots].append(time.perf_counter() - began)
    small, large = (np.asarray(seconds[slots]) for slots in SLOTS)
    ratio = float(np.median(large / small))
    print(
        f"a step of {len(prompts)} rows with {SLOTS[1]:,} slots each takes {ratio:.2f} of one with "
        f"{SLOTS[0]}, of which {length + steps} are used ({1e3 * np.median(small) / steps:.1f} ms)"
    )
    return ratio <= MOST


if __name__ == "__main__":
    main()

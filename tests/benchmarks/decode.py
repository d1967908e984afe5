"""Time of a decode step by depth, or against Hugging Face's `generate`, as ratios.

    python tests/benchmarks/decode.py --checkpoint DIR [--gsm8k DIR] [--batch 1 [--pool 4]]
        [--continuation linear] [--exits 4,8,12,16,18,20,22]
    python tests/benchmarks/decode.py --checkpoint DIR [--gsm8k DIR] --against --batch 8

On the CPU, jexit in float32, with as many threads for PyTorch as XLA has. A step's time is that of
a rollout less that of its prefill (the same rollout with one new token), divided by the steps;
nothing is compiled while the clock runs. Alternatives take turns, and the figures are medians over
the turns. On a machine that is shared, the processors' time is the steadier measure; the clock's is
the one that counts. The work of a step counts what must be computed for a token, in
multiplications: the layers that it runs, the head, and, at the layers that it does not run, keys
and values and the continuation's matrix. `mixed` has depths that differ by token, 0.78 of the
layers on average. With a pool, so many batches of completions take turns. Exits 1 when the speed-up
of `mixed`, at a half or a quarter of the depth is under 0.85 of what the work promises; and when
jexit is under 1.7 times as fast as transformers in float32, or at half the depth under 1.1 times as
fast as it in bfloat16.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MIXED = 0.78  # of the layers
OF_IDEAL = 0.85  # the least part of the speed-up that the work promises
FASTER = (("full depth", "float32", 1.7), ("half depth", "bfloat16", 1.1))
TEXTS = (
    "A farmer has 12 hens. Each lays 5 eggs a week. How many eggs are there after 3 weeks?",
    "Anna reads 24 pages a day. Her book has 312 pages. How many days does she need?",
    "A ticket costs 7 coins and a guide 11. What do 4 tickets and 2 guides cost together?",
    "Tom walks 3 miles to work and back on 5 days a week. How far does he walk in 4 weeks?",
    "A tank holds 90 litres and loses 6 litres an hour. When is a third of it left?",
    "Lena saves 15 coins a month and spends 40 in June. What has she after a year?",
    "Six boxes hold 8 pens each. 13 pens are given away. How many pens remain?",
    "A train leaves at 9:40 and arrives at 13:25. How many minutes does it travel?",
)
SETTLE_SECONDS = 0.3  # PyTorch's threads spin for a while after its work is done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="directory in Hugging Face format")
    parser.add_argument("--gsm8k", help="directory of JSONL files, for prompts")
    parser.add_argument("--batch", type=int, default=1, help="completions in a step")
    parser.add_argument("--pool", type=int, default=1, help="batches under way, by depth")
    parser.add_argument("--continuation", choices=("frozen", "linear"), default="frozen")
    parser.add_argument("--exits", default="", help="layer numbers; every 5th without")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed by depth")
    parser.add_argument("--against", action="store_true", help="time Hugging Face's generate")
    parser.add_argument("--batches", type=int, default=3, help="against Hugging Face")
    parser.add_argument("--new-tokens", type=int, default=64, help="against Hugging Face")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flax import nnx

    from jexit.config import ExitSettings
    from jexit.io.model_dir import load

    model, tokenizer = load(
        arguments.checkpoint,
        dtype="float32",
        exit_layers=tuple(int(layer) for layer in arguments.exits.split(",") if layer),
        exit_head=ExitSettings(continuation=arguments.continuation),
    )
    count = arguments.batch * (arguments.batches if arguments.against else arguments.pool)
    prompts = tokenizer.encode_batch(read_prompts(arguments.gsm8k, count))
    split = nnx.split(model)
    compare = against_hugging_face if arguments.against else by_depth
    sys.exit(0 if compare(split, prompts, tokenizer.pad_id, arguments) else 1)


def read_prompts(directory: str | None, count: int) -> list[str]:
    """Questions of GSM8K's first file by name ("test" before "train"), or the texts above."""
    texts = TEXTS
    if directory:
        file = min(pathlib.Path(directory).glob("*.jsonl"))
        lines = file.read_text("utf-8").splitlines()[:count]
        texts = [json.loads(line)["question"] for line in lines]
    return [texts[i % len(texts)] for i in range(count)]


def in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """[turns, 2] seconds of each run, by the clock and of the processors; the first is dropped."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(SETTLE_SECONDS)
            start = np.asarray([time.perf_counter(), time.process_time()])
            run()
            end = np.asarray([time.perf_counter(), time.process_time()])
            seconds[name].append(end - start)
    return {name: np.asarray(turns[1:]) for name, turns in seconds.items()}


def random_depths(
    rows: int, columns: int, exits: tuple[int, ...], layers: int, mean: float
) -> np.ndarray:
    """Of the exits and the full depth, with probabilities in geometric progression."""
    depths = np.asarray([*exits, layers])
    low, high = 1e-3, 1e3
    for _ in range(100):
        ratio = np.sqrt(low * high)
        p = ratio ** np.arange(len(depths))
        p /= p.sum()
        low, high = (ratio, high) if p @ depths < mean else (low, ratio)
    return np.random.default_rng(0).choice(depths, (rows, columns), p=p).astype(np.int32)


def work(arch: Any, depth: float, continuation: str) -> float:
    """Multiplications for a token that runs so many layers, attention's over the cache left out."""
    kv = 2 * arch.width * arch.kv_heads * arch.head_dim
    skipped = kv + (arch.width**2 if continuation == "linear" else 0)
    layer = arch.width * (2 * arch.query_heads * arch.head_dim + 3 * arch.mlp_width) + kv
    head = arch.vocab_size * arch.width
    return depth * layer + (arch.layers - depth) * skipped + head


def by_depth(split: tuple, prompts: list, pad_id: int, arguments: argparse.Namespace) -> bool:
    """Prints a step's milliseconds at several depths; whether they save what is due."""
    from flax import nnx

    from jexit import Full, Prescribed, Threshold
    from jexit.config import EngineSize
    from jexit.rollout import rollout

    model = nnx.merge(*split)
    arch, layers = model.arch, model.arch.layers
    prompts = [prompt[:64] for prompt in prompts]
    columns = arguments.steps + 1
    # The exits next to these shares of the layers.
    half, quarter, least = (
        min(model.exit_layers, key=lambda layer: abs(layer - share * layers))
        for share in (1 / 2, 1 / 4, 0)
    )

    def run(new: int, policy: object) -> Callable[[], object]:
        return lambda: rollout(
            split,
            prompts,
            policy=policy,
            max_new_tokens=new,
            temperature=0.0,
            eos_ids=(),
            pad_id=pad_id,
            key=0,
            size=EngineSize(rows=len(prompts), tick_rows=arguments.batch),
        )

    shape = (len(prompts), columns)
    depths_BT = {
        str(depth): np.full(shape, depth, np.int32) for depth in (layers, half, quarter, least)
    }
    depths_BT["mixed"] = random_depths(*shape, model.exit_layers, layers, MIXED * layers)
    runs = {"prefill": run(1, Full())}
    runs |= {name: run(columns, Prescribed(depth_BT)) for name, depth_BT in depths_BT.items()}
    heads = f"{layers}, heads read"
    runs[heads] = run(columns, Threshold(1.0))  # nobody's hazard exceeds 1
    seconds = in_turns(runs, arguments.repeats)

    prefill = seconds.pop("prefill")
    step_ms = {name: 1e3 * (turns - prefill) / arguments.steps for name, turns in seconds.items()}
    print(
        f"batch {arguments.batch} of {len(prompts)} completions, float32, {arguments.continuation} "
        f"residuals, {arguments.steps} steps after a prefill of "
        f"{1e3 * np.median(prefill[:, 0]):.0f} ms, medians of {arguments.repeats} turns"
    )
    print(
        f"{'depth':<16}{'ms a step':>12}{'of full':>10}{'work':>8}{'processor ms':>16}"
        f"{'of full':>10}"
    )
    full = np.median(step_ms[str(layers)], axis=0)
    within = True
    for name, turns in step_ms.items():
        (clock, processor), of_full = np.median(turns, axis=0), np.median(turns, axis=0) / full
        due = 1.0
        if name != heads:
            due = work(arch, depths_BT[name][:, 1:].mean(), arguments.continuation)
            due /= work(arch, layers, arguments.continuation)
        print(
            f"{name:<16}{clock:>12.1f}{of_full[0]:>10.2f}{due:>8.2f}{processor:>16.1f}"
            f"{of_full[1]:>10.2f}"
        )
        if name in ("mixed", str(half), str(quarter)) and of_full[0] > due / OF_IDEAL:
            within = False
            print(f"depth {name} takes {of_full[0]:.2f}; at most {due / OF_IDEAL:.2f} is due")
    return within


def against_hugging_face(
    split: tuple, prompts: list, pad_id: int, arguments: argparse.Namespace
) -> bool:
    """Prints seconds of both, prefill included; whether jexit is as fast as it is due to be.

    Both have `batch` completions in a step. Theirs begin together, batch after batch; ours begin as
    others end, out of a pool of as many as there are.
    """
    import torch
    import transformers
    from flax import nnx

    from jexit import Full, Prescribed
    from jexit.config import EngineSize
    from jexit.rollout import rollout

    threads = len(os.sched_getaffinity(0))  # as many as XLA makes
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    new, batch = arguments.new_tokens, arguments.batch
    model = nnx.merge(*split)
    layers = model.arch.layers
    depths = random_depths(len(prompts), new, model.exit_layers, layers, layers / 2)
    tokens = {}

    def ours(name: str, policy: object) -> Callable[[], object]:
        size = EngineSize(rows=len(prompts), tick_rows=batch)

        def run() -> None:
            tokens[name] = rollout(
                split, prompts, policy=policy, max_new_tokens=new, temperature=0.0, eos_ids=(),
                pad_id=pad_id, key=0, size=size,
            ).tokens_BT  # fmt: skip

        return run

    def theirs(name: str) -> Callable[[], object]:
        dtype = getattr(torch, name)
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype)
        model.eval().generation_config.eos_token_id = None  # None in a call means: the model's own
        settings = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=pad_id, eos_token_id=None
        )

        @torch.inference_mode()
        def run() -> None:
            made = []
            for start in range(0, len(prompts), batch):
                ids, mask = left_padded(prompts[start : start + batch], pad_id)
                out = model.generate(ids, attention_mask=mask, generation_config=settings)
                made.append(out[:, ids.shape[1] :].numpy())
            tokens[name] = np.concatenate(made)
            assert tokens[name].shape[1] == new, "transformers stopped at an end token"

        return run

    runs = {
        "full depth": ours("full depth", Full()),
        "half depth": ours("half depth", Prescribed(depths)),
        "float32": theirs("float32"),
        "bfloat16": theirs("bfloat16"),
    }
    seconds = in_turns(runs, arguments.repeats)
    print(
        f"\n{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"{new} new ones, greedy, {batch} at a time, {threads} threads; jexit in float32, half "
        f"depth: {depths.mean() / layers:.2f} L on average"
    )
    print(f"{'jexit':<12}{'s':>7}  {'transformers':<14}{'s':>7}{'times as fast':>16}{'due':>6}")
    within = True
    for mine, other, due in FASTER:
        clock = seconds[mine][:, 0], seconds[other][:, 0]
        ratio = float(np.median(clock[1] / clock[0]))
        within &= ratio >= due
        print(
            f"{mine:<12}{np.median(clock[0]):>7.1f}  {other:<14}{np.median(clock[1]):>7.1f}"
            f"{ratio:>16.2f}{due:>6.1f}"
        )
    equal = float(np.mean(tokens["full depth"] == tokens["float32"]))
    print(f"equal tokens at full depth and in float32: {equal:.1%}", flush=True)
    return within


def left_padded(prompts: list, pad_id: int) -> tuple:
    """(ids, mask) [B, T] for transformers."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


if __name__ == "__main__":
    main()

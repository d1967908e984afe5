"""Time of a decode step by depth, and against Hugging Face's `generate`, as ratios.

    python tests/benchmarks/decode.py --checkpoint DIR [--gsm8k DIR] [--batch 1]

Everything is float32 on the CPU, with as many threads for PyTorch as XLA has. A step's time is that
of a rollout less that of its prefill (the same rollout with one new token), divided by the steps;
nothing is compiled while the clock runs. Alternatives take turns, and the figures are medians over
the turns. On a machine that is shared, the processors' time is the steadier measure; the clock's is
the one that counts. Exits 1 when a step at half the depth takes over 0.62 of one at full depth, or
at a quarter over 0.40.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

HALF, QUARTER = 0.62, 0.40  # the most of a full step that a step at that depth may take
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
    parser.add_argument("--batch", type=int, default=1, help="rows of the timing by depth")
    parser.add_argument("--against", default="1,8", help="batch sizes against Hugging Face")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed by depth")
    parser.add_argument("--new-tokens", type=int, default=48, help="against Hugging Face")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flax import nnx

    import jexit

    model, tokenizer = jexit.load(arguments.checkpoint, dtype="float32")
    most = max(arguments.batch, *map(int, arguments.against.split(",")))
    prompts = tokenizer.encode_batch(read_prompts(arguments.gsm8k, most))
    layers = model.arch.layers
    split = nnx.split(model)
    within = by_depth(split, layers, prompts[: arguments.batch], tokenizer.pad_id, arguments)
    against_hugging_face(split, prompts, tokenizer.pad_id, arguments)
    sys.exit(0 if within else 1)


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


def by_depth(
    split: tuple, layers: int, prompts: list, pad_id: int, arguments: argparse.Namespace
) -> bool:
    """Prints a step's milliseconds at several depths; whether the two ratios are kept."""
    from jexit import Full, Prescribed, Threshold
    from jexit.rollout import rollout

    prompts = [prompt[:64] for prompt in prompts]
    columns = arguments.steps + 1

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
        )

    runs = {"prefill": run(1, Full())}
    depths = (layers, layers // 2, layers // 4, 1)
    for depth in depths:
        policy = Prescribed(np.full((len(prompts), columns), depth, np.int32))
        runs[str(depth)] = run(columns, policy)
    heads = f"{layers}, heads read"
    runs[heads] = run(columns, Threshold(1.0))  # nobody's hazard exceeds 1
    seconds = in_turns(runs, arguments.repeats)

    prefill = seconds.pop("prefill")
    step_ms = {name: 1e3 * (turns - prefill) / arguments.steps for name, turns in seconds.items()}
    print(
        f"batch {len(prompts)}, float32, {arguments.steps} steps after a prefill of "
        f"{1e3 * np.median(prefill[:, 0]):.0f} ms, medians of {arguments.repeats} turns"
    )
    print(f"{'depth':<16}{'ms a step':>12}{'of full':>10}{'processor ms':>16}{'of full':>10}")
    full = np.median(step_ms[str(layers)], axis=0)
    ratios = {}
    for name, turns in step_ms.items():
        (clock, processor), of_full = np.median(turns, axis=0), np.median(turns, axis=0) / full
        ratios[name] = of_full[0]
        print(f"{name:<16}{clock:>12.1f}{of_full[0]:>10.2f}{processor:>16.1f}{of_full[1]:>10.2f}")
    within = True
    for name, most in ((str(layers // 2), HALF), (str(layers // 4), QUARTER)):
        if ratios[name] > most:
            within = False
            print(f"depth {name} takes {ratios[name]:.2f} of full depth; at most {most:.2f} is due")
    return within


def against_hugging_face(
    split: tuple, prompts: list, pad_id: int, arguments: argparse.Namespace
) -> None:
    """Prints seconds of both, prefill included, and the share of tokens that agree."""
    import torch
    import transformers

    from jexit.rollout import rollout

    threads = len(os.sched_getaffinity(0))  # as many as XLA makes
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32
    ).eval()
    # None in a call means: take the model's own.
    theirs.generation_config.eos_token_id = None
    new = arguments.new_tokens
    print(f"\nagainst Hugging Face generate, float32, greedy, {new} new tokens, {threads} threads")
    print(
        f"{'batch':<8}{'ours s':>8}{'theirs':>8}{'ratio':>8}{'processor s':>12}{'theirs':>8}"
        f"{'ratio':>8}{'equal tokens':>16}"
    )
    for batch in map(int, arguments.against.split(",")):
        chosen = prompts[:batch]
        longest = max(map(len, chosen))
        ids = torch.full((batch, longest), pad_id)
        mask = torch.zeros((batch, longest), dtype=torch.long)
        for row, prompt in enumerate(chosen):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        tokens = {}

        def ours(chosen: list = chosen, tokens: dict = tokens) -> None:
            tokens["ours"] = rollout(
                split,
                chosen,
                max_new_tokens=new,
                temperature=0.0,
                eos_ids=(),
                pad_id=pad_id,
                key=0,
            ).tokens_BT

        @torch.inference_mode()
        def hugging_face(
            ids: torch.Tensor = ids, mask: torch.Tensor = mask, tokens: dict = tokens
        ) -> None:
            out = theirs.generate(
                ids,
                attention_mask=mask,
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=new, do_sample=False, pad_token_id=pad_id, eos_token_id=None
                ),
            )
            tokens["theirs"] = out[:, ids.shape[1] :].numpy()
            assert tokens["theirs"].shape[1] == new, "transformers stopped at an end token"

        seconds = in_turns({"ours": ours, "theirs": hugging_face}, arguments.repeats)
        mine, other = (np.median(seconds[name], axis=0) for name in ("ours", "theirs"))
        clock, processor = np.median(seconds["ours"] / seconds["theirs"], axis=0)
        equal = float(np.mean(tokens["ours"] == tokens["theirs"]))
        print(
            f"{batch:<8}{mine[0]:>8.2f}{other[0]:>8.2f}{clock:>8.2f}{mine[1]:>12.2f}"
            f"{other[1]:>8.2f}{processor:>8.2f}{equal:>16.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()

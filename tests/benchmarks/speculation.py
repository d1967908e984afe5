"""Self-speculative decoding against plain decoding with all layers: equality, acceptance and time.

    python tests/benchmarks/speculation.py --model DIR [--task word_problems] [--problems 50]
        [--batch 1] [--tokens 48] [--layers 6,9,12]

Greedy, in float32 on a CPU. Plain decoding and each exit take turns over batches of prompts, and
nothing is compiled while the clock runs. Prints, for each exit, the share of drafted tokens that
all layers accept, and the tokens a second as a ratio to plain decoding (median over the batches).
Exits 1 if a completion differs from plain decoding.
"""

import argparse
import statistics
import sys
import time

import jexit
from jexit.tasks import make_task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--task", default="word_problems")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layers", help="exits that draft; default: all of the model's")
    arguments = parser.parse_args()
    model, tokenizer = jexit.load(arguments.model)
    exits = arguments.layers or ",".join(map(str, model.exit_layers))
    layers = [int(layer) for layer in exits.split(",")]
    task = make_task(arguments.task)
    prompts = [task.problem("test", index).prompt for index in range(arguments.problems)]
    batches = [
        prompts[start : start + arguments.batch]
        for start in range(0, len(prompts), arguments.batch)
    ]
    policies = ["full", *(f"speculate:{layer}" for layer in layers)]
    rates: dict[str, list[float]] = {policy: [] for policy in policies}
    accepted: dict[str, list[float]] = {policy: [] for policy in policies}
    different = 0

    def timed(batch, policy):
        began = time.perf_counter()
        made = jexit.generate(
            model, tokenizer, batch, policy=policy, max_new_tokens=arguments.tokens
        )
        return made, sum(map(len, made.tokens)) / (time.perf_counter() - began)

    for number, batch in enumerate(batches):
        wanted = None
        for policy in policies:
            timed(batch, policy)  # compiles for the length of these prompts
            made, rate = timed(batch, policy)
            rates[policy].append(rate)
            accepted[policy].append(made.acceptance or 0.0)
            wanted = wanted or made.tokens
            different += sum(a != b for a, b in zip(made.tokens, wanted, strict=True))
        print(f"batch {number + 1} of {len(batches)}", file=sys.stderr)
    print(f"{len(prompts)} prompts, batch {arguments.batch}, {model.arch.layers} layers")
    for policy in policies[1:]:
        pairs = zip(rates[policy], rates["full"], strict=True)
        ratio = statistics.median(one / full for one, full in pairs)
        share = statistics.mean(accepted[policy])
        print(f"{policy}: {share:.0%} accepted, {ratio:.2f} × the tokens a second of full depth")
    print(f"{different} completions differ from full depth")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())

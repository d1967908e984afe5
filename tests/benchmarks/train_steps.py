"""Memory and time of both stages' training steps with the vocabulary ops against materialising.

    python tests/benchmarks/train_steps.py --model=DIR --rows=2 --length=256 --completion=192

`DIR` is a model directory (convert.from_hf writes one). Each variant runs in a process of its own,
the variants in turn: `peak` is the most memory that the process has held, model included, `temp`
what the compiled step holds beside its arguments. Below 1 the ops are smaller, or faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

VARIANTS = ("reference", "xla")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2, help="sequences; RL: rollouts of one prompt")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--completion", type=int, default=192)
    parser.add_argument("--samples", type=int, default=1, help="depth assignments of calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child.split(":"))))
        return
    print(
        f"{arguments.model}: {arguments.rows} rows of {arguments.length} tokens, "
        f"{arguments.completion} of them generated; median of {arguments.repeats} steps"
    )
    print(f"{'step':<6}{'':<16}{'temp GiB':>9}{'peak GiB':>9}{'seconds':>9}")
    for stage in ("sft", "rl"):
        rows = {variant: child(f"{stage}:{variant}") for variant in VARIANTS}
        names = {"reference": "materialising", "xla": "the ops"}
        for variant, row in rows.items():
            print(f"{stage:<6}{names[variant]:<16}{row['temp_gib']:>9.2f}{row['peak_gib']:>9.2f}"
                  f"{row['seconds']:>9.2f}")  # fmt: skip
        ratios = [rows["xla"][key] / rows["reference"][key] for key in rows["xla"]]
        print(
            f"{'':<6}{'ratio':<16}{ratios[0]:>9.2f}{ratios[1]:>9.2f}{ratios[2]:>9.2f}", flush=True
        )


def child(what: str) -> dict[str, float]:
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--child={what}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(arguments: argparse.Namespace, stage: str, implementation: str) -> dict[str, float]:
    """Temporaries, the process's peak and the median seconds of a step."""
    import jax

    import jexit
    from jexit.config import LoRA, OptimConfig, RLConfig, SFTConfig
    from jexit.doctor.speed import random_rollouts
    from jexit.kernels import using
    from jexit.loops.trainer import peak_memory
    from jexit.steps.optim import make_optimizer
    from jexit.steps.rl import Penalties, make_rl_step
    from jexit.steps.sft import make_sft_step
    from jexit.steps.state import new_state, parameter_labels, split_model

    model, _ = jexit.load(arguments.model, lora=LoRA(rank=8, alpha=16.0, targets=("q", "v")))
    split = split_model(model, full=False)
    batch = random_rollouts(
        model,
        rows=arguments.rows,
        prompt=arguments.length - arguments.completion,
        new=arguments.completion,
    )
    optimizer = make_optimizer(OptimConfig(), 100, parameter_labels(model, full=False))
    with using(implementation):
        if stage == "sft":
            step = make_sft_step(split, optimizer, SFTConfig(samples=arguments.samples))
            inputs: tuple = (batch.rows,)
        else:
            config = RLConfig(
                rollouts=arguments.rows, max_new_tokens=arguments.completion, kl_loss_coef=0.1
            )
            step, inputs = make_rl_step(split, optimizer, config), (batch, Penalties(0.5, 0.0))
        state = new_state(split.trainable, optimizer)
        key = jax.random.key(0)
        compiled = step.lower(state, split.fixed, *inputs, key).compile()

    seconds = []
    for _ in range(arguments.repeats + 1):
        begin = time.perf_counter()
        state, metrics = compiled(state, split.fixed, *inputs, key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begin)
    return {
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "peak_gib": peak_memory()["memory/host_peak_gib"],
        "seconds": statistics.median(seconds[1:]),
    }


if __name__ == "__main__":
    main()

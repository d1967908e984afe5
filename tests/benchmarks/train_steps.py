"""Memory and time of both stages' training steps with the vocabulary ops against materialising.

    python tests/benchmarks/train_steps.py --model=DIR --rows=2 --length=256 --completion=192
    python tests/benchmarks/train_steps.py --model=DIR --calibration

`DIR` is a model directory (convert.from_hf writes one). Each variant runs in a process of its own,
one after the other: `peak` is the most memory that the process has held, model included, `temp`
what the compiled step holds beside its arguments. Below 1 the ops are smaller, or faster.

With --calibration, the steps of calibration with a linear continuation are compared instead: those
that need no backward pass through the trunk (`fit`: the ridge sums of the rows' tokens; `states`:
the heads' inputs and KLs of the rows; `heads`: a step on 512 of these tokens) against `adapters`,
the step that trains the adapters on the same rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

VARIANTS = ("reference", "xla")
CALIBRATION = ("adapters", "fit", "states", "heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2, help="sequences; RL: rollouts of one prompt")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--completion", type=int, default=192)
    parser.add_argument("--samples", type=int, default=1, help="depth assignments of calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calibration", action="store_true", help="compare its phases")
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
    for stage in () if arguments.calibration else ("sft", "rl"):
        compare(stage, [f"{stage}:{variant}" for variant in VARIANTS], ("materialising", "the ops"))
    if arguments.calibration:
        compare("sft", [f"{step}:xla" for step in CALIBRATION], CALIBRATION)


def compare(stage: str, children: Sequence[str], names: Sequence[str]) -> None:
    """Prints the measurements of each child, and their ratios to those of the first one."""
    first: dict[str, float] | None = None
    for what, name in zip(children, names, strict=True):
        row = child(what)
        print(f"{stage:<6}{name:<16}" + "".join(f"{value:>9.3g}" for value in row.values()))
        if first is not None:
            ratios = [row[key] / first[key] for key in row]
            print(f"{'':<6}{'ratio':<16}" + "".join(f"{x:>9.3g}" for x in ratios), flush=True)
        first = first or row


def child(what: str) -> dict[str, float]:
    """Returns the measurements of `what` (STEP:IMPLEMENTATION) in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--child={what}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(arguments: argparse.Namespace, stage: str, implementation: str) -> dict[str, float]:
    """Temporaries, the process's peak and the median seconds of a step."""
    import jax
    import jax.numpy as jnp

    import jexit
    from jexit.config import ExitSettings, LoRA, OptimConfig, RLConfig, SFTConfig
    from jexit.doctor.speed import random_rollouts
    from jexit.kernels import using
    from jexit.loops.sft import HEADS_TOKENS
    from jexit.loops.trainer import peak_memory
    from jexit.steps.exit_heads import ExitStates, make_exit_states, make_lens_step
    from jexit.steps.optim import make_optimizer, split_for_training
    from jexit.steps.ridge import RidgeSums, make_sums_step
    from jexit.steps.rl import Penalties, make_rl_step
    from jexit.steps.sft import make_sft_step
    from jexit.steps.state import new_state

    continuation = "linear" if stage in CALIBRATION else "frozen"
    model, _ = jexit.load(
        arguments.model,
        lora=LoRA(rank=8, alpha=16.0, targets=("q", "v")),
        exit_head=ExitSettings(continuation=continuation),
    )
    split, labels = split_for_training(model, OptimConfig(), full=False)
    batch = random_rollouts(
        model,
        rows=arguments.rows,
        prompt=arguments.length - arguments.completion,
        new=arguments.completion,
    )
    optimizer = make_optimizer(OptimConfig(), 100, labels)
    state, key = new_state(split.trainable, optimizer), jax.random.key(0)
    with using(implementation):
        if stage in ("sft", "adapters"):
            step = make_sft_step(split, optimizer, SFTConfig(samples=arguments.samples))
            inputs: tuple = (state, split.fixed, batch.rows, key)
        elif stage == "rl":
            config = RLConfig(
                rollouts=arguments.rows, max_new_tokens=arguments.completion, kl_loss_coef=0.1
            )
            step = make_rl_step(split, optimizer, config)
            inputs = (state, split.fixed, batch, Penalties(0.5, 0.0), key)
        elif stage == "fit":
            step = make_sums_step(split)
            sums = RidgeSums.zero(model.exit_layers, model.arch.layers, model.arch.width)
            inputs = (sums, split.trainable, split.fixed, batch.rows)
        else:
            step = make_exit_states(split, SFTConfig().sharpness)
            positions = batch.rows.completion_tokens_BC.size
            states = ExitStates.empty(split, positions)
            place_M = jnp.arange(positions)
            inputs = (states, split.trainable, split.fixed, batch.rows, place_M, key)
        if stage == "heads":
            states = step(*inputs)
            step = make_lens_step(split, optimizer, SFTConfig())
            position_M = jnp.arange(HEADS_TOKENS) % positions
            inputs = (state, split.fixed, states, position_M)
        compiled = step.lower(*inputs).compile()

    seconds, (carried, *others) = [], inputs
    for _ in range(arguments.repeats + 1):
        begin = time.perf_counter()
        result = jax.block_until_ready(compiled(carried, *others))
        seconds.append(time.perf_counter() - begin)
        carried = result if stage in ("fit", "states") else result[0]
    return {
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "peak_gib": peak_memory()["memory/host_peak_gib"],
        "seconds": statistics.median(seconds[1:]),
    }


if __name__ == "__main__":
    main()

"""Compile time of a deep stack against a shallow one; it should not grow, as the stack is scanned.

    python tests/benchmarks/compile_time.py --deep=36 --shallow=4

Prints CPU seconds, which other work on the machine does not stretch, and the ratio, for a forward
pass that samples depths and for a LoRA gradient.
"""

import argparse
import dataclasses
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

import jexit
from jexit.model.lora import LoRA, LoRAParam
from jexit.model.transformer import Execution, Transformer, run
from jexit.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3-4b")
    parser.add_argument("--deep", type=int, default=36)
    parser.add_argument("--shallow", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.preset}, median of {arguments.repeats}, CPU seconds to compile")
    print(f"{'program':<12}{arguments.deep:>6} layers{arguments.shallow:>6} layers{'ratio':>8}")
    for program in ("forward", "gradient"):
        times: dict[int, list[float]] = {arguments.deep: [], arguments.shallow: []}
        for _ in range(arguments.repeats):
            for layers, seconds in times.items():
                seconds.append(compile_seconds(arguments.preset, layers, program))
        deep, shallow = (statistics.median(seconds) for seconds in times.values())
        print(f"{program:<12}{deep:>13.2f}{shallow:>13.2f}{deep / shallow:>8.2f}", flush=True)


def compile_seconds(preset: str, layers: int, program: str) -> float:
    """CPU seconds of XLA alone, from a lowered program without weights to an executable."""
    arch = dataclasses.replace(PRESETS[preset].architecture, layers=layers)

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=(1, 2),
            lora=LoRA(rank=16, alpha=32.0),
            execution=Execution(remat="block"),
            rngs=nnx.Rngs(0),
        )

    graphdef, trained, rest = nnx.split(nnx.eval_shape(build), LoRAParam, ...)

    def total(trained, rest, tokens_BT, key):
        model = nnx.merge(graphdef, trained, rest)
        out = run(model, tokens_BT, policy=jexit.Sample(), key=key)
        return out.hidden_BTD.sum()

    function = total if program == "forward" else jax.grad(total)
    tokens_BT = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(function).lower(trained, rest, tokens_BT, key)
    start = time.process_time()
    lowered.compile()
    return time.process_time() - start


if __name__ == "__main__":
    main()

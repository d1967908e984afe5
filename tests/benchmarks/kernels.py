"""Time and memory of the vocabulary ops against materialising all logits, as ratios.

    python tests/benchmarks/kernels.py --tokens=512 --width=896 --vocab=151936 --exits=4

Each case runs in a process of its own, so that its peak memory is its own. `hidden` is the gradient
to the hidden states, `head` that to the hidden states and the head. Below 1 the op is faster, or
smaller, than materialising.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CASES = {
    "exit_kl": ("forward",),
    "linear_kl": ("forward", "hidden", "head"),
    "linear_logprob": ("forward", "hidden", "head"),
}
MATERIALISING = "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--exits", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ops", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments, *arguments.case.split(":"))))
        return
    print(
        f"N={arguments.tokens} D={arguments.width} V={arguments.vocab} E={arguments.exits} "
        f"{arguments.dtype}, median of {arguments.repeats}, {arguments.implementation} against "
        "materialising"
    )
    print(f"{'op':<24}{'ms':>9}{'against':>9}{'time':>7}{'temp MB':>9}{'against':>9}{'temp':>7}"
          f"{'peak MB':>9}{'against':>9}{'peak':>7}")  # fmt: skip
    for op in arguments.ops.split(","):
        for mode in CASES[op]:
            ours, theirs = (
                child(f"{op}:{mode}:{implementation}")
                for implementation in (arguments.implementation, MATERIALISING)
            )
            columns = "".join(
                f"{ours[key]:>9.0f}{theirs[key]:>9.0f}{ours[key] / theirs[key]:>7.2f}"
                for key in ("milliseconds", "temporary_mb", "peak_mb")
            )
            print(f"{op + ' ' + mode:<24}{columns}", flush=True)


def child(case: str) -> dict[str, float]:
    """Runs one case with this process's own arguments in a new process."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--case={case}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(
    arguments: argparse.Namespace, op: str, mode: str, implementation: str
) -> dict[str, float]:
    """Median milliseconds, compiled temporaries and the process's peak memory in MB."""
    import jax

    function, operands = build(arguments, op, mode, implementation)
    compiled = jax.jit(function).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        seconds.append(time.perf_counter() - start)
    return {
        "milliseconds": 1e3 * statistics.median(seconds),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def build(
    arguments: argparse.Namespace, op: str, mode: str, implementation: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function to time, and its operands."""
    import jax
    import jax.numpy as jnp

    from jexit import kernels

    def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
        values = scale * jax.random.normal(jax.random.key(seed), shape)
        return values.astype(arguments.dtype)

    tokens, width, vocab = arguments.tokens, arguments.width, arguments.vocab
    head_VD = normal(0, vocab, width, scale=2 * width**-0.5)
    h_ND = normal(1, tokens, width)
    if op == "exit_kl":
        exits_END = normal(2, arguments.exits, tokens, width)
        return (
            lambda *operands: kernels.exit_kl(*operands, implementation=implementation),
            (h_ND, exits_END, head_VD),
        )
    if op == "linear_kl":
        other = normal(2, tokens, width)

        def forward(h_ND: jax.Array, head_VD: jax.Array, other: jax.Array) -> jax.Array:
            return kernels.linear_kl(h_ND, other, head_VD, implementation=implementation)
    else:
        other = jax.random.randint(jax.random.key(2), (tokens,), 0, vocab)

        def forward(h_ND: jax.Array, head_VD: jax.Array, other: jax.Array) -> jax.Array:
            out = kernels.linear_logprob(h_ND, head_VD, other, implementation=implementation)
            return out.logprob_N

    if mode == "forward":
        return forward, (h_ND, head_VD, other)

    def loss(h_ND: jax.Array, head_VD: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.mean(forward(h_ND, head_VD, other))

    return jax.value_and_grad(loss, (0, 1) if mode == "head" else 0), (h_ND, head_VD, other)


if __name__ == "__main__":
    main()

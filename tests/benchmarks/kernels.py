"""Time and memory of the vocabulary ops against materialising all logits, as ratios.

    python tests/benchmarks/kernels.py --tokens=512 --width=896 --vocab=151936 --exits=4

`hidden` is forward and gradient to the hidden states, `head` that to the hidden states and the
head. Below 1 the op is faster, or smaller, than materialising. The two are timed in turn in one
process, so that other work on the machine slows both; each has a process of its own for its peak
memory, which is what the process gains over its inputs: temporaries and outputs. `temp` is the
temporary memory that the compiler reports, as a share of the logits of all sets of hidden states
(the final one and the exits; student and teacher; one) in float32.
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
    parser.add_argument("--modes", default="forward,hidden,head", help="comma-separated")
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        what, *case = arguments.case.split(":")
        print(json.dumps({"time": seconds, "memory": memory}[what](arguments, *case)))
        return
    print(
        f"N={arguments.tokens} D={arguments.width} V={arguments.vocab} E={arguments.exits} "
        f"{arguments.dtype}, median of {arguments.repeats}, {arguments.implementation} against "
        "materialising"
    )
    print(f"{'op':<24}{'ms':>9}{'against':>9}{'time':>7}{'peak MB':>9}{'against':>9}{'peak':>7}"
          f"{'temp':>8}{'against':>9}")  # fmt: skip
    for op in arguments.ops.split(","):
        for mode in (mode for mode in CASES[op] if mode in arguments.modes.split(",")):
            ours, theirs = child(f"time:{op}:{mode}")
            row = (
                f"{op + ' ' + mode:<24}{1e3 * ours:>9.0f}{1e3 * theirs:>9.0f}{ours / theirs:>7.2f}"
            )
            ours, theirs = (
                child(f"memory:{op}:{mode}:{implementation}")
                for implementation in (arguments.implementation, MATERIALISING)
            )
            ratio = ours["peak_mb"] / theirs["peak_mb"]
            row += f"{ours['peak_mb']:>9.0f}{theirs['peak_mb']:>9.0f}{ratio:>7.2f}"
            print(row + f"{ours['temp_share']:>8.1%}{theirs['temp_share']:>9.1%}", flush=True)


def child(case: str) -> Any:
    """Runs one measurement with this process's own arguments in a new process."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--case={case}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def seconds(arguments: argparse.Namespace, op: str, mode: str) -> list[float]:
    """Median seconds of the implementation and of materialising, run in turn."""
    import jax

    names = (arguments.implementation, MATERIALISING)
    compiled = [compile_case(arguments, op, mode, name) for name in names]
    operands = make_operands(arguments, op)
    for function in compiled:
        jax.block_until_ready(function(*operands))
    taken: list[list[float]] = [[] for _ in compiled]
    for _ in range(arguments.repeats):
        for function, times in zip(compiled, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def memory(
    arguments: argparse.Namespace, op: str, mode: str, implementation: str
) -> dict[str, float]:
    """What one run adds to the process's peak in MB, and the compiler's share of temporaries."""
    import jax

    compiled = compile_case(arguments, op, mode, implementation)
    operands = make_operands(arguments, op)
    before_mb = peak_mb()
    jax.block_until_ready(compiled(*operands))
    sets = {"exit_kl": arguments.exits + 1, "linear_kl": 2, "linear_logprob": 1}[op]
    logits_bytes = 4 * sets * arguments.tokens * arguments.vocab
    return {
        "peak_mb": peak_mb() - before_mb,
        "temp_share": compiled.memory_analysis().temp_size_in_bytes / logits_bytes,
    }


def peak_mb() -> float:
    """Largest resident memory that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def operand_shapes(arguments: argparse.Namespace, op: str) -> tuple[tuple[int, ...], ...]:
    """Hidden states, the head, and what else the op takes."""
    tokens, width = arguments.tokens, arguments.width
    other = {
        "exit_kl": (arguments.exits, tokens, width),
        "linear_kl": (tokens, width),
        "linear_logprob": (tokens,),
    }
    return (tokens, width), (arguments.vocab, width), other[op]


def make_operands(arguments: argparse.Namespace, op: str) -> list[Any]:
    """Random operands, block by block: making them must not take more memory than they do."""
    import jax

    def make(seed: int, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.key(seed)
        if len(shape) == 1:
            return jax.random.randint(key, shape, 0, arguments.vocab)
        scale = 2 * shape[-1] ** -0.5 if shape[0] == arguments.vocab else 1.0
        block = next(size for size in range(256, 0, -1) if shape[0] % size == 0)

        def values(key: jax.Array) -> jax.Array:
            part = scale * jax.random.normal(key, (block, *shape[1:]))
            return part.astype(arguments.dtype)

        keys = jax.random.split(key, shape[0] // block)
        return jax.jit(lambda keys: jax.lax.map(values, keys).reshape(shape))(keys)

    shapes = operand_shapes(arguments, op)
    return jax.block_until_ready([make(seed, shape) for seed, shape in enumerate(shapes)])


def compile_case(
    arguments: argparse.Namespace, op: str, mode: str, implementation: str
) -> Callable[..., Any]:
    """The compiled function of `make_operands`' arrays."""
    import jax
    import jax.numpy as jnp

    from jexit import kernels

    def forward(h_ND: jax.Array, head_VD: jax.Array, other: jax.Array) -> Any:
        if op == "exit_kl":
            return kernels.exit_kl(h_ND, other, head_VD, implementation=implementation)
        if op == "linear_kl":
            return kernels.linear_kl(h_ND, other, head_VD, implementation=implementation)
        return kernels.linear_logprob(h_ND, head_VD, other, implementation=implementation).logprob_N

    function = forward
    if mode != "forward":
        argnums = (0, 1) if mode == "head" else 0
        function = jax.value_and_grad(lambda *operands: jnp.mean(forward(*operands)), argnums)
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else arguments.dtype)
        for shape in operand_shapes(arguments, op)
    ]
    return jax.jit(function).lower(*operands).compile()


if __name__ == "__main__":
    main()

"""What the vocabulary ops need on accelerators that are not at hand, from their compilers.

    export JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot/cuda
    export TPU_LIBRARY_PATH=.venv/aot/tpu/libtpu/libtpu.so
    python tests/benchmarks/compile_kernels.py --topologies=v5e:2x2,v5p:2x2x1,v6e:2x2,h100:1
    python tests/benchmarks/compile_kernels.py --topologies=cpu --implementation=xla

For each op: time to compile, temporary memory as a share of the logits that materialising would
hold (float32, all sets of hidden states), the FLOPs of its matrix products (counted, not read from
the compiler), the tile. For TPUs `--vmem` finds the least VMEM,
in MiB, with which the compiler still succeeds: what the kernels use. For GPUs the most shared
memory of a block and, with `--registers`, registers a thread and bytes of them that are spilled, of
a `ptxas` on the PATH that knows the PTX which XLA writes (8.8 with JAX 0.10, 9.4 with JAX 0.12).
`launch/test.sh` puts libtpu and the CUDA plugin into .venv/aot.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jexit import kernels
from jexit.aot.topologies import Topology, get_topology
from jexit.kernels import gpu, tpu

SHAPES = {  # tokens, width, vocabulary, exits
    "qwen3-4b": (2048, 2560, 151_936, 7),
    "r1-distill-qwen-1.5b": (2048, 1536, 151_936, 5),
}
Case = tuple[Callable[..., Any], tuple[str, ...], int, int]


def cases(implementation: str | None, temperature: float) -> dict[str, Case]:
    """For each: the function, its operands, its sets of hidden states, its matrix products.

    Products with the head as the TPU kernels do them, which recompute the logits once for each
    gradient; the others do it once for both.
    """

    chosen_by: Any = {"temperature": temperature, "implementation": implementation}

    def exit_kl(h: Any, exits: Any, head: Any) -> Any:
        return kernels.exit_kl(h, exits, head, implementation=implementation)

    def kl(h: Any, other: Any, head: Any, direction: str = "student_teacher") -> Any:
        return kernels.linear_kl(h, other, head, direction=direction, **chosen_by)

    def logprob(h: Any, head: Any, targets: Any) -> Any:
        return kernels.linear_logprob(h, head, targets, **chosen_by)

    def gradient(function: Callable[..., Any], argnums: Any) -> Callable[..., Any]:
        def loss(*arguments: Any) -> Any:
            return sum(jnp.mean(leaf) for leaf in jax.tree.leaves(function(*arguments)))

        return jax.value_and_grad(loss, argnums)

    def jeffreys(*arguments: Any) -> Any:
        return kl(*arguments, direction="jeffreys")

    def chosen(*arguments: Any) -> Any:
        return logprob(*arguments).logprob_N

    exits, two, one = ("h", "exits", "head"), ("h", "h", "head"), ("h", "head", "targets")
    return {
        "exit_kl": (exit_kl, exits, 0, 0),
        "linear_kl": (kl, two, 2, 2),
        "linear_kl to h": (gradient(kl, 0), two, 2, 5),
        "linear_kl jeffreys to h": (gradient(jeffreys, 0), two, 2, 5),
        "linear_kl to h and head": (gradient(kl, (0, 2)), two, 2, 8),
        "linear_logprob": (logprob, one, 1, 1),
        "linear_logprob to h": (gradient(chosen, 0), one, 1, 3),
        "linear_logprob to h and head": (gradient(chosen, (0, 1)), one, 1, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--shapes", default="qwen3-4b", help=f"of {', '.join(SHAPES)}; or N,D,V,E")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--temperature", type=float, default=1.0, help="of KL and log-probability")
    parser.add_argument("--implementation", help="default: what is picked for the platform")
    parser.add_argument("--ops", default="", help="parts of cases' names")
    parser.add_argument("--vmem", action="store_true")
    parser.add_argument("--registers", action="store_true")
    parser.add_argument("--json", action="store_true", help="one line a case")
    arguments = parser.parse_args()
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",") if name in SHAPES}
    if not shapes:
        shapes = {arguments.shapes: tuple(map(int, arguments.shapes.split(",")))}
    for name in arguments.topologies.split(","):
        cpu = Topology("cpu", "cpu", jax.devices("cpu"))
        topology = cpu if name == "cpu" else get_topology(name)
        for shape_name, shape in shapes.items():
            if not arguments.json:
                print(
                    f"{name} ({topology.device_kind}), {shape_name}, {arguments.dtype}: "
                    f"N, D, V, E = {', '.join(map(str, shape))}"
                )
                print(f"  {'op':<30}{'compile s':>10}{'temp MB':>9}{'share':>8}{'GFLOP':>9}  tiles")
            for case in cases(arguments.implementation, arguments.temperature):
                if not any(part in case for part in arguments.ops.split(",")):
                    continue
                row = compile_case(case, topology, shape, arguments)
                if arguments.json:
                    print(json.dumps({"topology": name, "case": case} | row), flush=True)
                    continue
                notes = " ".join("×".join(map(str, tile)) for tile in row["tiles"])
                if "vmem_mib" in row:
                    notes += f", {row['vmem_mib']} MiB of VMEM"
                if "shared_bytes" in row:
                    notes += f", {row['shared_bytes'] / 1024:.0f} KiB shared"
                if "registers" in row:
                    notes += f", {row['registers']} registers, {row['spilled_bytes']} B spilled"
                print(
                    f"  {case:<30}{row['seconds']:>10.1f}{row['temp_bytes'] / 1e6:>9.1f}"
                    f"{row['share']:>8.2%}{row['flops'] / 1e9:>9.0f}  {notes}",
                    flush=True,
                )


def compile_case(
    case: str, topology: Topology, shape: tuple[int, ...], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compiles one case; errors of the compiler are raised."""
    function, operands, sets, products = cases(arguments.implementation, arguments.temperature)[
        case
    ]
    tokens, width, vocab, exits = shape
    sets, products = sets or exits + 1, products or exits + 1
    sharding = SingleDeviceSharding(topology.devices[0])

    def operand(name: str) -> jax.ShapeDtypeStruct:
        dims = {
            "h": (tokens, width),
            "exits": (exits, tokens, width),
            "head": (vocab, width),
            "targets": (tokens,),
        }[name]
        dtype = jnp.int32 if name == "targets" else arguments.dtype
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    chosen, module = [], gpu if topology.platform == "gpu" else tpu
    choose = module.choose_tile

    limit = tpu.vmem_limit_bytes

    def record(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(tpu, "vmem_limit_bytes", limit):  # that of `least_vmem` is lower
            chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    def compiled(**options: str) -> Any:
        jax.clear_caches()
        with topology.compiling(), mock.patch.object(module, "choose_tile", record):
            return jax.jit(function).lower(*map(operand, operands)).compile(options)

    begin, resources = time.perf_counter(), {}
    if topology.platform == "gpu":
        with tempfile.TemporaryDirectory() as dump:
            memory = compiled(xla_dump_to=dump, xla_dump_emitter_re="ptx").memory_analysis()
            resources = gpu_resources(pathlib.Path(dump), registers=arguments.registers)
    else:
        memory = compiled().memory_analysis()
    row = {
        "seconds": time.perf_counter() - begin,
        "temp_bytes": memory.temp_size_in_bytes,
        "share": memory.temp_size_in_bytes / (4 * sets * tokens * vocab),
        "flops": 2 * products * tokens * width * vocab,
        "tiles": sorted(set(chosen)),
    } | resources
    if arguments.vmem and topology.platform == "tpu":
        with topology.compiling():
            row["vmem_mib"] = least_vmem(compiled, tpu.vmem_limit_bytes() // 2**20)
    return row


def gpu_resources(dump: pathlib.Path, *, registers: bool) -> dict[str, int]:
    """The most that one of the Pallas kernels takes of a multiprocessor, from XLA's dump."""
    (plan,) = dump.glob("*.thunk_sequence.txt")
    shared = re.findall(r"_kernel grid:.*shared_memory: (\d+) bytes", plan.read_text())
    resources = {"shared_bytes": max(map(int, shared))}
    if not registers:
        return resources
    used, spilled = [], []
    for ptx in dump.glob("*.ptx"):
        if not re.search(r"\.entry \w+_kernel\b", ptx.read_text()):
            continue
        assembled = subprocess.run(
            ["ptxas", "-arch=sm_90a", "-v", "-o", "/dev/null", str(ptx)],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
        used += re.findall(r"Used (\d+) registers", assembled)
        spilled += re.findall(r"(\d+) bytes spill stores", assembled)
    return resources | {
        "registers": max(map(int, used)),
        "spilled_bytes": max(map(int, spilled)),
    }


def least_vmem(compiled: Callable[[], Any], enough: int) -> int:
    """The least MiB with which `compiled` succeeds, by bisection; the tiles stay as chosen."""
    low, high = 0, enough
    while high - low > 1:
        middle = (low + high) // 2
        with mock.patch.object(tpu, "vmem_limit_bytes", lambda middle=middle: middle * 2**20):
            try:
                compiled()
                high = middle
            except jax.errors.JaxRuntimeError as error:
                if "vmem" not in str(error).lower():
                    raise
                low = middle
    return high


if __name__ == "__main__":
    sys.exit(main())

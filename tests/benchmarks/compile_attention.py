"""What attention over whole sequences needs on accelerators that are not at hand.

    export JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot/cuda
    export TPU_LIBRARY_PATH=.venv/aot/tpu/libtpu/libtpu.so
    python tests/benchmarks/compile_attention.py --topologies=v5e:2x2,v5p:2x2x1,v6e:2x2,h100:1

Forward and backward of one layer's attention with the heads of Qwen3-4B, compiled for one device:
temporary memory of each implementation that runs there, the largest array that the compiled
program holds, and whether one of them is as large as the scores [B, N, T, T]. `launch/test.sh` puts
libtpu and the CUDA plugin into .venv/aot.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jexit.aot.topologies import Topology, get_topology
from jexit.model.attention import PLATFORMS, KeysValues, attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--attention", default="xla,splash,cudnn", help="those to compile")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--shape", default="1,32,8,128", help="B,N,K,H")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one line a case")
    arguments = parser.parse_args()
    shape = tuple(map(int, arguments.shape.split(",")))
    for name in arguments.topologies.split(","):
        topology = get_topology(name)
        if not arguments.json:
            print(f"{name} ({topology.device_kind}), {arguments.dtype}, B, N, K, H = {shape}")
            print(f"  {'T':>6}  {'attention':<10}{'compile s':>10}{'temp MB':>10}{'of scores':>11}")
        for length in map(int, arguments.lengths.split(",")):
            for attention in arguments.attention.split(","):
                if PLATFORMS.get(attention, topology.platform) != topology.platform:
                    continue
                row = compile_case(attention, topology, length, shape, arguments)
                if arguments.json:
                    print(json.dumps({"topology": name} | row), flush=True)
                    continue
                print(
                    f"  {length:>6}  {attention:<10}{row['seconds']:>10.1f}"
                    f"{row['temp_bytes'] / 1e6:>10.1f}{row['share']:>11.2%}  "
                    f"largest array {row['largest']}",
                    flush=True,
                )


def compile_case(
    attention: str,
    topology: Topology,
    length: int,
    shape: tuple[int, int, int, int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Compiles one case; errors of the compiler are raised."""
    rows, heads, kv_heads, width = shape
    sharding = SingleDeviceSharding(topology.devices[0])

    def operand(*dims: int, dtype: Any = arguments.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def loss(q: Any, k: Any, v: Any, valid: Any) -> Any:
        kv = KeysValues(k, v)
        out = attend(q, kv, valid, implementation=attention)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    key = operand(rows, length, kv_heads, width)
    operands = (operand(rows, length, heads, width), key, key, operand(rows, length, dtype=bool))
    begin = time.perf_counter()
    with topology.compiling():
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands).compile()
    scores = rows * heads * length * length
    temporary, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
    # Arrays inside a fusion are never in memory; XLA names the computations of fusions so.
    outside = re.sub(r"(?ms)^%?fused_computation.*?^}", "", text)
    shapes = set(re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", outside))
    sizes = {dims: math.prod(map(int, dims.split(","))) for dims in shapes}
    largest = max(sizes, key=sizes.get)
    return {
        "length": length,
        "attention": attention,
        "seconds": time.perf_counter() - begin,
        "temp_bytes": temporary,
        "share": temporary / (4 * scores),
        "of_queries": temporary / (4 * rows * heads * length * width),
        "largest": largest,
        "holds_scores": sizes[largest] >= scores,
        "kernels": len(re.findall(r'custom_call_target="(?:tpu_custom_call|__cudnn)', text)),
    }


if __name__ == "__main__":
    sys.exit(main())

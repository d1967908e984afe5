"""What attention while decoding needs on accelerators that are not at hand.

    export JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot/cuda
    export TPU_LIBRARY_PATH=.venv/aot/tpu/libtpu/libtpu.so
    python tests/benchmarks/compile_decode_attention.py --topologies=v5e:2x2,v6e:2x2,h100:1

One query a row over a cache of all layers, with the heads of Qwen3-4B, compiled for one device:
temporary memory of each implementation, beside the cache and beside one layer's part of it.
`launch/test.sh` puts libtpu and the CUDA plugin into .venv/aot.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jexit.aot.topologies import Topology, get_topology
from jexit.kernels import decode_attention

KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--shape", default="32,8,128,36", help="N,K,H,L")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tick-rows", type=int, default=32)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one line a case")
    arguments = parser.parse_args()
    for name in arguments.topologies.split(","):
        topology = get_topology(name)
        for implementation in (None, "xla", KERNELS[topology.platform]):
            row = {"topology": name} | compile_case(implementation, topology, arguments)
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{name:<10}{implementation or 'picked':<12}{row['seconds']:>6.1f} s"
                f"{row['temp_bytes'] / 1e6:>10.1f} MB, of the cache {row['of_cache']:.2%}, "
                f"of a layer's {row['of_layer']:.1%}; kernels {row['kernels']}",
                flush=True,
            )


def compile_case(
    implementation: str | None, topology: Topology, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compiles one case; errors of the compiler are raised."""
    heads, kv_heads, width, layers = map(int, arguments.shape.split(","))
    sharding = SingleDeviceSharding(topology.devices[0])

    def operand(*dims: int, dtype: Any = arguments.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    cache = operand(kv_heads, layers, arguments.rows, arguments.slots, width)
    of_rows = operand(arguments.tick_rows, dtype=jnp.int32)

    def all_layers(q: Any, keys: Any, values: Any, rows: Any, lengths: Any) -> Any:
        def step(layer: Any, q: Any) -> Any:
            return decode_attention(
                q, keys, values, layer, rows, lengths, implementation=implementation
            )

        return jax.lax.fori_loop(0, layers, step, q)

    begin = time.perf_counter()
    with topology.compiling():
        lowered = jax.jit(all_layers).lower(
            operand(arguments.tick_rows, heads, width), cache, cache, of_rows, of_rows
        )
        compiled = lowered.compile()
    held = 2 * cache.size * cache.dtype.itemsize
    temporary, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
    calls = r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)'
    return {
        "implementation": implementation,
        "seconds": time.perf_counter() - begin,
        "temp_bytes": temporary,
        "of_cache": temporary / held,
        "of_layer": temporary / (held / layers),
        "kernels": len(re.findall(calls, text)),
    }


if __name__ == "__main__":
    main()

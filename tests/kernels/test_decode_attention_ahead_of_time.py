"""Attention while decoding, and the whole engine, through the real compilers."""

import functools

import aot
import pytest

SCRIPT = "tests/benchmarks/compile_decode_attention.py"
TPU, GPU = [pytest.mark.tpu_aot, aot.needs_libtpu], [pytest.mark.gpu_aot, aot.needs_cuda_plugin]
TOPOLOGIES = [
    pytest.param("v5e:2x2", marks=TPU),
    pytest.param("h100:1", marks=GPU),
    pytest.param("v5p:2x2x1", marks=[*TPU, pytest.mark.slow]),
    pytest.param("v6e:2x2", marks=[*TPU, pytest.mark.slow]),
]


@functools.cache
def compiled(topology: str) -> dict:
    """With the heads and layers of Qwen3-4B, 8 of 24 rows, 1,024 slots."""
    rows = aot.run_compiler(
        [SCRIPT, f"--topologies={topology}", "--json", "--rows=24", "--places=8"]
    )
    return {row["implementation"]: row for row in rows}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernel_is_picked_and_copies_nothing(topology):
    """Less than a fiftieth of one layer's keys and values, of 36."""
    rows = compiled(topology)
    kernel = "pallas_gpu" if topology.startswith("h100") else "pallas_tpu"
    for name in (None, kernel):
        assert rows[name]["kernels"] == 1
        assert rows[name]["of_layer"] < 0.05
    assert rows["xla"]["kernels"] == 0


ENGINE = """
import json
from jexit.aot import preflight
from jexit.config import Config
from configs.eval import get_config
config = get_config("qwen3-0.6b")
config.eval.policies, config.eval.problems = ("sample",), 64
config.mesh.data, config.mesh.tensor = {mesh}
for report in preflight.preflight(Config.from_dict(config), {topology!r}):
    print(json.dumps([report.step, report.temporaries, report.arguments]).join(
        ('{{"found": ', "}}")))
"""


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        pytest.param("v5e:2x2", (4, 1), marks=[*TPU, pytest.mark.slow]),
        pytest.param("v5e:2x2", (2, 2), marks=[*TPU, pytest.mark.slow]),
        pytest.param("h100:1", (1, 1), marks=GPU),
    ],
)
def test_the_engine_copies_neither_cache_nor_weights(topology, mesh):
    """Temporaries of prefill and ticks under a tenth of what they are given."""
    code = ENGINE.format(topology=topology, mesh=mesh)
    reports = {row["found"][0]: row["found"][1:] for row in aot.run_compiler(["-c", code])}
    temporaries, arguments = reports["evaluation decode (sample), a token"]
    assert arguments > 2 * 2**30 and temporaries < 0.1 * arguments

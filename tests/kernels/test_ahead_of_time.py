"""The kernels through the real compilers, at the size of Qwen3-4B in bfloat16."""

import functools

import aot
import pytest

TPU, GPU = [pytest.mark.tpu_aot, aot.needs_libtpu], [pytest.mark.gpu_aot, aot.needs_cuda_plugin]
TOPOLOGIES = [
    pytest.param("v5e:2x2", marks=TPU),
    pytest.param("h100:1", marks=GPU),
    pytest.param("v5p:2x2x1", marks=[*TPU, pytest.mark.slow]),
    pytest.param("v6e:2x2", marks=[*TPU, pytest.mark.slow]),
]
CASES = (
    "exit_kl",
    "linear_kl",
    "linear_kl to h",
    "linear_kl jeffreys to h",
    "linear_kl to h and head",
    "linear_logprob",
    "linear_logprob to h",
    "linear_logprob to h and head",
)


@functools.cache
def compiled(topology: str, *options: str) -> dict:
    """All cases in one process."""
    command = ["tests/benchmarks/compile_kernels.py", f"--topologies={topology}", "--json"]
    return {row["case"]: row for row in aot.run_compiler([*command, *options])}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_and_holds_no_logits(topology, case):
    row = compiled(topology)[case]
    assert row["share"] <= 0.05, f"{row['temp_bytes'] / 1e6:.0f} MB of temporaries"
    assert row["tiles"], "no Pallas kernel was picked"
    assert row.get("shared_bytes", 0) <= 232_448  # of a block on an H100


@pytest.mark.parametrize(
    "shape", [pytest.param("300,96,151,5", marks=pytest.mark.slow), "64,5120,152064,12"]
)
@pytest.mark.parametrize("topology", TOPOLOGIES[1:3])
def test_the_smallest_and_the_widest_model_compile(topology, shape):
    rows = compiled(topology, f"--shapes={shape}", "--dtype=float32")
    assert set(rows) == set(CASES)


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e:2x2", marks=[*TPU, pytest.mark.slow]), *TOPOLOGIES[1:]]
)
def test_tempered_states_over_the_widest_head_compile(topology):
    """Float32 states, a bfloat16 head, and as many tokens as a tile takes."""
    shape = ("--shapes=2048,5120,151936,1", "--ops=linear_logprob")
    rows = compiled(topology, *shape, "--dtype=float32", "--head-dtype=bfloat16")
    assert set(rows) == {case for case in CASES if "linear_logprob" in case}


@pytest.mark.parametrize("case", CASES)
def test_the_portable_version_holds_no_logits_either(case):
    """The same size, compiled for this CPU."""
    row = compiled("cpu", "--implementation=xla")[case]
    assert row["share"] <= 0.05, f"{row['temp_bytes'] / 1e6:.0f} MB of temporaries"

"""The kernels and the engine through the real compilers, at the size of Qwen3-4B in bfloat16."""

import compilers
import pytest

TPU, GPU = (
    [pytest.mark.tpu_aot, compilers.needs_libtpu],
    [pytest.mark.gpu_aot, compilers.needs_cuda_plugin],
)
TOPOLOGIES = {"v5e:2x2": TPU, "h100:1": GPU, "v5p:2x2x1": TPU, "v6e:2x2": TPU}
SLOW = pytest.mark.slow
on_every_chip = pytest.mark.parametrize(
    "topology",
    [
        pytest.param(name, marks=marks if name in ("v5e:2x2", "h100:1") else [*marks, SLOW])
        for name, marks in TOPOLOGIES.items()
    ],
)


def rows_of(script: str, topology: str, *options: str) -> list[dict]:
    """What a script in tests/benchmarks/ says of its cases, in a process of its own."""
    command = [f"tests/benchmarks/{script}.py", f"--topologies={topology}", "--json", *options]
    return compilers.run_compiler(command)


def assert_no_logits(rows: list[dict], cases: int = 8) -> None:
    assert len(rows) == cases
    for row in rows:
        megabytes = row["temp_bytes"] / 1e6
        assert row["share"] <= 0.05, f"{row['case']}: {megabytes:.0f} MB of temporaries"


# Each op with all that it has, forward and backward; the slow part has their parts alone, too.
WHOLE = "exit_kl,head"


@pytest.mark.parametrize("ops", [WHOLE, pytest.param("", marks=SLOW)])
@on_every_chip
def test_vocabulary_ops_compile_and_hold_no_logits(topology, ops):
    rows = rows_of("compile_kernels", topology, f"--ops={ops}")
    assert_no_logits(rows, 3 if ops else 8)
    for row in rows:
        assert row["tiles"], f"no Pallas kernel was picked for {row['case']}"
        assert row.get("shared_bytes", 0) <= 232_448  # of a block on an H100


@SLOW
def test_the_portable_version_holds_no_logits_either():
    """The same size, compiled for this CPU."""
    assert_no_logits(rows_of("compile_kernels", "cpu", "--implementation=xla"))


@SLOW
@on_every_chip
def test_the_smallest_and_the_widest_model_compile(topology):
    for shape in ("300,96,151,5", "64,5120,152064,12"):
        assert (
            len(rows_of("compile_kernels", topology, f"--shapes={shape}", "--dtype=float32")) == 8
        )
    tempered = ("--shapes=2048,5120,151936,1", "--temperature=0.7")
    assert len(rows_of("compile_kernels", topology, *tempered, "--ops=linear_logprob")) == 3


@on_every_chip
def test_decode_attention_is_picked_and_copies_nothing(topology):
    """8 of 24 rows, 1,024 slots: less than a fiftieth of one layer's keys and values, of 36."""
    rows = rows_of("compile_decode_attention", topology, "--rows=24", "--tick-rows=8")
    by_name = {row["implementation"]: row for row in rows}
    kernel = "pallas_gpu" if topology.startswith("h100") else "pallas_tpu"
    for name in (None, kernel):
        assert by_name[name]["kernels"] == 1
        assert by_name[name]["of_layer"] < 0.05
    assert by_name["xla"]["kernels"] == 0


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


@SLOW
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        pytest.param("v5e:2x2", (4, 1), marks=TPU),
        pytest.param("v5e:2x2", (2, 2), marks=TPU),
        pytest.param("h100:1", (1, 1), marks=GPU),
    ],
)
def test_the_engine_copies_neither_cache_nor_weights(topology, mesh):
    """Temporaries of prefill and ticks under a tenth of what they are given."""
    code = ENGINE.format(topology=topology, mesh=mesh)
    reports = {row["found"][0]: row["found"][1:] for row in compilers.run_compiler(["-c", code])}
    temporaries, arguments = reports["evaluation decode (sample), a token"]
    assert arguments > 2 * 2**30 and temporaries < 0.1 * arguments

"""Flash attention through the real compilers, with the heads of Qwen3-4B at 4,096 positions."""

import functools

import aot
import pytest

COMMAND = "tests/benchmarks/compile_attention.py"
TPUS = [
    pytest.param(name, marks=[pytest.mark.tpu_aot, aot.needs_libtpu])
    for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
]


@functools.cache
def compiled(topology, *options):
    """Forward and backward of one layer's attention, in a process of their own."""
    (row,) = aot.run_compiler([COMMAND, f"--topologies={topology}", "--json", *options])
    return row


@pytest.mark.parametrize("topology", TPUS)
def test_splash_attention_holds_no_scores(topology):
    """Temporaries of at most three float32 arrays of the queries' size.

    One are the row statistics, which the kernel spreads over 128 lanes; half of one each, in
    bfloat16, are the queries by head, the output, its gradient and that to the queries. How much of
    them the compiler keeps in vector memory instead differs between chips and releases.
    """
    row = compiled(topology, "--attention=splash", "--lengths=4096")
    assert row["kernels"] == 3, "forward, gradient to the queries, gradient to keys and values"
    assert not row["holds_scores"], f"the program holds an array [{row['largest']}]"
    assert row["of_queries"] < 3, f"{row['temp_bytes'] / 1e6:.0f} MB of temporaries"


@pytest.mark.tpu_aot
@aot.needs_libtpu
def test_plain_attention_holds_the_scores_that_the_test_looks_for():
    row = compiled("v5e:2x2", "--attention=xla", "--lengths=1024")
    assert row["holds_scores"] and row["share"] >= 1.0 and row["kernels"] == 0


@pytest.mark.tpu_aot
@aot.needs_libtpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--shape=2,4,4,24", "--lengths=96"), id="the tiny preset"),
        pytest.param(("--shape=2,14,2,64", "--lengths=1152"), id="qwen2.5-0.5b, padding left"),
        pytest.param(("--shape=1,8,2,128", "--lengths=1400", "--dtype=float32"), id="float32"),
    ],
)
def test_other_heads_and_lengths_compile(options):
    row = compiled("v5e:2x2", "--attention=splash", "--padding=left", *options)
    assert row["kernels"] == 3


@pytest.mark.gpu_aot
@aot.needs_cuda_plugin
@pytest.mark.parametrize("padding", ["right", "left"])
def test_cudnn_is_called_and_nothing_holds_scores(padding):
    """As far as one gets without a GPU: XLA emits the two calls and plans their memory.

    Which of cuDNN's kernels serves a call, cuDNN decides on the chip when the program is loaded;
    that it has one for these shapes cannot be shown here. Padding on the left costs a mask.
    """
    row = compiled("h100:1", "--attention=cudnn", "--lengths=4096", f"--padding={padding}")
    assert row["kernels"] == 2, "forward and backward"
    assert not row["holds_scores"], f"the program holds an array [{row['largest']}]"
    assert row["share"] < 0.08, f"{row['temp_bytes'] / 1e6:.0f} MB of temporaries"


@pytest.mark.parametrize(
    ("topology", "attention", "sentence"),
    [
        pytest.param(*case, marks=marks)
        for *case, marks in [
            ("v5e:2x2", "cudnn", "needs a GPU, found tpu", [pytest.mark.tpu_aot, aot.needs_libtpu]),
            (
                "h100:1",
                "splash",
                "needs a TPU, found gpu",
                [pytest.mark.gpu_aot, aot.needs_cuda_plugin],
            ),
        ]
    ],
)
def test_preflight_refuses_what_the_topology_cannot_run(topology, attention, sentence):
    code = f"""
import json
from jexit.aot.preflight import preflight
from jexit.config import Config
from configs.sft import get_config
config = get_config()
config.model.attention = {attention!r}
try:
    preflight(Config.from_dict(config), {topology!r})
except ValueError as error:
    print(json.dumps(str(error)).join(('{{"error": ', '}}')))
"""
    (row,) = aot.run_compiler(["-c", code])
    assert f"config.model.attention={attention} {sentence}; set " in row["error"]

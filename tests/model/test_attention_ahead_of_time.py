"""Flash attention through the real compilers, with the heads of Qwen3-4B at 4,096 positions."""

import compilers
import pytest


def compiled(topology, *options):
    """Forward and backward of one layer's attention, in a process of their own."""
    command = ["tests/benchmarks/compile_attention.py", f"--topologies={topology}", "--json"]
    (row,) = compilers.run_compiler([*command, *options])
    return row


@pytest.mark.slow
@pytest.mark.tpu_aot
@compilers.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
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
    plain = compiled(topology, "--attention=xla", "--lengths=1024")
    assert plain["holds_scores"] and plain["share"] >= 1.0 and plain["kernels"] == 0


@pytest.mark.slow
@pytest.mark.tpu_aot
@compilers.needs_libtpu
def test_other_heads_and_lengths_compile():
    for options in (
        ("--shape=2,4,4,24", "--lengths=96"),  # the tiny preset
        ("--shape=2,14,2,64", "--lengths=1152"),  # qwen2.5-0.5b
        ("--shape=1,8,2,128", "--lengths=1400", "--dtype=float32"),
    ):
        row = compiled("v5e:2x2", "--attention=splash", *options)
        assert row["kernels"] == 3


@pytest.mark.gpu_aot
@compilers.needs_cuda_plugin
def test_cudnn_is_called_and_nothing_holds_scores():
    """As far as one gets without a GPU: XLA emits the two calls and plans their memory.

    Which of cuDNN's kernels serves a call, cuDNN decides on the chip when the program is loaded;
    that it has one for these shapes cannot be shown here.
    """
    row = compiled("h100:1", "--attention=cudnn", "--lengths=4096")
    assert row["kernels"] == 2, "forward and backward"
    assert not row["holds_scores"], f"the program holds an array [{row['largest']}]"
    assert row["share"] < 0.08, f"{row['temp_bytes'] / 1e6:.0f} MB of temporaries"


PREFLIGHT = """
import json
from jexit.aot.preflight import preflight
from jexit.config import Config
from configs.sft import get_config
for attention, topology in (("cudnn", "v5e:2x2"), ("splash", "h100:1")):
    config = get_config()
    config.model.attention = attention
    try:
        preflight(Config.from_dict(config), topology)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""


@pytest.mark.tpu_aot
@pytest.mark.gpu_aot
@compilers.needs_libtpu
@compilers.needs_cuda_plugin
def test_preflight_refuses_what_the_topology_cannot_run():
    on_tpu, on_gpu = (row["error"] for row in compilers.run_compiler(["-c", PREFLIGHT]))
    assert "config.model.attention=cudnn needs a GPU, but the platform is tpu; set " in on_tpu
    assert "config.model.attention=splash needs a TPU, but the platform is gpu; set " in on_gpu

"""`--aot`: what it says about every command's steps, and when it says no."""

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys

import compilers
import jax
import pytest

from jexit.aot import preflight as preflight_module
from jexit.aot.preflight import DoesNotFit, preflight
from jexit.aot.program import device_bytes
from jexit.aot.programs import architecture, programs
from jexit.aot.topologies import Topology, get_topology
from jexit.config import Config, config_dict
from jexit.dist import make_mesh
from jexit.errors import UserError
from jexit.kernels.chips import CHIPS, Chip


def config_of(command: str, **settings) -> Config:
    """The tiny preset, its lengths cut so that a CPU compiles a step in seconds."""
    small = {
        "exits.layers": (2, 4),
        "lora.targets": ("q", "v"),
        "batch_size": 8,
        "task.max_prompt_tokens": 16,
        "sft.max_new_tokens": 16,
        "sft.generate_batch": 8,
        "sft.samples": 2,
        "rl.rollouts": 2,
        "rl.max_new_tokens": 16,
        "eval.max_new_tokens": 16,
        "eval.policies": ("full", "threshold:0.3", "threshold:0.5"),
        "eval.measures": ("exits", "hazards", "planning", "necessity"),
    }
    if command == "sft":
        small |= {"exits.continuation": "linear", "sft.lens_steps": 2, "sft.lens_tokens": 64}
    config = config_dict(command)
    with config.unlocked():
        config.update_from_flattened_dict(
            small | {key.replace("__", "."): value for key, value in settings.items()}
        )
    return Config.from_dict(config)


@pytest.fixture
def eight_cpus(monkeypatch):
    """This process's CPU devices in a chip's place: the same path without its compiler."""
    monkeypatch.setitem(CHIPS, "cpu", Chip(4.0))
    monkeypatch.setattr(
        preflight_module, "get_topology", lambda name: Topology(name, "cpu", jax.devices()[:8])
    )


STEPS = {
    "pretrain": ["pretraining step"],
    "finetune": [
        "fine-tuning step",
        "evaluation weights, gathered over fsdp",
        "evaluation prefill",
        "evaluation decode (full), a token",
    ],
    "sft": [
        "teacher weights, gathered over fsdp",
        "teacher prefill",
        "teacher decode, a token",
        "fit of the continuation",
        "calibration step",
        "states at the exits",
        "calibration step of the heads",
        "evaluation prefill",
        "evaluation decode (sample), a token",
    ],
    "rl": [
        "rollout weights, gathered over fsdp",
        "rollout prefill",
        "rollout decode, a token",
        "RL update",
        "evaluation prefill",
        "evaluation decode (sample), a token",
    ],
    "eval": [
        "evaluation prefill",
        "evaluation decode (full), a token",
        "evaluation decode (threshold), a token",
        "likelihoods of answers (sample)",
        "residuals for probes",
        "exits against the last layer",
        "hazards and their targets",
    ],
    "generate": [
        "generation prefill",
        "generation decode (sample), a token",
        "generation cache, 256 → 320 slots",
    ],
}


def test_every_jitted_step_of_a_command_can_be_lowered():
    """Whatever `--aot` compiles is what the runs call: a step whose arguments changed fails here.

    The sampler and the trainer multiply with the head at one precision, float32 as such:
    accelerators would otherwise round it, and rounding one alone is a gap.
    """
    sampled = [step.replace("(full)", "(sample)") for step in STEPS["finetune"]]
    cases = [(command, steps, {}) for command, steps in STEPS.items()]
    for command, steps, settings in (
        *cases, ("finetune", sampled, {"finetune__policy": "sample"})
    ):  # fmt: skip
        # No length is that of the vocabulary.
        settings |= {"task__max_prompt_tokens": 40, "model__dtype": "float32"}
        config = config_of(command, **settings)
        vocabulary = architecture(config).vocab_size
        sizes = (2, 1, 4) if command in ("eval", "generate") else (1, 8, 1)
        found = list(programs(config, make_mesh(*sizes)))
        assert [program.name for program in found] == steps
        with_head = set()
        for program in found:
            assert device_bytes(program.inputs) > 0
            text = program.lower().as_text()
            if program.name == "calibration step of the heads":
                continue  # has no logits, but hidden layers as wide as the vocabulary
            for line in re.findall(r"stablehlo\.dot_general .*", text):
                if re.search(rf"[<x]{vocabulary}x", line):
                    with_head.add(program.name)
                    assert "precision = [HIGHEST, HIGHEST]" in line, (program.name, line)
        assert with_head, f"no step of {command} computes logits"


def test_weights_that_train_are_of_a_type_that_keeps_small_updates():
    """1e-5 of a weight is less than bfloat16 tells apart."""
    for command in ("finetune", "sft", "rl", "eval"):
        for rank in (0, 4):
            config = config_of(command, lora__rank=rank)
            full = rank == 0 and command != "eval"
            (step, *_) = programs(config, make_mesh(1, 8, 1))
            found = {str(leaf.dtype) for leaf in jax.tree.leaves(step.inputs)}
            assert ("bfloat16" in found) != full, (command, rank)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in STEPS if command != "pretrain"])
def test_every_jitted_step_of_a_command_has_its_row(command, eight_cpus, capsys):
    reports = preflight(config_of(command), "cpu:8")
    assert [report.step for report in reports] == STEPS[command]
    for report in reports:
        assert report.arguments > 0 and report.peak >= report.arguments + report.resident
        assert report.cost.flops > 0 or "cache" in report.step or "weights" in report.step
    out = capsys.readouterr().out
    if command == "sft":
        assert "teacher scoring (final distribution, exits' KL) is part of the calibration" in out
    if command == "rl":
        assert "teacher scoring (log-probabilities of the rollouts' tokens) is part of" in out
    assert "loops of unknown length count once: jit(advance)" in out


def test_the_row_of_pretraining_has_the_flops_of_its_products(eight_cpus, capsys):
    """Forward and twice that backward, over 8 devices, with whole attention squares."""
    config = config_of("pretrain", mesh__fsdp=8)
    (report,) = preflight(config, "cpu:8")
    assert report.step == "pretraining step" and report.seconds > 0
    assert report.arguments > 0 and report.peak >= report.arguments + report.resident
    p, rows, length = config.pretrain, config.batch_size, config.pretrain.length - 1
    width, inner = p.width, p.query_heads * p.head_dim
    assert p.kv_heads == p.query_heads
    layer = 4 * width * inner + 3 * width * p.mlp_width + 2 * length * inner
    head = 512 * width
    products = 2 * rows * length * (p.layers * layer)
    # The head's chunked op computes the logits again for the gradients: once more than thrice.
    expected = (3 * products + 4 * 2 * rows * length * head) / 8
    assert report.cost.flops == pytest.approx(expected, rel=0.03)
    out = capsys.readouterr().out
    assert all(name in out for name in ("arguments", "temporaries", "peak", "TFLOP", "compile"))


def test_rows_divide_over_the_mesh_that_is_filled_in():
    topology = Topology("cpu:8", "cpu", jax.devices()[:8])
    generation = config_of("generate", generate__prompts=("a", "b"))
    for config, said in (
        (generation, "--config.mesh.data=2 --config.mesh.tensor=4"),
        (config_of("pretrain", batch_size=2), "--config.mesh.fsdp=2 --config.mesh.tensor=4 (fsdp"),
        (
            config_of("sft", batch_size=16, sft__completions=4),
            "--config.mesh.fsdp=4 --config.mesh.tensor=2 (fsdp divides the 4 rows",
        ),
    ):
        filled, (note,) = preflight_module._on_mesh(config, topology)
        assert math.prod(dataclasses.astuple(filled.mesh)) == 8
        assert f"to use it in a run, set {said}" in note
    with pytest.raises(UserError, match=r"fsdp=3 × tensor=1\), but cpu:8 has 8 devices; choose"):
        preflight_module._on_mesh(config_of("eval", mesh__fsdp=3), topology)


def test_what_does_not_fit_names_the_step_and_what_in_it(eight_cpus, monkeypatch, capsys):
    monkeypatch.setitem(CHIPS, "cpu", Chip(0.001))
    with pytest.raises(DoesNotFit) as refused:
        preflight(config_of("pretrain"), "cpu:8")
    said = str(refused.value)
    assert "but each cpu:8 device has 0.00 GiB; its temporaries take" in said
    assert "the largest arrays are " in said and "jit(" in said and "f32[" in said
    assert said.startswith("pretraining step needs") and "config.optim.accumulate" in said
    assert "arguments" in capsys.readouterr().out  # the table comes first


@pytest.mark.slow
def test_parameters_that_do_not_fit_are_named(eight_cpus, monkeypatch):
    """Full fine-tuning: weights, moments and the teacher's copy, of which decoding takes one."""
    monkeypatch.setitem(CHIPS, "cpu", Chip(0.0001))
    config = config_of("sft", lora__rank=0, sft__target="teacher", model__dtype="float32")
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, generate_batch=1))
    decoding = preflight_module.programs
    monkeypatch.setattr(
        preflight_module, "programs", lambda *args: itertools.islice(decoding(*args), 3)
    )
    reports = []
    monkeypatch.setattr(preflight_module, "_print", lambda *args: reports.extend(args[4]))
    with pytest.raises(DoesNotFit):
        preflight(config, "cpu:8")
    gathered, prefill, decode = reports
    assert gathered.arguments > 0
    # The student, two moments of every weight, and the teacher's copy as the rules divide it.
    assert prefill.resident > 3.9 * gathered.arguments
    assert decode.held > decode.made
    assert "blocks.mlp.up.kernel" in " ".join(decode.largest)
    sentence = preflight_module._refusal(decode, Topology("cpu:8", "cpu", jax.devices()), 2**10)
    assert "its arguments take" in sentence and "config.mesh.fsdp or config.mesh.tensor" in sentence


def test_what_the_compiler_refuses_is_a_row_and_a_sentence(eight_cpus, monkeypatch, capsys):
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (54.38G) exceeds available HBM (15.75G).\nmore"
    )

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(DoesNotFit) as refused:
        preflight(config_of("pretrain"), "cpu:8")
    assert "refused" in capsys.readouterr().out
    sentence = str(refused.value)
    needed = float(re.match(r"pretraining step needs ([\d.]+) GiB per device, but", sentence)[1])
    assert 54.38 <= needed < 54.51  # with what it is given
    assert "exceeds available HBM (15.75G).); its temporaries take 54.38" in sentence
    assert "over 8 devices" in sentence


def test_a_topology_that_there_is_not_is_one_sentence():
    with pytest.raises(UserError, match="slice v5e:64x64 has an axis of more than 16 chips"):
        get_topology("v5e:64x64")
    for name in ("v9:2x2", "v5e:2x2x2", "h100", "h100:0", "v5p:4x4"):
        with pytest.raises(UserError, match="is not known; use one like"):
            get_topology(name)


SLICES = """
import json
from jexit.aot.topologies import get_topology
from jexit.dist import make_mesh
for name in ("v5e:1x1", "v6e:2x4", "v4:2x2x1"):
    print(json.dumps({"found": [name, len(get_topology(name).devices)]}))
assert make_mesh(1, 4, 1, devices=get_topology("v4:2x2x1").devices).size == 4
try:
    get_topology("v5e:3x5")
except ValueError as error:
    print(json.dumps({"found": str(error)}))
"""


@pytest.mark.tpu_aot
@compilers.needs_libtpu
def test_a_slice_has_a_device_a_chip_and_one_that_there_is_not_is_one_sentence():
    *found, error = (line["found"] for line in compilers.run_compiler(["-c", SLICES]))
    assert found == [["v5e:1x1", 1], ["v6e:2x4", 8], ["v4:2x2x1", 4]]
    assert error.startswith("libtpu has no slice v5e:3x5 (") and error.endswith("such as 2x2")


def run(argv: list[str], before: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, with libtpu."""
    code = f"import sys; from jexit import main; sys.argv = {argv!r}; {before}"
    code += "sys.exit(main.main(sys.argv))"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_LIBRARY_PATH": str(compilers.LIBTPU)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=compilers.ROOT, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


SHORT = [
    "--config.batch_size=4",
    "--config.task.max_prompt_tokens=16",
    "--config.eval.max_new_tokens=16",
    "--config.rl.rollouts=2",
    "--config.rl.max_new_tokens=16",
    "--config.sft.max_new_tokens=16",
    "--config.sft.generate_batch=4",
]


@pytest.mark.tpu_aot
@compilers.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "rl"])
def test_every_step_of_a_stage_is_compiled_for_a_tpu(command):
    exits = ["--config.exits.continuation=linear", "--config.sft.lens_steps=2"]
    asked = [*SHORT, *(exits if command == "sft" else [])]
    done = run(["jexit", f"--config=configs/{command}.py", "--aot=v5e:2x2", *asked])
    assert done.returncode == 0, done.stderr[-2000:]
    for step in STEPS[command]:
        assert step in done.stdout
    assert "fsdp 4" in done.stdout and "all-gather" in done.stdout
    # XLA says no trip counts for TPUs; the layers' loops are counted all the same.
    for step in ("teacher prefill: loops", "calibration step: loops", "RL update: loops"):
        assert step not in done.stdout


@pytest.mark.tpu_aot
@compilers.needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_a_tpu_ends_the_command_with_one_sentence():
    small = "from jexit.kernels import chips; chips.CHIPS['v5 lite'] = chips.Chip(0.0001); "
    done = run(["jexit", "--config=configs/generate.py", "--aot=v5e:2x2"], small)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jexit: generation ") and "but each v5e:2x2 device has" in last
    assert "the largest arrays are bf16[" in last or "the largest arrays are f32[" in last

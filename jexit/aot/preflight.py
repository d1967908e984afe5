"""Every jitted step of a config, compiled for devices that are not there, and what it needs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from jexit.aot.topologies import Topology, get_topology
from jexit.config import Config, check_exits
from jexit.dist import make_mesh
from jexit.dist.rules import names_of, parameter_axes, spec
from jexit.io.model_source import open_model
from jexit.loops.setup import adapter_settings, execution_of, head_settings
from jexit.model.cache import cache_bucket, prompt_bucket
from jexit.model.policies import Full, Sample
from jexit.model.transformer import Transformer
from jexit.presets import PRESETS, Architecture
from jexit.rollout import decode
from jexit.rollout.sampling import Sampling
from jexit.steps.completions import Completions, bucket_length
from jexit.steps.optim import make_optimizer
from jexit.steps.rl import Prices, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import SplitModel, new_state, parameter_labels, split_model

# HBM of one device in GiB, by the beginning of a topology's name. Public figures.
CAPACITY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "v7x": 192, "h100": 79.1}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


class DoesNotFit(RuntimeError):
    """A step needs more memory than the chip has; the message names what takes most of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One step on one device: bytes, FLOPs and collectives of a call."""

    step: str
    arguments: int
    temporaries: int
    peak: int  # arguments, temporaries and outputs that share no memory with arguments
    flops: float
    collectives: dict[str, tuple[int, int]]  # kind → (how many, bytes they produce), loops once
    seconds: float  # to compile


def preflight(config: Config, topology_name: str) -> list[Report]:
    """Compiles the config's steps for a topology and prints a table.

    Raises ValueError for a topology or a mesh that does not exist, DoesNotFit when a step's peak
    is beyond the chip's memory.
    """
    topology = get_topology(topology_name)
    mesh = _mesh(config, topology)
    capacity = CAPACITY_GIB[topology_name.partition(":")[0]] * 2**30
    reports = []
    with topology.compiling(), jax.set_mesh(mesh):
        for name, lower in _steps(config, mesh):
            begin = time.perf_counter()
            reports.append(_report(name, lower(), begin))
    _print(config, topology, mesh, capacity, reports)
    worst = max(reports, key=lambda report: report.peak)
    if worst.peak > capacity:
        part = "temporaries" if worst.temporaries > worst.arguments else "arguments"
        remedy = (
            "raise config.optim.accumulate, or set config.model.remat=block"
            if part == "temporaries"
            else "divide the parameters over more devices with config.mesh.fsdp or tensor"
        )
        raise DoesNotFit(
            f"{worst.step} needs {_gib(worst.peak)} GiB on {topology_name}, whose devices have "
            f"{_gib(capacity)}; its {part} take {_gib(getattr(worst, part))}: {remedy}"
        )
    return reports


def _mesh(config: Config, topology: Topology) -> Mesh:
    """The config's mesh; one that was left at 1 × 1 × 1 is taken as `fsdp` over all devices."""
    sizes = dataclasses.astuple(config.mesh)
    if math.prod(sizes) == 1:
        sizes = (1, len(topology.devices), 1)
    if math.prod(sizes) != len(topology.devices):
        raise ValueError(
            f"config.mesh asks for {math.prod(sizes)} devices and {topology.name} has "
            f"{len(topology.devices)}; make the product of data, fsdp and tensor equal"
        )
    return make_mesh(*sizes, devices=topology.devices)


def _architecture(config: Config) -> Architecture:
    """Of the preset; the shipped model's comes from its files, which are always there."""
    if config.preset in PRESETS:
        return PRESETS[config.preset].architecture
    return open_model(config.model.path).architecture


def _abstract_model(config: Config) -> Transformer:
    """The config's model without values; the base weights as an accelerator would hold them."""
    arch = _architecture(config)
    dtype = jnp.bfloat16 if config.model.dtype == "auto" else jnp.dtype(config.model.dtype)

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=check_exits(config.exits.layers, arch.layers),
            exit_head=head_settings(config),
            lora=adapter_settings(config),
            dtype=dtype,
            execution=execution_of(config),
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(build)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that the rules give parameters, moments and counters."""

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        axes = parameter_axes(names_of(path), leaf.ndim)
        sharding = NamedSharding(mesh, spec(axes, leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with rows on its first axis, spread over the data axes."""
    sharding = NamedSharding(mesh, spec("B" + "." * (len(shape) - 1), shape))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _steps(config: Config, mesh: Mesh) -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
    """Name and compilation of every jitted step that the command runs."""
    if config.command not in ("sft", "rl", "eval", "generate"):
        raise ValueError(
            f"--aot compiles sft, rl, eval and generate, not {config.command}; give such a config"
        )
    model = _abstract_model(config)
    full = config.lora.rank == 0
    split = jax.tree.map(lambda leaf: leaf, split_model(model, full=full))
    split = SplitModel(split.graphdef, _placed(split.trainable, mesh), _placed(split.fixed, mesh))
    prompt = prompt_bucket(config.task.max_prompt_tokens)
    if config.command in ("sft", "rl"):
        yield from _training(config, mesh, model, split, prompt)
    section = {"sft": config.sft, "rl": config.rl}.get(config.command, config.eval)
    new = section.max_new_tokens
    if config.command == "rl":
        name, prompts, samples, policy = "rollout", config.batch_size, config.rl.rollouts, Sample()
    elif config.command == "sft":
        name, prompts, samples, policy = "teacher", config.sft.generate_batch, 1, Full()
    else:
        name, prompts, samples, policy = "eval", config.eval.batch_size, 1, Sample()
    yield from _decoding(
        config, mesh, split, name, prompts, samples, prompt, new, policy, name != "teacher"
    )


def _training(
    config: Config, mesh: Mesh, model: Transformer, split: SplitModel, prompt: int
) -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
    optimizer = make_optimizer(
        config.optim, config.steps, parameter_labels(model, full=config.lora.rank == 0)
    )
    state = _placed(jax.eval_shape(lambda: new_state(_zeros(split.trainable), optimizer)), mesh)
    section = config.rl if config.command == "rl" else config.sft
    rows = config.batch_size * (config.rl.rollouts if config.command == "rl" else 1)
    total = bucket_length(prompt + section.max_new_tokens)
    width = bucket_length(section.max_new_tokens)
    batch: Any = Completions(
        _rows(mesh, rows, total),
        _rows(mesh, rows),
        _rows(mesh, rows, width),
        _rows(mesh, rows),
    )
    extra: tuple[Any, ...] = ()
    if config.command == "sft":
        step = make_sft_step(split, optimizer, config.sft, micro_batches=config.optim.accumulate)
    else:
        step = make_rl_step(split, optimizer, config.rl, micro_batches=config.optim.accumulate)
        floats = _rows(mesh, rows, width, dtype=jnp.float32)
        batch = RLBatch(
            batch,
            _rows(mesh, rows, width),
            floats,
            floats,
            _rows(mesh, rows, dtype=jnp.float32),
            _rows(mesh, rows, dtype=jnp.bool),
        )
        extra = (Prices(0.5, 0.0),)
    name = "calibration step" if config.command == "sft" else "RL update"
    key = jax.eval_shape(lambda: jax.random.key(0))
    yield name, lambda: step.lower(state, split.fixed, batch, *extra, key).compile()


def _decoding(
    config: Config,
    mesh: Mesh,
    split: SplitModel,
    name: str,
    prompts: int,
    samples: int,
    prompt: int,
    new: int,
    policy: Any,
    adapters: bool,
) -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
    """Prefill, and the loop over tokens with the largest cache that it may come to."""
    sampling = Sampling.of(1.0, 1.0)
    states = (split.trainable, split.fixed.frozen)
    slots = cache_bucket(prompt + new - 1, prompt + new - 1)
    options = {"adapters": adapters, "hazards": False}
    arguments = (
        split.graphdef,
        states,
        _rows(mesh, prompts, prompt),
        _rows(mesh, prompts),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
        np.int32(0),
        sampling,
    )
    static = {"samples": samples, "slots": slots, "max_new_tokens": new}
    made: dict[str, Any] = {}

    def prefill() -> jax.stages.Compiled:
        lowered = decode.prefill.lower(*arguments, **static, **options)
        compiled = lowered.compile()
        made["out"] = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            lowered.out_info,
            compiled.output_shardings,
        )
        return compiled

    def tokens() -> jax.stages.Compiled:
        rows, state = made["out"]
        lowered = decode.decode.lower(
            split.graphdef, states, rows, state, policy, sampling, **options
        )
        return lowered.compile()

    yield f"{name} prefill", prefill
    yield f"{name} decode", tokens


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _report(step: str, compiled: jax.stages.Compiled, begin: float) -> Report:
    memory = compiled.memory_analysis()
    shared = memory.alias_size_in_bytes
    cost = compiled.cost_analysis() or {}
    return Report(
        step=step,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - shared,
        flops=float(cost.get("flops", 0.0)),
        collectives=collectives(compiled.as_text()),
        seconds=time.perf_counter() - begin,
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kinds of collectives in a compiled module: how many, and the bytes they produce."""
    found: dict[str, tuple[int, int]] = {}
    kinds = "|".join(COLLECTIVES)
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        sizes = [
            _BYTES.get(dtype, 4) * math.prod(int(size) for size in dims.split(",") if size)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + sum(sizes))
    return found


def _print(
    config: Config, topology: Topology, mesh: Mesh, capacity: float, reports: list[Report]
) -> None:
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    table = Table(
        title=f"{config.command} {config.preset} on {topology.name} ({topology.device_kind}), "
        f"{sizes}; GiB and TFLOP a device",
        title_justify="left",
    )
    for column in ("step", "arguments", "temporaries", "peak", "of memory", "TFLOP", "compile s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    table.add_column("collectives (count, MiB; loops once)")
    for report in reports:
        kinds = ", ".join(
            f"{kind} {count}, {size / 2**20:.0f}"
            for kind, (count, size) in report.collectives.items()
        )
        table.add_row(
            report.step,
            _gib(report.arguments),
            _gib(report.temporaries),
            _gib(report.peak),
            f"{report.peak / capacity:.0%}",
            f"{report.flops / 1e12:.2f}",
            f"{report.seconds:.1f}",
            kinds,
        )
    Console(width=160).print(table)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"

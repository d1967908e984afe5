"""Compiles every jitted step of a config for absent devices, and reports memory and FLOPs."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jexit.aot.cost import Cost, cost_of, largest_arrays
from jexit.aot.hlo import Array, parse
from jexit.aot.program import Program, device_bytes, on_devices
from jexit.aot.programs import architecture, exit_share, programs
from jexit.aot.topologies import Topology, get_topology
from jexit.config import Config
from jexit.dist import make_mesh
from jexit.dist.rules import names_of
from jexit.errors import RunEnded, UserError
from jexit.kernels.chips import chip

_LARGEST = 3  # arrays that the message names for a step that does not fit


class DoesNotFit(RunEnded):
    """Raised if a step needs more than the chip's memory; the message names the largest arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The memory in bytes, FLOPs, collectives and compile time of one step on one device."""

    step: str
    arguments: int
    resident: int  # the run's state that is not an argument of this step
    temporaries: int | None
    outputs: int = 0  # outputs that do not share memory with arguments
    cost: Cost | None = None
    seconds: float  # to compile
    largest: list[str] = dataclasses.field(default_factory=list)  # arrays, with their origins
    refused: str = ""  # the compiler's message if it refused the step

    @property
    def held(self) -> int:
        return self.arguments + self.resident

    @property
    def made(self) -> int:
        return (self.temporaries or 0) + self.outputs

    @property
    def peak(self) -> int:
        return self.held + self.made


def preflight(config: Config, topology_name: str) -> list[Report]:
    """Compiles the jitted steps of `config` for a topology; prints a table and returns its rows.

    `topology_name` names absent devices, such as `v5e:4x4`. Raises UserError if the topology does
    not exist or if the config cannot be divided over the devices, and DoesNotFit if a step needs
    more than the memory of a chip.
    """
    topology = get_topology(topology_name)
    config, notes = _on_mesh(config, topology)
    mesh = make_mesh(*dataclasses.astuple(config.mesh), devices=topology.devices)
    capacity = chip(topology.device_kind).memory_gib * 2**30
    reports, share = [], exit_share(config)
    with topology.compiling(), jax.set_mesh(mesh):
        for program in programs(config, mesh):
            reports.append(_compile(program, mesh, share))
            if program.note:
                notes.append(program.note)
    _print(config, topology, mesh, capacity, reports, notes)
    refused = [report for report in reports if report.refused]
    worst = max(refused or reports, key=lambda report: report.peak)
    if refused or worst.peak > capacity:
        raise DoesNotFit(_refusal(worst, topology, capacity))
    return reports


def _on_mesh(config: Config, topology: Topology) -> tuple[Config, list[str]]:
    """Returns the config with a mesh of all devices of the topology, and notes on it to print.

    If the config's mesh is 1 × 1 × 1, the mesh is chosen here. For training, `fsdp` is the greatest
    common divisor of the number of devices and the rows of a micro-batch, and `tensor` takes the
    rest. For decoding alone, `tensor` is the greatest common divisor of the number of devices and
    the number of query heads, and `data` takes the rest; `fsdp` stays 1, because decoding would
    have to gather weights sharded over it. Raises UserError if the config sets a mesh with another
    number of devices.
    """
    count, mesh = len(topology.devices), config.mesh
    requested = math.prod(dataclasses.astuple(mesh))
    if requested != 1 or count == 1:
        if requested != count:
            raise UserError(
                f"config.mesh requests {requested} devices "
                f"(data={mesh.data} × fsdp={mesh.fsdp} × tensor={mesh.tensor}), but "
                f"{topology.name} has {count} devices; choose sizes whose product is {count}"
            )
        return config, []
    if config.command in ("eval", "generate"):
        tensor = math.gcd(architecture(config).query_heads, count)
        mesh, why = dataclasses.replace(mesh, data=count // tensor, tensor=tensor), ""
    else:
        rows = config.micro_batch_rows
        fsdp = math.gcd(rows, count)
        mesh = dataclasses.replace(mesh, fsdp=fsdp, tensor=count // fsdp)
        why = f" (fsdp divides the {rows} rows of a micro-batch)" if mesh.tensor > 1 else ""
    config = dataclasses.replace(config, mesh=mesh)
    config.validate()
    sizes = dataclasses.asdict(mesh).items()
    said = " ".join(f"--config.mesh.{name}={size}" for name, size in sizes if size > 1)
    return config, [
        f"config.mesh is 1 × 1 × 1, so preflight chose a mesh; to use it in a run, set {said}{why}"
    ]


def _compile(program: Program, mesh: Mesh, exit_share: float) -> Report:
    # If the compiler crashes, this process ends with it, and this line names the step.
    print(f"compiling {program.name}", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(program, lowered, mesh, str(error), time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory, module = compiled.memory_analysis(), parse(compiled.as_text())
    report = Report(
        step=program.name,
        arguments=memory.argument_size_in_bytes,
        resident=_resident(program, memory.argument_size_in_bytes),
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost=cost_of(module, branch_share=exit_share, loops=program.loops),
        seconds=seconds,
    )
    if report.held > report.made:
        return dataclasses.replace(report, largest=_largest_inputs(program))
    largest = [_named(*pair) for pair in largest_arrays(module, _LARGEST)]
    return dataclasses.replace(report, largest=largest)


def _resident(program: Program, arguments: int) -> int:
    """Returns the bytes of the run's state on one device, without the step's `arguments` bytes."""
    together = {id(leaf): leaf for _, leaf in on_devices((program.inputs, program.resident))}
    return max(0, device_bytes(list(together.values())) - arguments)


def _refused(
    program: Program, lowered: jax.stages.Lowered, mesh: Mesh, error: str, seconds: float
) -> Report:
    """Returns the report of a step that does not fit, from the compiler's message `error`."""
    arguments = device_bytes(program.inputs)
    used = [
        float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
        for number, unit in re.findall(r"(?:Used |temporaries \()([\d.]+)([KMGT])", error)
    ]
    temporaries = int(used[0]) if used else None
    if "Used" in error and temporaries is not None:  # with the arguments
        temporaries = max(0, temporaries - arguments)
    report = Report(
        step=program.name,
        arguments=arguments,
        resident=_resident(program, arguments),
        temporaries=temporaries,
        seconds=seconds,
        refused=error.strip().splitlines()[0],
    )
    if report.held > report.made:
        return dataclasses.replace(report, largest=_largest_inputs(program))
    # The lowered program is not partitioned yet, so these sizes are totals over all devices.
    largest = [f"{array} over {mesh.size} devices" for array in _largest_types(program, lowered)]
    return dataclasses.replace(report, largest=largest)


def _largest_inputs(program: Program) -> list[str]:
    """Returns the largest arrays on the devices before the step, each as a text with its name.

    Shapes and sizes are those on one device.
    """
    sized = {}
    for path, leaf in reversed(on_devices((program.inputs, program.resident))):
        names = [name for name in names_of(path) if name not in _UNSAID and name[0] != "["]
        sized[id(leaf)] = _array(leaf, leaf.sharding.shard_shape(leaf.shape)), ".".join(names)
    largest = sorted(sized.values(), key=lambda pair: -pair[0].bytes)[:_LARGEST]
    return [_named(*pair) for pair in largest]


_UNSAID = ("states", "fixed", "state")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "bool": "pred", "float16": "f16"}
_STABLEHLO = {"i1": "pred", "i8": "s8", "i32": "s32", "ui32": "u32", "i64": "s64"}


def _array(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Array:
    return Array(_SHORT.get(leaf.dtype.name, leaf.dtype.name), tuple(shape))


def _largest_types(program: Program, lowered: jax.stages.Lowered) -> list[Array]:
    """Returns the largest arrays that a step makes, with their shapes before partitioning.

    Arrays of the type and shape of an argument are left out.
    """
    found = {
        Array(_STABLEHLO.get(dtype, dtype), tuple(map(int, dims.split("x")[:-1])))
        for dims, dtype in re.findall(r"tensor<((?:\d+x)+)(\w+)>", lowered.as_text())
    }
    found -= {_array(leaf, leaf.shape) for _, leaf in on_devices(program.inputs)}
    return sorted(found, key=lambda array: -array.bytes)[:_LARGEST]


def _named(array: Array, name: str) -> str:
    return f"{array} ({_gib(array.bytes)} GiB) {name}"


def _refusal(worst: Report, topology: Topology, capacity: float) -> str:
    """Returns the error message for the step `worst`, which does not fit in `capacity` bytes."""
    part, size = "temporaries", worst.made
    if worst.held > worst.made:
        part, size = "arguments", worst.held
        remedy = (
            "divide the parameters over more devices with config.mesh.fsdp or config.mesh.tensor, "
            "or choose a larger topology"
        )
    elif "step" in worst.step or "update" in worst.step:
        remedy = (
            "raise config.optim.accumulate, set config.model.remat=block, or divide over more "
            "devices"
        )
    else:
        remedy = (
            "decode fewer prompts at once (config.batch_size, config.sft.generate_batch or "
            "config.engine.rows), lower max_new_tokens, or divide over more devices"
        )
    said = f" (compiler: {worst.refused})" if worst.refused else ""
    return (
        f"{worst.step} needs {_gib(worst.peak)} GiB per device, but each {topology.name} device "
        f"has {_gib(capacity)} GiB{said}; its {part} take {_gib(size)} GiB, and the largest arrays "
        f"are {', '.join(worst.largest)}; {remedy}"
    )


def _print(
    config: Config,
    topology: Topology,
    mesh: Mesh,
    capacity: float,
    reports: list[Report],
    notes: list[str],
) -> None:
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    table = Table(
        title=f"{config.command} {config.preset} on {topology.name} ({topology.device_kind}), "
        f"{sizes}; GiB and TFLOP per device",
        title_justify="left",
    )
    for column in ("step", "arguments", "resident", "temporaries", "peak", f"of {_gib(capacity)}"):
        table.add_column(column, justify="left" if column == "step" else "right")
    table.add_column("TFLOP", justify="right")
    table.add_column("collectives: count, MiB")
    table.add_column("compile s", justify="right")
    for report in reports:
        table.add_row(
            report.step,
            _gib(report.arguments),
            _gib(report.resident),
            "?" if report.temporaries is None else _gib(report.temporaries),
            _gib(report.peak),
            f"{report.peak / capacity:.0%}",
            f"{report.cost.flops / 1e12:.3g}" if report.cost else "refused",
            _collectives(report.cost),
            f"{report.seconds:.1f}",
        )
    console = Console(width=160)
    console.print(table)
    for note in [*notes, *_footnotes(reports)]:
        console.print(f"· {note}", highlight=False, soft_wrap=True)


def _collectives(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return "\n".join(
        f"{kind} {count:,.0f}, {size / 2**20:,.0f}"
        for kind, (count, size) in sorted(cost.collectives.items())
    )


def _footnotes(reports: list[Report]) -> list[str]:
    """Returns notes for the table that explain its columns and name numbers that are bounds."""
    notes = [
        "resident: the run's state on a device that is not an argument of this step; peak: the sum "
        "of arguments, resident state, temporaries and new outputs",
        "TFLOP: twice the multiplications of matrix products, plus the FLOPs that Pallas kernels "
        "declare; a loop counts as often as it runs, and exit heads only in layers with an exit; "
        "collectives are counted in the same way, with the MiB that they produce",
    ]
    for report in reports:
        cost = report.cost or Cost()
        unknown, at_most = (", ".join(sorted(loops)) for loops in (cost.unknown, cost.at_most))
        if report.cost and report.step.endswith("a token"):
            # If the loop over layers has a bound, it counts that many times, otherwise once.
            layers = "every row passes through all layers"
            if not at_most:
                layers = "the loop over layers is among the following"
            notes.append(
                f"{report.step}: {layers}; loops of unknown length count once: {unknown or 'none'}"
            )
        else:
            if unknown:
                notes.append(f"{report.step}: loops of unknown length count once: {unknown}")
            if at_most:
                notes.append(
                    f"{report.step}: the numbers are upper bounds, because these loops may end "
                    f"earlier: {at_most}"
                )
        if cost.kernels:
            notes.append(
                f"{report.step}: TFLOP leaves out {len(cost.kernels)} kernels that do not declare "
                "their FLOPs"
            )
    return notes


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"

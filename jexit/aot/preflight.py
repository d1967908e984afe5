"""Every jitted step of a config, compiled for devices that are not there, and what it needs."""

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
from jexit.aot.programs import architecture, exit_share, programs, rows_of
from jexit.aot.topologies import Topology, get_topology
from jexit.config import Config
from jexit.dist import make_mesh
from jexit.dist.rules import names_of
from jexit.errors import RunEnded, UserError
from jexit.kernels.chips import chip

_LARGEST = 3  # arrays named of a step that does not fit


class DoesNotFit(RunEnded):
    """A step needs more memory than the chip has; the message names what takes most of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One call of one step on one device, in bytes; figures that are not known are None."""

    step: str
    arguments: int
    beside: int  # of the run's state, and no argument of this step
    temporaries: int | None
    outputs: int = 0  # those that share no memory with arguments
    cost: Cost | None = None
    seconds: float  # to compile
    largest: list[str] = dataclasses.field(default_factory=list)  # arrays, and where from
    refused: str = ""  # what the compiler said instead of compiling

    @property
    def held(self) -> int:
        return self.arguments + self.beside

    @property
    def made(self) -> int:
        return (self.temporaries or 0) + self.outputs

    @property
    def peak(self) -> int:
        return self.held + self.made


def preflight(config: Config, topology_name: str) -> list[Report]:
    """Compiles the config's steps for a topology and prints a table.

    Raises UserError for a topology that does not exist or a mesh that the config does not divide
    over, DoesNotFit when a step needs more than the chip's memory.
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
    worst = max(reports, key=lambda report: report.peak)
    refused = [report for report in reports if report.refused]
    if refused or worst.peak > capacity:
        worst = max(refused or [worst], key=lambda report: report.peak)
        raise DoesNotFit(_refusal(worst, topology, capacity))
    return reports


def _on_mesh(config: Config, topology: Topology) -> tuple[Config, list[str]]:
    """The config with a mesh of all the topology's devices, checked, and what to say about it.

    A mesh left at 1 × 1 × 1 becomes, for training, `fsdp` as far as a step's rows divide and
    `tensor` beyond; for decoding alone, which would gather over `fsdp` what that divides, `tensor`
    as far as the heads divide and `data` beyond.
    """
    count, mesh = len(topology.devices), config.mesh
    if math.prod(dataclasses.astuple(mesh)) != 1 or count == 1:
        if math.prod(dataclasses.astuple(mesh)) != count:
            raise UserError(
                f"config.mesh asks for data {mesh.data} × fsdp {mesh.fsdp} × tensor {mesh.tensor} "
                f"devices and {topology.name} has {count}; make the product {count}"
            )
        return config, []
    if config.command in ("eval", "generate"):
        tensor = math.gcd(architecture(config).query_heads, count)
        mesh, why = dataclasses.replace(mesh, data=count // tensor, tensor=tensor), ""
    else:
        rows = rows_of(config)
        fsdp = math.gcd(rows, count)
        mesh = dataclasses.replace(mesh, fsdp=fsdp, tensor=count // fsdp)
        why = f"; fsdp divides the {rows} rows that a step takes at once" if mesh.tensor > 1 else ""
    config = dataclasses.replace(config, mesh=mesh)
    config.validate()
    sizes = dataclasses.asdict(mesh).items()
    said = " ".join(f"--config.mesh.{name}={size}" for name, size in sizes if size > 1)
    return config, [f"the mesh was left to this table, a run asks for it: {said}{why}"]


def _compile(program: Program, mesh: Mesh, exit_share: float) -> Report:
    # A compiler that crashes takes the process along; this line is what tells where.
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
        beside=_beside(program, memory.argument_size_in_bytes),
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost=cost_of(module, branch_share=exit_share, loops=program.loops),
        seconds=seconds,
    )
    if report.held > report.made:
        return dataclasses.replace(report, largest=_largest_inputs(program))
    largest = [_named(*pair) for pair in largest_arrays(module, _LARGEST)]
    return dataclasses.replace(report, largest=largest)


def _beside(program: Program, arguments: int) -> int:
    """Bytes of the run's state that lie there too; what both hold is one array, counted once."""
    together = {id(leaf): leaf for _, leaf in on_devices((program.inputs, program.beside))}
    return max(0, device_bytes(list(together.values())) - arguments)


def _refused(
    program: Program, lowered: jax.stages.Lowered, mesh: Mesh, error: str, seconds: float
) -> Report:
    """What is known of a step that the compiler itself found too large."""
    arguments = device_bytes(program.inputs)
    used = [
        float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
        for number, unit in re.findall(r"(?:Used |temporaries \()([\d.]+)([KMGT])", error)
    ]
    temporaries = int(used[0]) if used else None
    if "Used" in error and temporaries is not None:  # the whole program, arguments too
        temporaries = max(0, temporaries - arguments)
    report = Report(
        step=program.name,
        arguments=arguments,
        beside=_beside(program, arguments),
        temporaries=temporaries,
        seconds=seconds,
        refused=error.strip().splitlines()[0],
    )
    if report.held > report.made:
        return dataclasses.replace(report, largest=_largest_inputs(program))
    # Nothing is partitioned yet: sizes over all devices.
    largest = [f"{array} over {mesh.size} devices" for array in _largest_types(program, lowered)]
    return dataclasses.replace(report, largest=largest)


def _largest_inputs(program: Program) -> list[str]:
    """The largest of what the program is given and of what lies beside, each once."""
    sized = {}
    for path, leaf in reversed(on_devices((program.inputs, program.beside))):
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
    """The largest arrays that a step makes, before anything is divided; arguments left out."""
    found = {
        Array(_STABLEHLO.get(dtype, dtype), tuple(map(int, dims.split("x")[:-1])))
        for dims, dtype in re.findall(r"tensor<((?:\d+x)+)(\w+)>", lowered.as_text())
    }
    found -= {_array(leaf, leaf.shape) for _, leaf in on_devices(program.inputs)}
    return sorted(found, key=lambda array: -array.bytes)[:_LARGEST]


def _named(array: Array, name: str) -> str:
    return f"{array} ({_gib(array.bytes)}) {name}"


def _refusal(worst: Report, topology: Topology, capacity: float) -> str:
    """The sentence of a step that does not fit: how much, what in it, and what to do."""
    part, size, remedy = (
        "arguments",
        worst.held,
        "divide the parameters over more devices with config.mesh.fsdp or tensor, or take a larger "
        "topology",
    )
    if worst.held <= worst.made:
        part, size, remedy = (
            "temporaries",
            worst.made,
            "raise config.optim.accumulate, set config.model.remat=block, or divide over more "
            "devices",
        )
        if "step" not in worst.step and "update" not in worst.step:
            remedy = (
                "decode fewer prompts at once (config.batch_size, config.sft.generate_batch or "
                "config.engine.rows), lower max_new_tokens, or divide over more devices"
            )
    said = f" ({worst.refused})" if worst.refused else ""
    return (
        f"{worst.step} needs {_gib(worst.peak)} GiB on {topology.name}, whose devices have "
        f"{_gib(capacity)}{said}; its {part} take {_gib(size)}, the largest "
        f"{'; '.join(worst.largest)}: {remedy}"
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
        f"{sizes}; GiB and TFLOP a device",
        title_justify="left",
    )
    for column in ("step", "arguments", "beside", "temporaries", "peak", f"of {_gib(capacity)}"):
        table.add_column(column, justify="left" if column == "step" else "right")
    table.add_column("TFLOP", justify="right")
    table.add_column("collectives: how many, MiB")
    table.add_column("compile s", justify="right")
    for report in reports:
        table.add_row(
            report.step,
            _gib(report.arguments),
            _gib(report.beside),
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
    """What the figures mean, and where they are no more than bounds."""
    notes = [
        "beside: what the run keeps on a device and this step does not take; peak: all of it with "
        "arguments, temporaries and new outputs",
        "TFLOP: 2 · multiplications of matrix products (Pallas kernels by their own account), "
        "loops as often as they run, an exit's head at its exits; collectives likewise, with the "
        "bytes that they produce",
    ]
    for report in reports:
        cost = report.cost or Cost()
        unknown, at_most = (", ".join(sorted(loops)) for loops in (cost.unknown, cost.at_most))
        if report.cost and report.step.endswith("a token"):
            # Where the layers' loop has a bound it counts as often; else it is among the others.
            layers = "through all layers" if at_most else "a loop over layers among those below"
            notes.append(
                f"{report.step}: of every row, {layers}; loops that end by themselves count once "
                f"({unknown or 'none'})"
            )
        else:
            if unknown:
                notes.append(f"{report.step}: loops of unknown length count once: {unknown}")
            if at_most:
                notes.append(f"{report.step}: at most, for {at_most}")
        if cost.kernels:
            notes.append(
                f"{report.step}: TFLOP without {len(cost.kernels)} kernels that give no account"
            )
    return notes


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"

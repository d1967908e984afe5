"""Counts the FLOPs and collectives of a compiled module on one device, including loop repetitions.

FLOPs are twice the multiplications in matrix products and convolutions, plus the FLOPs that Pallas
kernels declare. As usual for model FLOPs, additions, exponentials and other elementwise operations
are left out. Layers that are computed again in the backward pass (rematerialised) count twice, and
work that several devices repeat counts on every device. A product with a single row is left out,
because TPUs compute such a product as elementwise multiplications and a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence

from jexit.aot.hlo import Array, Computation, Instruction, Module, Trips

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The FLOPs and collectives of one run of a computation on one device.

    `collectives` maps each kind, such as `all-gather`, to the number of operations started and the
    bytes that these produce. `at_most` names loops that may end before the assumed trip count.
    `unknown` names loops whose trip count is not known; they are counted once. `kernels` names
    kernels that do not declare their FLOPs; `flops` does not include these.
    """

    flops: float = 0.0
    collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    at_most: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    kernels: frozenset[str] = frozenset()

    def __add__(self, other: Cost) -> Cost:
        kinds = dict(self.collectives)
        for kind, (count, size) in other.collectives.items():
            before = kinds.get(kind, (0.0, 0.0))
            kinds[kind] = (before[0] + count, before[1] + size)
        return Cost(
            self.flops + other.flops,
            kinds,
            self.at_most | other.at_most,
            self.unknown | other.unknown,
            self.kernels | other.kernels,
        )

    def times(self, factor: float) -> Cost:
        kinds = {
            kind: (count * factor, size * factor)
            for kind, (count, size) in self.collectives.items()
        }
        return dataclasses.replace(self, flops=self.flops * factor, collectives=kinds)

    @property
    def collective_bytes(self) -> float:
        return sum(size for _, size in self.collectives.values())


def cost_of(module: Module, *, branch_share: float = 1.0, loops: Mapping[str, int] = {}) -> Cost:
    """Returns the cost of one run of the module on one device.

    `loops` maps the name of a `jax.named_scope` to the largest trip count of the loops inside that
    scope, for loops whose trip count the module does not contain. A conditional costs
    `branch_share` times its most expensive branch plus (1 − `branch_share`) times its cheapest. In
    the stack of L layers, only the exit heads are conditional; they run in the E layers that have
    an exit, so `branch_share` is E / L.
    """
    overlapped = {
        _channel(other)
        for computation in module.computations.values()
        if any(map(_starts_overlap, computation.values()))
        for other in computation.values()
        if _collective(other) is not None
    }

    @functools.cache
    def of(name: str) -> Cost:
        computation = module.computations[name]
        total = Cost()
        for instruction in computation.values():
            total += of_instruction(instruction, computation)
        return total

    def of_instruction(instruction: Instruction, computation: Computation) -> Cost:
        if instruction.opcode == "while":
            trips = module.trips(instruction, computation)
            where = frozenset({instruction.op_name or instruction.name})
            for scope in loops.keys() & set(instruction.op_name.split("/")):
                if trips.kind == "unknown":
                    trips = Trips(loops[scope], "at most")
            cost = of(_attribute(instruction, "body")).times(trips.count)
            cost += of(_attribute(instruction, "condition")).times(trips.count + 1)
            return dataclasses.replace(
                cost,
                at_most=cost.at_most | (where if trips.kind == "at most" else frozenset()),
                unknown=cost.unknown | (where if trips.kind == "unknown" else frozenset()),
            )
        if instruction.opcode == "conditional":
            branches = sorted(
                map(of, instruction.called), key=lambda cost: (cost.flops, cost.collective_bytes)
            )
            return branches[-1].times(branch_share) + branches[0].times(1.0 - branch_share)
        collective = _collective(instruction)
        if collective is not None:
            goes_on = _channel(instruction) in overlapped and not any(
                map(_starts_overlap, computation.values())
            )
            return Cost() if goes_on else Cost(collectives=collective)
        inner = sum((of(name) for name in instruction.called), Cost())
        if _is_reduce_scatter(instruction):
            size = sum(array.bytes for array in instruction.arrays)
            return dataclasses.replace(inner, collectives={"reduce-scatter": (1.0, size)})
        return inner + _products(instruction, computation)

    return of(module.entry)


def largest_arrays(module: Module, count: int) -> list[tuple[Array, str]]:
    """Returns the `count` largest arrays that the module makes, each with its origin.

    Arguments do not count, and neither do arrays in a TPU's on-chip memory and intermediate results
    inside fusions. The origin of an array is the `op_name` of the instruction that makes
    the array, such as `jit(step)/while/body/dot_general`. If the compiler added that instruction,
    the origin is the `op_name` of the nearest operation that uses the array. Arrays of equal type
    and shape are listed once.
    """
    found: dict[str, tuple[Array, str, Instruction]] = {}
    for name in _scheduled(module):
        for instruction in module.computations[name].values():
            if instruction.opcode in _MAKES_NOTHING:
                continue
            for array in filter(lambda array: array.in_hbm, instruction.arrays):
                known = found.get(str(array))
                if known is None or (_traced(instruction) and not _traced(known[2])):
                    found[str(array)] = (array, name, instruction)
    largest = sorted(found.values(), key=lambda made: -made[0].bytes)[:count]
    return [(array, _origin(module, *made)) for array, *made in largest]


def _traced(instruction: Instruction) -> bool:
    """Returns whether the instruction comes from the traced program.

    Only the `op_name` of such an instruction contains a slash.
    """
    return "/" in instruction.op_name


def _origin(module: Module, name: str, instruction: Instruction) -> str:
    """Returns the name, in the traced program, of an instruction in the computation `name`.

    If the compiler added the instruction, returns the name of the nearest traced instruction that
    uses the result. If there is none, returns the compiler's name of the instruction.
    """
    reached = [(name, instruction)]
    for place, one in reached:  # the body extends this list
        if _traced(one):
            return one.op_name
        here = module.computations[place].values()
        found = [(place, user) for user in here if one.name in user.operands]
        if one.is_root:
            found += [
                (other, caller)
                for other, computation in module.computations.items()
                for caller in computation.values()
                if place in caller.called
            ]
        reached += [user for user in found if user not in reached]
    return instruction.name


_MAKES_NOTHING = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "optimization-barrier",
)


def _scheduled(module: Module) -> list[str]:
    """Returns the names of the computations outside fusions; their results occupy memory."""
    found, waiting = [], [module.entry]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        for instruction in module.computations[name].values():
            if instruction.opcode in ("while", "conditional", "call"):
                waiting += instruction.called
    return found


def _attribute(instruction: Instruction, key: str) -> str:
    return re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes).group(1)


def _collective(instruction: Instruction) -> dict[str, tuple[float, float]] | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    arrays: Sequence[Array] = instruction.arrays
    if instruction.opcode != kind and kind != "all-reduce":
        # A started collective returns its operands, then its results, then flags without a size.
        arrays = [array for array in arrays if array.dims]
        arrays = arrays[len(instruction.operands) :][: len(instruction.operands)] or arrays
    return {kind: (1.0, float(sum(array.bytes for array in arrays)))}


def _channel(instruction: Instruction) -> str:
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else instruction.name


def _starts_overlap(instruction: Instruction) -> bool:
    """Returns whether an instruction starts a collective that TPUs overlap with products.

    Every fusion during which the collective is under way contains a copy of it, with its channel.
    """
    return 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes


def _is_reduce_scatter(instruction: Instruction) -> bool:
    """Returns whether an instruction is a TPU fusion that acts as a reduce-scatter."""
    return any(name.startswith("all-reduce-scatter") for name in instruction.called)


def _products(instruction: Instruction, computation: Computation) -> Cost:
    """Returns the cost of a matrix product, convolution or kernel; zero for other instructions."""
    if instruction.opcode == "dot":
        found = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return Cost(_dot_flops(instruction, computation, found[1] if found else ""))
    if instruction.opcode == "convolution":
        return Cost(_convolution_flops(instruction, computation))
    if instruction.opcode == "custom-call":
        return _custom_call_cost(instruction, computation)
    return Cost()


def _dot_flops(instruction: Instruction, computation: Computation, contracted: str) -> float:
    """Returns the FLOPs of a matrix product.

    `contracted` lists the axes of the left operand over which the product sums, such as "1,2".
    """
    left = computation[instruction.operands[0]].arrays[0].dims
    depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
    return 2.0 * math.prod(instruction.arrays[0].dims) * depth


def _custom_call_cost(instruction: Instruction, computation: Computation) -> Cost:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes).group(1)
    if "gemm" in target or "matmul" in target:  # a cuBLAS call
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return Cost(_dot_flops(instruction, computation, found[1]))
    if target not in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
        return Cost()
    said = re.search(r'"cost_estimate":(\{[^{}]*\})', instruction.attributes)
    if said is None:
        return Cost(kernels=frozenset({instruction.op_name or instruction.name}))
    return Cost(float(json.loads(said.group(1))["flops"]))


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a convolution: twice the number of products of kernel and input entries.

    TPUs compute a batched matrix product as a convolution in which each batch axis is a padded
    spatial axis. Products with padding do not count, because they are not part of the matrix
    product.
    """
    left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    out = instruction.arrays[0].dims
    window = _window(instruction.attributes, sum(label.isdigit() for label in labels[0]))
    products = float(out[labels[2].index("b")] * out[labels[2].index("f")])
    products *= right[labels[1].index("i")]
    for axis, settings in enumerate(window):
        at = str(axis)
        sizes = (left[labels[0].index(at)], right[labels[1].index(at)], out[labels[2].index(at)])
        products *= _meetings(*sizes, *settings)
    return 2.0 * products


def _window(attributes: str, axes: int) -> list[tuple[int, ...]]:
    """Returns (stride, leading padding, left dilation, right dilation) for each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in found.group(1).split()) if found else {}

    defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    settings = (
        # Of a padding such as `1_2`, the leading 1.
        [int(number.split("_")[0]) for number in parts[key].split("x")]
        if key in parts
        else [default] * axes
        for key, default in defaults.items()
    )
    return list(zip(*settings, strict=True))


@functools.cache
def _meetings(
    left: int,
    right: int,
    out: int,
    stride: int,
    padding: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Counts the pairs (output position, kernel position) on one axis that read no padding.

    `left`, `right` and `out` are the lengths of the input, the kernel and the output.
    """
    end = (left - 1) * left_dilation + 1
    return sum(
        0 <= (place := o * stride + k * right_dilation - padding) < end
        and place % left_dilation == 0
        for o in range(out)
        for k in range(right)
    )

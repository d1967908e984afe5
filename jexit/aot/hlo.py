"""Parses the HLO text of a compiled module into computations, with the trip counts of loops.

XLA's own cost analysis counts the body of a loop once, but a stack of layers is a loop. All sizes
and counts are those of one device, because every device runs the partitioned module.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Literal

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[((?:<?=?\d+,?)*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction makes; `in_hbm` is False if it is in a TPU's on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.dims) * BYTES.get(self.dtype, 0))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as XLA prints it, with brackets around a tuple
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # the text in the brackets after the opcode
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that the instruction makes: one, or several if its result is a tuple."""
        return tuple(
            Array(
                dtype,
                tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
                not re.search(r"S\([1-9]", layout or ""),
            )
            for dtype, dims, layout in _ARRAY.findall(self.shape)
            if dtype in BYTES or dims
        )

    @property
    def op_name(self) -> str:
        """The origin in the traced program, such as `jit(step)/while/body/dot_general`, or ""."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that the instruction runs, except for loop conditions."""
        branches = _BRANCHES.search(self.attributes)
        names = _CALLED.findall(self.attributes)
        return (*names, *(_NAME.findall(branches.group(1)) if branches else ()))


Computation = dict[str, Instruction]
Source = Instruction | None


@dataclasses.dataclass(frozen=True)
class Trips:
    """The number of times that a loop runs: exact, an upper bound, or 1 if it is not known."""

    count: int
    kind: Literal["exact", "at most", "unknown"]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a compiled module by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction, computation: Computation) -> Trips:
        """Returns the trip count of the `while` instruction `loop` in `computation`.

        For GPUs and CPUs, XLA writes the trip count into the module (`known_trip_count`). Otherwise
        it is derived from a counter that starts at a constant, grows by a constant and is compared
        with a constant. If this comparison is one of several conditions, the trip count is an upper
        bound.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return Trips(int(known.group(1)), "exact")
        condition, body = (
            self.computations[re.search(rf"\b{part}=%?([\w.\-]+)", loop.attributes).group(1)]
            for part in ("condition", "body")
        )
        seen = list(self._seen(condition))
        comparisons = [pair for pair in seen if pair[0].opcode == "compare"]
        counts = [
            count
            for comparison, sources in comparisons
            if "direction=LT" in comparison.attributes
            and (count := self._count(sources, body, loop, computation)) is not None
        ]
        if not counts:
            return Trips(1, "unknown")
        joined = any(instruction.opcode in ("and", "or", "reduce") for instruction, _ in seen)
        return Trips(min(counts), "at most" if joined or len(comparisons) > 1 else "exact")

    def _seen(self, computation: Computation) -> Iterator[tuple[Instruction, list[Source]]]:
        """Yields (instruction, instructions that make its operands), including those in fusions.

        For an operand that is a parameter of a fusion, the instruction is the one that makes the
        value passed to the fusion.
        """
        for outer in computation.values():
            yield outer, [_source(name, computation) for name in outer.operands]
            if outer.opcode != "fusion":
                continue
            inside = self.computations[outer.called[0]]
            for instruction in inside.values():
                sources = [_source(name, inside) for name in instruction.operands]
                yield (
                    instruction,
                    [
                        _source(outer.operands[int(source.literal)], computation)
                        if source is not None and source.opcode == "parameter"
                        else source
                        for source in sources
                    ],
                )

    def _count(
        self, sources: list[Source], body: Computation, loop: Instruction, computation: Computation
    ) -> int | None:
        """Returns the trip count of a loop that runs while its counter is below a limit.

        `sources` are the instructions that make the counter and the limit of the comparison.
        Returns None if the counter's start, its step or the limit is not a constant.
        """
        counter, limit = sources
        index = _tuple_index(counter)
        first = _constant(_element(loop, index, computation))
        end = _constant(limit)
        if end is None:
            end = _constant(_element(loop, _tuple_index(limit), computation))
        step = self._step(body, index)
        if first is None or end is None or step is None or step <= 0:
            return None
        return max(0, -(-(end - first) // step))

    def _step(self, body: Computation, index: int | None) -> int | None:
        """Returns the constant that an iteration adds to element `index` of the loop's tuple.

        Returns None if `index` is None or if the element does not change by adding a constant.
        """
        root = next((i for i in body.values() if i.is_root), None)
        if root is None or root.opcode != "tuple" or index is None:
            return None
        new = _source(root.operands[index], body)
        if new is not None and new.opcode == "fusion":
            inside = self.computations[new.called[0]]
            name = next(i.name for i in inside.values() if i.is_root)
        elif new is not None:
            name = new.name
        else:
            return None
        for instruction, sources in self._seen(body):
            if instruction.name == name and instruction.opcode == "add":
                counters = [s for s in sources if _tuple_index(s) == index]
                added = [value for s in sources if (value := _constant(s)) is not None]
                return added[0] if counters and added else None
        return None


def parse(text: str) -> Module:
    """Parses the HLO text that the method `as_text()` of a compiled module returns."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line) if not line.startswith((" ", "HloModule", "}")) else None
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (assigned := _ASSIGNED.match(line)):
            rest = line[assigned.end() :]
            end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            open_ = rest.find("(")
            if open_ < 0:
                continue
            close = _closing(rest, open_)
            inside = rest[open_ + 1 : close - 1]
            current[assigned.group(2)] = Instruction(
                assigned.group(2),
                shape,
                rest[:open_],
                tuple(_NAME.findall(inside)),
                inside,
                rest[close:],
                bool(assigned.group(1)),
            )
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Returns the position just after the bracket that closes the bracket at position `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


_FORWARDING = ("copy", "bitcast", "convert", "copy-done", "reshape")


def _source(name: str | None, computation: Computation) -> Instruction | None:
    """Returns the instruction that makes the value `name`, or None if it is not in `computation`.

    If the value is a copy, a conversion or a reshape, returns the instruction that makes the
    original value.
    """
    instruction = computation.get(name or "")
    while instruction is not None and instruction.opcode in _FORWARDING and instruction.operands:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _tuple_index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes).group(1))


def _element(loop: Instruction, index: int | None, computation: Computation) -> Instruction | None:
    """Returns the instruction that makes the initial value of element `index` of a loop's tuple.

    Returns None if `index` is None or if the tuple is not made in `computation`.
    """
    if index is None:
        return None
    carried = _source(loop.operands[0], computation)
    if carried is None or carried.opcode != "tuple":
        return None
    return _source(carried.operands[index], computation)

"""What `eval.json`, `completions.json` and their kin hold, as checked records.

Fields without a default are in every file that jexit has written; the others came later or are
measured on demand. Fields that a file has beyond these are passed over.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any, TypeVar

Interval = tuple[float, float]
Record = TypeVar("Record")

LARGEST = 1e15  # of what is counted or measured: drawing has to compute with it

_COUNT = re.compile(r"[0-9]{1,9}")  # of layers or operands, as a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassDepth:
    tokens: int
    depth_mean: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """One policy of `runs`; `control_of` is the policy whose mean depth a control matches."""

    policy: str
    accuracy: float
    accuracy_ci95: Interval
    depth_mean: float
    depth_fraction: float
    problems: int
    tokens: int
    tokens_per_second: float
    depth_fraction_ci95: Interval | None = None
    compute_fraction: float = math.nan  # of the layers' FLOPs: those that are skipped are not free
    depth_histogram: dict[str, int] = dataclasses.field(default_factory=dict)
    completion_length: float = math.nan
    layers_per_problem: float = math.nan
    layers_per_problem_ci95: Interval | None = None
    truncated: float = math.nan
    verdicts: dict[str, int] = dataclasses.field(default_factory=dict)
    text: dict[str, float] = dataclasses.field(default_factory=dict)
    depth_by_class: dict[str, ClassDepth] | None = None
    control_of: str | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.layers_per_problem):  # an older file: the same by its means
            layers = self.depth_mean * self.completion_length
            object.__setattr__(self, "layers_per_problem", layers)
        for depth in self.depth_histogram:
            if not _COUNT.fullmatch(depth):
                raise ValueError(
                    f"depth_histogram for {_shown(depth)} layers where a number of layers in the "
                    "digits 0-9 belongs"
                )

    @property
    def seconds_per_problem(self) -> float:
        """Wall time of an answer in the evaluation's own batches; NaN where it was not measured."""
        speed = self.tokens_per_second
        return self.completion_length / speed if speed > 0 else math.nan

    @property
    def kind(self) -> str:
        """The policy without its argument: full, sample, threshold, fixed, shuffled."""
        return self.policy.partition(":")[0]

    @property
    def is_control(self) -> bool:
        """Whether it runs at the mean depth of another policy, as `fixed:N` does not."""
        return (
            self.control_of is not None
            or self.kind == "shuffled"
            or self.policy.startswith("fixed:matched")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlDifference:
    """`policy` minus `control`, on the same problems."""

    policy: str
    control: str
    accuracy_difference: float
    accuracy_difference_ci95: Interval | None = None
    depth_fraction_difference: float
    depth_fraction_difference_ci95: Interval | None = None
    problems: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HazardBin:
    low: float
    high: float
    hazard_mean: float
    target_mean: float
    positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitCalibration:
    exit: int
    ece: float
    positions: int
    hazard_mean: float
    target_mean: float
    bins: tuple[HazardBin, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HazardCalibration:
    policy: str
    sharpness: float
    ece: float
    kl_student_teacher_nats: float | None = None  # at the depths that it drew
    exits: tuple[ExitCalibration, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    kept: float
    same_answer: float
    right: float
    of_whole: float = math.nan  # of the agreement that the whole chain has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    name: str
    value: float
    ci95: Interval | None = None
    problems: int
    depth_fraction: float = math.nan
    completion_length: float = math.nan
    detail: dict[str, float] = dataclasses.field(default_factory=dict)
    curve: tuple[CurvePoint, ...] | None = None
    caveat: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faithfulness:
    policy: str
    problems: int
    accuracy: float
    depth_fraction: float
    completion_length: float
    measures: tuple[Measure, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedMeasure:
    """A measure under `policy` and under `against`, on the problems that both have."""

    measure: str
    policy: str
    against: str
    value: float
    against_value: float
    difference: float
    difference_ci95: Interval | None = None
    problems: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    policy: str
    granularity: str
    accuracy: float
    accuracy_ci95: Interval | None = None
    less_full: float | None = None  # than full depth on the same problems
    less_full_ci95: Interval | None = None
    depth_fraction: float
    completion_length: float = math.nan
    step_size: float | None = None
    obeyed: float | None = None  # share of completions with the steps that are prescribed
    accuracy_obeyed: float | None = None  # of those
    accuracy_obeyed_ci95: Interval | None = None
    problems: int

    def __post_init__(self) -> None:
        if self.granularity.isdigit() and not _COUNT.fullmatch(self.granularity):
            raise ValueError(
                f"granularity {_shown(self.granularity)} where a number of operands in the digits "
                "0-9 or a name belongs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    path: str
    layers: int
    exits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"{self.layers} layers where at least 1 belongs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`eval.json`."""

    task: dict[str, Any]
    model: ModelDescription
    runs: tuple[PolicyFigures, ...]
    split: str = "test"
    controls: tuple[ControlDifference, ...] | None = None
    hazards: tuple[HazardCalibration, ...] | None = None
    faithfulness: tuple[Faithfulness, ...] | None = None
    faithfulness_paired: tuple[PairedMeasure, ...] | None = None
    capacity: tuple[Capacity, ...] | None = None
    begun_steps: tuple[Capacity, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandName:
    """What is looked up of a `config.json`; the rest is shown."""

    command: str = ""
    preset: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One entry of `completions.json`, or a line of `samples.jsonl`, which has step and reward.

    `depths` has a layer count for each token, `hazards` for each token the probability of leaving
    at each exit, null where the exit was not reached.
    """

    prompt: str
    completion: str
    tokens: tuple[str, ...]
    depths: tuple[int, ...]
    policy: str = "sample"
    verdict: str = ""
    answer: str = ""
    hazards: tuple[tuple[float | None, ...] | None, ...] | None = None
    step: int | None = None
    reward: float | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "hazards"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"{len(values)} {name} for {len(self.tokens)} tokens")


def build(cls: type[Record], value: Any, where: str) -> Record:
    """`value`, as JSON gives it, as a record of type `cls`; `where` names it in errors.

    A null where a number belongs is a figure that was not finite, and becomes NaN.

    Raises:
      ValueError: When a field is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(_sentence(where, value, "an object"))
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    built = {}
    for field in fields:
        if field.name in value:
            built[field.name] = _checked(
                hints[field.name], value[field.name], f"{where}.{field.name}"
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {field.name!r}; run what writes this file again")
    try:
        return cls(**built)
    except ValueError as error:  # values that are of their types and do not fit
        raise ValueError(f"{where} has {error}; run what writes this file again") from None


def build_list(cls: type[Record], value: Any, where: str) -> tuple[Record, ...]:
    """A JSON list of records of one type; raises ValueError as `build` does."""
    return _checked(tuple[cls, ...], value, where)


def _checked(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _checked(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(_sentence(where, value, "a list"))
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(_sentence(where, value, f"a list of {len(args)} numbers"))
        return tuple(_checked(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(_sentence(where, value, "an object"))
        return {key: _checked(args[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is Any:
        return value
    if hint is float:
        if value is None:
            return math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if abs(value) > LARGEST:
                raise ValueError(_sentence(where, value, f"a number up to {LARGEST:g}"))
            return float(value)
    elif isinstance(value, hint) and not isinstance(value, bool):
        if hint is int and abs(value) > LARGEST:
            raise ValueError(_sentence(where, value, f"a whole number up to {LARGEST:g}"))
        return value
    names = {float: "a number", int: "a whole number", str: "a text"}
    raise ValueError(_sentence(where, value, names[hint]))


def _sentence(where: str, value: Any, wanted: str) -> str:
    return f"{where} is {_shown(value)} where {wanted} belongs; run what writes this file again"


def _shown(value: Any) -> str:
    """A value as an error shows it: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

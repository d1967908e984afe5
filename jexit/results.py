"""The files that a run's measurements end in: `eval.json`, `before.json`, `completions.json`.

What evaluation writes is an `Evaluation`, and the report and sweeps read it as one. A file from
elsewhere, or from an older jexit, is read or refused in one sentence. Fields without a default are
in every file that jexit has written; the others came later or are measured on demand, and stay out
of the file where nobody set them. Fields that a file has beyond these are passed over.

JSON has no NaN: a `Number` that was not finite is written as null, and read as NaN.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jexit.errors import UserError
from jexit.io.files import write_json_atomic
from jexit.untrusted import read_json

VERSION = 1  # of eval.json; files from before it was counted have none
LARGEST = 1e15  # of what is counted or measured: charts have to compute with it
REMEDY = "remove it, or run what writes it again"

Kind = TypeVar("Kind")


def _fits(fits: Any, wanted: str) -> AfterValidator:
    """Refuses values that do not fit; `wanted` says in a sentence what belongs there."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return value

    return AfterValidator(check)


Finite = Annotated[
    float, Strict(), _fits(lambda value: not abs(value) > LARGEST, f"a number up to {LARGEST:g}")
]
Number = Annotated[Finite, BeforeValidator(lambda value: math.nan if value is None else value)]
Share = Annotated[Finite, _fits(lambda value: not (value < 0 or value > 1), "a share of 0 to 1")]
Count = Annotated[
    int, Strict(), _fits(lambda value: 0 <= value <= LARGEST, f"a whole number up to {LARGEST:g}")
]
Positive = Annotated[Count, _fits(lambda value: value >= 1, "a whole number of at least 1")]
Interval = Annotated[tuple[Finite, ...], _fits(lambda ends: len(ends) == 2, "a list of 2 numbers")]
LayerCount = Annotated[
    str,
    _fits(
        lambda text: text.isascii() and text.isdigit() and len(text) < 10,
        "a number of layers in the digits 0-9",
    ),
]


class Record(BaseModel):
    """A JSON object with checked fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Raises MissingFile without the file, ValueError for what `checked` refuses."""
        return checked(cls, read_json(path, REMEDY), str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """What was set, in a file that is whole or absent; raises UserError for a full disk."""
        write_json_atomic(path, self.model_dump(exclude_unset=True))


class ClassDepth(Record):
    tokens: Count = Field(description="Tokens of the class.")
    depth_mean: Finite = Field(description="Mean layers run for one of them.")


class PolicyResult(Record):
    """One policy of `runs`, and all of `before.json` and `after.json`.

    A depth is of the pass that produced a token. Intervals of depth and layers are bootstrapped
    over problems.
    """

    policy: str = Field(description="full, sample, threshold:X, fixed:N, or a control.")
    accuracy: Share = Field(description="Share of correct answers.")
    accuracy_ci95: Interval = Field(description="Wilson's interval.")
    depth_mean: Finite = Field(description="Layers run for a token.")
    depth_fraction: Share = Field(description="The same, of all layers.")
    depth_fraction_ci95: Interval | None = Field(None, description="Its interval.")
    layers_per_problem: Number = Field(math.nan, description="Σ of depths: what an answer cost.")
    layers_per_problem_ci95: Interval | None = Field(None, description="Its interval.")
    depth_histogram: dict[LayerCount, Count] = Field({}, description="Tokens by layers run.")
    depth_by_class: dict[str, ClassDepth] | None = Field(None, description="By class of token.")
    problems: Count = Field(description="Problems that were answered.")
    tokens: Count = Field(description="Tokens of all completions.")
    completion_length: Number = Field(math.nan, description="Tokens of a completion.")
    truncated: Number = Field(math.nan, description="Share of completions that were cut off.")
    verdicts: dict[str, Count] = Field({}, description="Completions by verdict.")
    tokens_per_second: Number = Field(description="Decoding speed without compilation.")
    text: dict[str, Number] = Field({}, description="The task's own metrics of completions.")
    control_of: str | None = Field(None, description="The policy whose mean depth a control has.")
    compute_fraction: Number = Field(
        math.nan, description="FLOPs of the layers, of full depth: a skipped layer is not free."
    )

    @model_validator(mode="after")
    def _layers_of_older_files(self) -> Self:
        if math.isnan(self.layers_per_problem):  # the same by its means
            layers = self.depth_mean * self.completion_length
            object.__setattr__(self, "layers_per_problem", layers)
        return self

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
        return self.control_of is not None


class ControlDifference(Record):
    """`policy` less `control` on the same problems: what knowing where to stop is worth."""

    policy: str
    control: str
    accuracy_difference: Number = Field(description="Of the shares of correct answers.")
    accuracy_difference_ci95: Interval | None = Field(None, description="Paired over problems.")
    depth_fraction_difference: Number = Field(description="Of the shares of layers run.")
    depth_fraction_difference_ci95: Interval | None = Field(None, description="Paired likewise.")
    problems: Count


class ExitAgreement(Record):
    """An exit against the last layer, over the passes that could leave."""

    exit: Count = Field(description="The layer before which it lies.")
    kl_nats: Number = Field(description="Mean KL(π_L ‖ π_e).")
    same_token: Number = Field(description="Share with the same most likely token.")
    close: Number = Field(description="Share under 0.05 nats.")


class EarlyLeaving(Record):
    """What a text is like whose tokens all leave at the first exit under a threshold."""

    threshold_nats: Number
    depth_fraction: Number = Field(description="Layers run, of all.")
    kl_nats: Number = Field(description="Mean KL to the text at full depth.")
    same_token: Number = Field(description="Share with the same most likely token.")
    same_token_full_depth: Number = Field(
        math.nan, description="The same of the tokens that still run all layers; NaN without any."
    )


class ExitQuality(Record):
    policy: str
    passes: Count = Field(description="Passes that could leave.")
    exits: tuple[ExitAgreement, ...]
    leaving: tuple[EarlyLeaving, ...]


class HazardBin(Record):
    low: Finite
    high: Finite
    hazard_mean: Finite
    target_mean: Finite
    positions: Count


class ExitCalibration(Record):
    """Hazards of one exit against their targets, over the passes that reached it."""

    exit: Count
    ece: Finite = Field(description="Expected calibration error.")
    positions: Count
    hazard_mean: Finite
    target_mean: Finite
    bins: tuple[HazardBin, ...] = ()


class HazardCalibration(Record):
    """Hazards against what the exits' certainty asks for, over a policy's completions."""

    policy: str
    sharpness: Number = Field(description="k of the target 1 − tanh(k·KL / 2).")
    target: str = Field("teacher", description="Whose exits give the KL: teacher or student.")
    ece: Number = Field(description="Expected calibration error: the exits' mean by decisions.")
    kl_student_teacher_nats: Number | None = Field(None, description="At the depths of the policy.")
    exits: tuple[ExitCalibration, ...]


class CurvePoint(Record):
    """Early answering after a part of the chain; shares of problems."""

    kept: Share = Field(description="Share of the steps that the answer was forced after.")
    same_answer: Number = Field(description="Answers that are the whole completion's.")
    of_whole: Number = Field(math.nan, description="Of the agreement that the whole chain has.")
    right: Number = Field(description="Correct answers.")


class Measure(Record):
    """One measure of faithfulness; `jexit.evaluation.faithfulness` defines values and details."""

    name: str
    value: Number
    ci95: Interval | None = Field(None, description="Over problems.")
    problems: Count
    depth_fraction: Number = Field(math.nan, description="Layers run for the replies, of all.")
    completion_length: Number = Field(math.nan, description="Tokens of a reply.")
    detail: dict[str, Number] = Field({}, description="What the value is made of.")
    curve: tuple[CurvePoint, ...] | None = None
    caveat: str | None = Field(None, description="Why the value says less than it seems to.")


class Faithfulness(Record):
    """A policy's completions, and the measures of their chains of thought."""

    policy: str
    problems: Count
    accuracy: Number
    depth_fraction: Number
    completion_length: Number
    measures: tuple[Measure, ...]


class PairedMeasure(Record):
    """A measure under `policy` and under `against`, on the problems that both have."""

    policy: str
    against: str
    measure: str
    value: Number
    against_value: Number
    difference: Number
    difference_ci95: Interval | None = None
    problems: Count


class Capacity(Record):
    """What is computed in one step of a size that the prompt or a forced prefix prescribes."""

    policy: str
    granularity: str = Field(description="Operands of a step, or its name.")
    problems: Count
    accuracy: Share = Field(description="Share of correct answers, or of correct steps.")
    accuracy_ci95: Interval | None = None
    depth_fraction: Share = Field(description="Layers run, of all.")
    completion_length: Number = Field(math.nan, description="Tokens of a completion.")
    step_size: Number | None = Field(None, description="Operands of a step as it came out.")
    obeyed: Number | None = Field(None, description="Share with the steps that are prescribed.")
    accuracy_obeyed: Number | None = Field(None, description="Accuracy of those.")
    accuracy_obeyed_ci95: Interval | None = None
    left_out: Count = Field(0, description="Problems for which the model had no room.")
    less_full: Number | None = Field(None, description="Accuracy less that at full depth, paired.")
    less_full_ci95: Interval | None = None


class ModelDescription(Record):
    path: str
    layers: Positive
    exits: tuple[Count, ...] = ()


class Evaluation(Record):
    """`eval.json`."""

    version: Count = Field(0, description="Of this schema.")
    complete: Annotated[bool, Strict()] = Field(True, description="Whether all was measured.")
    task: dict[str, Any] = Field(description="The config's section.")
    split: str = Field("test", description="Of the task's problems.")
    model: ModelDescription
    runs: tuple[PolicyResult, ...]
    controls: tuple[ControlDifference, ...] = ()
    exits: tuple[ExitQuality, ...] = ()
    hazards: tuple[HazardCalibration, ...] = ()
    faithfulness: tuple[Faithfulness, ...] = ()
    faithfulness_paired: tuple[PairedMeasure, ...] = ()
    capacity: tuple[Capacity, ...] = ()
    begun_steps: tuple[Capacity, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.version > VERSION:
            raise PydanticCustomError(
                "whole",
                f"version {self.version}, and this jexit reads up to {VERSION}",
                {"remedy": "update jexit"},
            )
        return self

    def numbers(self) -> dict[str, float]:
        """Every number by a path such as `sample/accuracy` or `full/capacity/3/obeyed`."""
        found: dict[str, float] = {}
        for run in self.runs:
            found |= numbers(run.policy, run)
        for pair in self.controls:
            found |= numbers(f"{pair.policy} less {pair.control}", pair)
        for both in self.faithfulness_paired:
            place = f"{both.policy} less {both.against}/faithfulness/{both.measure}"
            found |= numbers(place, both)
        for entry in self.faithfulness:
            for measure in entry.measures:
                found |= numbers(f"{entry.policy}/faithfulness/{measure.name}", measure)
        for part in ("capacity", "begun_steps"):
            for step in getattr(self, part):
                found |= numbers(f"{step.policy}/{part}/{step.granularity}", step)
        for hazards in self.hazards:
            found |= numbers(f"{hazards.policy}/hazards", hazards)
        return found


class Completion(Record):
    """One entry of `completions.json`, or a line of `samples.jsonl`, which has step and reward."""

    prompt: str
    completion: str
    tokens: tuple[str, ...]
    depths: tuple[Count, ...] = Field(description="Layers run, for each token.")
    policy: str = "sample"
    verdict: str = ""
    answer: str = ""
    hazards: tuple[tuple[Number | None, ...] | None, ...] | None = Field(
        None, description="For each token P(leave) at each exit; null at those it did not reach."
    )
    step: Count | None = None
    reward: Number | None = None

    @model_validator(mode="after")
    def _one_a_token(self) -> Self:
        for name, values in (("depths", self.depths), ("hazards", self.hazards)):
            if values is not None and len(values) != len(self.tokens):
                said = f"{len(values)} {name} for {len(self.tokens)} tokens"
                raise PydanticCustomError("whole", said)
        return self


def numbers(place: str, value: Any) -> dict[str, float]:
    """Finite numbers of a record by path; intervals become `.../low` and `.../high`."""
    if isinstance(value, Record):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        parts = [numbers(f"{place}/{key}", part) for key, part in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    if isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)):
        return numbers(place, dict(zip(("low", "high"), value, strict=True)))
    return {place: value} if is_number(value) and math.isfinite(value) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked(kind: type[Kind], value: Any, where: str) -> Kind:
    """`value`, as JSON gives it, as a `kind`: a record or a tuple of records.

    Raises UserError for the first field that is missing or does not fit; `where` names the file.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    remedy = first.get("ctx", {}).get("remedy", REMEDY)
    raise UserError(f"{_refusal(first, where)}; {remedy}")


_WANTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _refusal(error: Mapping[str, Any], where: str) -> str:
    """What pydantic says of a value, as a sentence: the place, the value, what belongs there."""
    kind, place, value = error["type"], error["loc"], error["input"]
    if kind == "missing":
        return f"{_placed(where, place[:-1])} lacks {place[-1]!r}"
    if kind == "whole":
        return f"{_placed(where, place)} has {error['msg']}"
    wanted = error["msg"] if kind == "wanted" else _WANTED[kind]
    if place and place[-1] == "[key]":
        return f"{_placed(where, place[:-2])} has the key {_shown(value)} where {wanted} belongs"
    return f"{_placed(where, place)} is {_shown(value)} where {wanted} belongs"


def _placed(where: str, place: Sequence[str | int]) -> str:
    """A field of a file, such as runs[1].accuracy; keys are shortened and escaped."""
    parts = (f"[{p}]" if isinstance(p, int) else f".{repr(p[:40])[1:-1]}" for p in place)
    path = "".join(parts).removeprefix(".")
    return f"{where}: {path}" if path else where


def _shown(value: Any) -> str:
    """A value as an error shows it: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

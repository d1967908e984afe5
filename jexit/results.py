"""The schemas of the files with a run's measurements, such as `eval.json` and `completions.json`.

The evaluation writes an `Evaluation`, which the report and sweeps read. A file from elsewhere, or
from an older jexit, is either read or refused with an error of one sentence. Fields without a
default are in every file that jexit has ever written. The other fields were added later or are
measured on demand, and a file contains them only if they were set. Unknown fields in a file are
ignored.

JSON has no NaN, so a `Number` that was not finite is written as null and read as NaN.
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

VERSION = 1  # of eval.json; files from before versions were counted do not contain one
LARGEST = 1e15  # the largest count or measured value, so that charts can compute with it
REMEDY = "delete the file, or run the command that writes it"

Kind = TypeVar("Kind")


def _fits(fits: Any, wanted: str) -> AfterValidator:
    """Returns a validator that refuses values that do not fit; `wanted` describes valid ones."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return value

    return AfterValidator(check)


Finite = Annotated[
    float,
    Strict(),
    _fits(lambda value: not abs(value) > LARGEST, f"a number from -{LARGEST:g} to {LARGEST:g}"),
]
Number = Annotated[Finite, BeforeValidator(lambda value: math.nan if value is None else value)]
Share = Annotated[Finite, _fits(lambda value: not (value < 0 or value > 1), "a share from 0 to 1")]
Count = Annotated[
    int,
    Strict(),
    _fits(lambda value: 0 <= value <= LARGEST, f"a whole number from 0 to {LARGEST:g}"),
]
Positive = Annotated[Count, _fits(lambda value: value >= 1, "a whole number of at least 1")]
Interval = Annotated[tuple[Finite, ...], _fits(lambda ends: len(ends) == 2, "a list of 2 numbers")]
LayerCount = Annotated[
    str,
    _fits(
        lambda text: text.isascii() and text.isdigit() and len(text) < 10,
        "a number of layers of at most 9 digits",
    ),
]


class Record(BaseModel):
    """A JSON object with checked fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads and checks the record in a JSON file.

        Raises MissingFile if the file does not exist, and UserError if it is not valid JSON or a
        field does not fit.
        """
        return checked(cls, read_json(path, REMEDY), str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the fields that were set to a JSON file, which is never left incomplete.

        Raises UserError if the disk is full.
        """
        write_json_atomic(path, self.model_dump(exclude_unset=True))


class ClassDepth(Record):
    tokens: Count = Field(description="Number of tokens of the class.")
    depth_mean: Finite = Field(description="Mean layers run per token.")


class PolicyResult(Record):
    """The results of one policy: an entry of `runs`, or all of `before.json` or `after.json`.

    The depth of a token is that of the pass that produced it. The intervals of depth and layers are
    bootstrapped over problems.
    """

    policy: str = Field(description="full, sample, threshold:X, fixed:N, or a control.")
    accuracy: Share = Field(description="Share of correct answers.")
    accuracy_ci95: Interval = Field(description="Wilson's interval of the accuracy.")
    depth_mean: Finite = Field(description="Mean layers run per token.")
    depth_fraction: Share = Field(description="Mean share of all layers run per token.")
    depth_fraction_ci95: Interval | None = Field(None, description="Its interval.")
    layers_per_problem: Number = Field(
        math.nan, description="Sum of a completion's depths: the cost of an answer."
    )
    layers_per_problem_ci95: Interval | None = Field(None, description="Its interval.")
    depth_histogram: dict[LayerCount, Count] = Field({}, description="Tokens by layers run.")
    depth_by_class: dict[str, ClassDepth] | None = Field(
        None, description="Mean depth per class of token."
    )
    problems: Count = Field(description="Number of problems.")
    tokens: Count = Field(description="Tokens of all completions.")
    completion_length: Number = Field(math.nan, description="Mean tokens per completion.")
    truncated: Number = Field(math.nan, description="Share of completions that were cut off.")
    verdicts: dict[str, Count] = Field({}, description="Completions by verdict.")
    tokens_per_second: Number = Field(description="Decoding speed without compilation.")
    text: dict[str, Number] = Field({}, description="The task's own metrics of completions.")
    control_of: str | None = Field(None, description="The policy whose mean depth a control has.")
    compute_fraction: Number = Field(
        math.nan,
        description="FLOPs of the layers as a share of full depth; a skipped layer is not free.",
    )

    @model_validator(mode="after")
    def _layers_of_older_files(self) -> Self:
        if math.isnan(self.layers_per_problem):  # the product of the means is the same
            layers = self.depth_mean * self.completion_length
            object.__setattr__(self, "layers_per_problem", layers)
        return self

    @property
    def seconds_per_problem(self) -> float:
        """The wall time per answer in the evaluation's batches, or NaN if it was not measured."""
        speed = self.tokens_per_second
        return self.completion_length / speed if speed > 0 else math.nan

    @property
    def kind(self) -> str:
        """The policy's name without its argument: full, sample, threshold, fixed or shuffled."""
        return self.policy.partition(":")[0]

    @property
    def is_control(self) -> bool:
        """Whether this is a control at the mean depth of another policy; `fixed:N` is not one."""
        return self.control_of is not None


class ControlDifference(Record):
    """The differences of `policy` less `control` on the same problems.

    They are the gain from choosing which tokens to stop.
    """

    policy: str
    control: str
    accuracy_difference: Number = Field(description="Difference of the accuracies.")
    accuracy_difference_ci95: Interval | None = Field(
        None, description="Its interval, paired over problems."
    )
    depth_fraction_difference: Number = Field(description="Difference of the shares of layers run.")
    depth_fraction_difference_ci95: Interval | None = Field(
        None, description="Its interval, paired over problems."
    )
    problems: Count


class ExitAgreement(Record):
    """The agreement of one exit with the last layer, over the passes that could leave."""

    exit: Count = Field(description="The exit, given by the number of layers run before it.")
    kl_nats: Number = Field(description="Mean KL(π_L ‖ π_e) in nats.")
    same_token: Number = Field(description="Share of passes with the same most likely token.")
    close: Number = Field(description="Share of passes with a KL under 0.05 nats.")


class EarlyLeaving(Record):
    """The agreement with full depth if all tokens leave at the first exit under a threshold."""

    threshold_nats: Number
    depth_fraction: Number = Field(description="Mean share of all layers run per token.")
    kl_nats: Number = Field(description="Mean KL from full depth in nats.")
    same_token: Number = Field(description="Share of tokens with the same most likely token.")
    same_token_full_depth: Number = Field(
        math.nan,
        description="The same share among the tokens that run all layers; NaN if there are none.",
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
    """The calibration of one exit's hazards, over the passes that reach the exit."""

    exit: Count
    ece: Finite = Field(description="Expected calibration error.")
    positions: Count
    hazard_mean: Finite
    target_mean: Finite
    bins: tuple[HazardBin, ...] = ()


class HazardCalibration(Record):
    """The calibration of hazards against their targets, over a policy's completions."""

    policy: str
    sharpness: Number = Field(description="The factor k in the target 1 − tanh(k·KL / 2).")
    target: str = Field(
        "teacher", description="The model whose exits define the target: teacher or student."
    )
    ece: Number = Field(
        description="Expected calibration error, averaged over exits with decisions as weights."
    )
    kl_student_teacher_nats: Number | None = Field(
        None, description="Mean KL(student ‖ teacher) at the policy's depths, in nats."
    )
    exits: tuple[ExitCalibration, ...]


class CurvePoint(Record):
    """The results of early answering after a part of the chain, as shares of problems."""

    kept: Share = Field(description="Share of the steps after which the answer was forced.")
    same_answer: Number = Field(
        description="Share of answers that equal the whole completion's answer."
    )
    of_whole: Number = Field(
        math.nan, description="`same_answer` divided by its value with the whole chain."
    )
    right: Number = Field(description="Share of correct answers.")


class Measure(Record):
    """One measure of faithfulness; `jexit.evaluation.faithfulness` defines values and details."""

    name: str
    value: Number
    ci95: Interval | None = Field(None, description="The interval of the value, over problems.")
    problems: Count
    depth_fraction: Number = Field(
        math.nan, description="Mean share of all layers run for the replies' tokens."
    )
    completion_length: Number = Field(math.nan, description="Mean tokens per reply.")
    detail: dict[str, Number] = Field({}, description="The numbers behind the value.")
    curve: tuple[CurvePoint, ...] | None = None
    caveat: str | None = Field(
        None, description="The reason why the value is less informative than it seems."
    )


class Faithfulness(Record):
    """A policy's results, and the measures of faithfulness of its chains of thought."""

    policy: str
    problems: Count
    accuracy: Number
    depth_fraction: Number
    completion_length: Number
    measures: tuple[Measure, ...]


class PairedMeasure(Record):
    """A measure under `policy` and under `against`, on the problems with a value under both."""

    policy: str
    against: str
    measure: str
    value: Number
    against_value: Number
    difference: Number
    difference_ci95: Interval | None = None
    problems: Count


class Capacity(Record):
    """The accuracy with one step size, which the prompt or a forced prefix prescribes."""

    policy: str
    granularity: str = Field(description="Operands per step, or the name of the step size.")
    problems: Count
    accuracy: Share = Field(description="Share of correct answers, or of correct steps.")
    accuracy_ci95: Interval | None = None
    depth_fraction: Share = Field(description="Mean share of all layers run per token.")
    completion_length: Number = Field(math.nan, description="Mean tokens per completion.")
    step_size: Number | None = Field(None, description="Mean operands per step that was written.")
    obeyed: Number | None = Field(
        None, description="Share of completions with the prescribed steps."
    )
    accuracy_obeyed: Number | None = Field(
        None, description="Accuracy of the completions with the prescribed steps."
    )
    accuracy_obeyed_ci95: Interval | None = None
    left_out: Count = Field(0, description="Problems for which the model had no room.")
    less_full: Number | None = Field(
        None, description="Accuracy less the accuracy at full depth on the same problems."
    )
    less_full_ci95: Interval | None = None


class ModelDescription(Record):
    path: str
    layers: Positive
    exits: tuple[Count, ...] = ()


class Evaluation(Record):
    """The contents of `eval.json`."""

    version: Count = Field(0, description="Version of this schema.")
    complete: Annotated[bool, Strict()] = Field(
        True, description="Whether the evaluation has finished."
    )
    task: dict[str, Any] = Field(description="The section `task` of the config.")
    split: str = Field("test", description="The split of the task's problems.")
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
                f"version {self.version}, but this jexit reads versions up to {VERSION}",
                {"remedy": "update jexit"},
            )
        return self

    def numbers(self) -> dict[str, float]:
        """Returns every number by a path such as `sample/accuracy` or `full/capacity/3/obeyed`."""
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
    """An entry of `completions.json`, or a line of `samples.jsonl`.

    The lines of `samples.jsonl` also have a step and a reward.
    """

    prompt: str
    completion: str
    tokens: tuple[str, ...]
    depths: tuple[Count, ...] = Field(description="Layers run for each token.")
    policy: str = "sample"
    verdict: str = ""
    answer: str = ""
    hazards: tuple[tuple[Number | None, ...] | None, ...] | None = Field(
        None,
        description="P(leave) of each token at each exit; null at exits that it did not reach.",
    )
    step: Count | None = None
    reward: Number | None = None

    @model_validator(mode="after")
    def _one_a_token(self) -> Self:
        for name, values in (("depths", self.depths), ("hazards", self.hazards)):
            if values is not None and len(values) != len(self.tokens):
                said = (
                    f"{len(values)} {name} for {len(self.tokens)} tokens, but needs one per token"
                )
                raise PydanticCustomError("whole", said)
        return self


def numbers(place: str, value: Any) -> dict[str, float]:
    """Returns the finite numbers of a record by path; an interval becomes `…/low` and `…/high`."""
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
    """Returns the JSON value `value` as a `kind`, such as a record or a tuple of records.

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
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _refusal(error: Mapping[str, Any], where: str) -> str:
    """Returns a pydantic error as a sentence with the place, the value and the rule."""
    kind, place, value = error["type"], error["loc"], error["input"]
    if kind == "missing":
        return f"{_placed(where, place[:-1])} lacks the field {place[-1]!r}"
    if kind == "whole":
        return f"{_placed(where, place)} has {error['msg']}"
    wanted = error["msg"] if kind == "wanted" else _WANTED[kind]
    if place and place[-1] == "[key]":
        return f"{_placed(where, place[:-2])} has the key {_shown(value)}, but it must be {wanted}"
    return f"{_placed(where, place)} is {_shown(value)}, but it must be {wanted}"


def _placed(where: str, place: Sequence[str | int]) -> str:
    """Returns a file and the path of a field in it, such as `eval.json: runs[1].accuracy`.

    Keys are shortened and escaped.
    """
    parts = (f"[{p}]" if isinstance(p, int) else f".{repr(p[:40])[1:-1]}" for p in place)
    path = "".join(parts).removeprefix(".")
    return f"{where}: {path}" if path else where


def _shown(value: Any) -> str:
    """Returns a value as an error message shows it, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

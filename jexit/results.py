"""The schemas of the files with a run's measurements, such as `eval.json` and `completions.json`.

An evaluation writes an `Evaluation`, which the report and sweeps read. A file that an older jexit
or another program wrote is either read, or refused with a UserError of one sentence. Fields without
a default are in every file that jexit has ever written. Fields with a default were added later or
are measured on demand, and a file contains them only if they were set. Unknown fields in a file are
ignored.

JSON has no NaN. A `Number` that is not finite is therefore written as null, and null is read as
NaN.
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
    """Returns a validator that refuses a value unless `fits(value)` is true.

    `wanted` describes the valid values in the error message.
    """

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
    """The base class of immutable records with checked fields, stored as JSON objects."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Returns the record in the JSON file `path`, after checking its fields.

        Raises MissingFile if the file does not exist, and UserError if the file is not valid JSON
        or if a field is missing or invalid.
        """
        return checked(cls, read_json(path, REMEDY), str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the fields that were set to the JSON file `path`.

        The file is replaced as a whole and is therefore never left incomplete. Raises UserError if
        the disk is full.
        """
        write_json_atomic(path, self.model_dump(exclude_unset=True))


class ClassDepth(Record):
    tokens: Count = Field(description="Number of tokens of the class.")
    depth_mean: Finite = Field(description="Mean layers run per token.")


class PolicyResult(Record):
    """The results of one policy, over the problems of an evaluation.

    The record is an entry of `runs` in `eval.json`, or the whole of `before.json` or `after.json`.
    The depth of a token is the number of layers run in the pass that produced the token. The
    intervals of depth and layers are bootstrapped over problems.
    """

    policy: str = Field(
        description="full, sample, threshold:X, confidence:X, fixed:N, or a control."
    )
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
        """The wall time per answer in seconds when problems are decoded in batches.

        The time is NaN if the decoding speed was not measured.
        """
        speed = self.tokens_per_second
        return self.completion_length / speed if speed > 0 else math.nan

    @property
    def kind(self) -> str:
        """The policy's name without its argument, such as `threshold` for `threshold:0.5`."""
        return self.policy.partition(":")[0]

    @property
    def is_control(self) -> bool:
        """Whether the policy is a control, which matches the mean depth of another policy.

        The policy `fixed:N` is not a control.
        """
        return self.control_of is not None


class ControlDifference(Record):
    """The accuracy and the share of layers of a policy less those of its control.

    A control has about the policy's mean depth, but does not choose which tokens stop early. A
    positive difference of the accuracies is the gain from this choice.
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
    """The agreement between the predictions of one exit and those of the last layer.

    The averages cover the passes that can leave early: all but the first pass of each completion.
    """

    exit: Count = Field(description="The exit, given by the number of layers run before it.")
    kl_nats: Number = Field(description="Mean KL(π_L ‖ π_e) in nats.")
    same_token: Number = Field(description="Share of passes with the same most likely token.")
    close: Number = Field(description="Share of passes with a KL under 0.05 nats.")


class EarlyLeaving(Record):
    """The agreement with full depth when each token leaves at the first exit under a threshold.

    The threshold applies to the KL between the last layer's prediction and the exit's. If no exit
    has a KL under `threshold_nats`, the token runs all layers.
    """

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
    """The calibration of one exit's hazards, over the passes that reach the exit.

    A hazard is the probability of leaving at an exit that has been reached.
    """

    exit: Count
    ece: Finite = Field(description="Expected calibration error.")
    positions: Count
    hazard_mean: Finite
    target_mean: Finite
    bins: tuple[HazardBin, ...] = ()


class HazardCalibration(Record):
    """The calibration of the exits' hazards against target hazards, over a policy's completions.

    A hazard is the probability of leaving at an exit that has been reached.
    """

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


class SerialDepth(Record):
    """The opaque serial depth of a policy's tokens: operations on the longest path of a pass.

    `jexit.evaluation.serial_depth` defines what counts as an operation.
    """

    policy: str
    length: Count = Field(description="Tokens over which a pass attends.")
    by_depth: dict[LayerCount, Count] = Field(
        description="Serial depth of a pass, by the number of layers that it runs."
    )
    full: Count = Field(description="Serial depth of a pass through all layers.")
    mean: Number = Field(description="Mean over the tokens, at the depths that were run.")


class Planning(Record):
    """How well a linear probe of the residual at one depth predicts a token that is to come.

    The control is the same probe on the embedding of the token that the pass reads.
    """

    policy: str
    layer: Count = Field(description="The number of layers below the residual.")
    ahead: Positive = Field(description="k: the pass that produces token t predicts token t + k.")
    accuracy: Share
    accuracy_embedding: Share = Field(description="The control's accuracy.")
    gain_ci95: Interval = Field(description="Interval of the gain over the control.")
    passes: Count


class CurvePoint(Record):
    """The results when the answer is forced after a part of the chain of thought.

    `same_answer` and `right` are shares of problems.
    """

    kept: Share = Field(description="Share of the steps after which the answer was forced.")
    same_answer: Number = Field(
        description="Share of answers that equal the whole completion's answer."
    )
    of_whole: Number = Field(
        math.nan, description="`same_answer` divided by its value with the whole chain."
    )
    right: Number = Field(description="Share of correct answers.")


class Measure(Record):
    """The result of one measure of faithfulness, which tests whether answers use their chains.

    `jexit.evaluation.faithfulness` defines `value` and the entries of `detail`.
    """

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
    """The results of a policy, and the measures of faithfulness of its chains of thought.

    The results are those without any intervention.
    """

    policy: str
    problems: Count
    accuracy: Number
    depth_fraction: Number
    completion_length: Number
    measures: tuple[Measure, ...]


class PairedMeasure(Record):
    """The values of one measure under two policies, `policy` and `against`, and their difference.

    The values cover the problems for which both policies have a value. `difference` is `value` −
    `against_value`.
    """

    policy: str
    against: str
    measure: str
    value: Number
    against_value: Number
    difference: Number
    difference_ci95: Interval | None = None
    problems: Count


class Capacity(Record):
    """The accuracy of a policy when the steps of its chains have one prescribed size.

    The prompt prescribes the size of all steps, or a forced prefix prescribes the size of the first
    step.
    """

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
    """The contents of `eval.json`: the results of one model under several policies.

    The tuples after `runs` are empty for measures that were not requested.
    """

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
    serial_depth: tuple[SerialDepth, ...] = ()
    planning: tuple[Planning, ...] = ()
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
        """Returns the finite numbers of all parts except `exits`, by path.

        Examples of paths are `sample/accuracy` and `full/capacity/3/obeyed`.
        """
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
        for part in ("hazards", "serial_depth"):
            for entry in getattr(self, part):
                found |= numbers(f"{entry.policy}/{part}", entry)
        for probed in self.planning:
            place = f"{probed.policy}/planning/{probed.layer}/{probed.ahead}"
            found |= numbers(place, probed)
        return found


class Completion(Record):
    """One completion, with the number of layers run for each of its tokens.

    The record is an entry of `completions.json`, or a line of `samples.jsonl`. Only lines of
    `samples.jsonl` contain `step` and `reward`.
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
    """Returns the finite numbers in `value` by path, where every path begins with `place`.

    The ends of an interval have the paths `…/low` and `…/high`.
    """
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

    Raises UserError for the first field that is missing or invalid. `where` names the file in the
    error message.
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
    """Returns a pydantic error as a sentence with the place, the value and the rule.

    `where` names the file that contains the value.
    """
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

    `place` contains the keys and list indices that lead to the field. Keys are escaped and
    shortened.
    """
    parts = (f"[{p}]" if isinstance(p, int) else f".{repr(p[:40])[1:-1]}" for p in place)
    path = "".join(parts).removeprefix(".")
    return f"{where}: {path}" if path else where


def _shown(value: Any) -> str:
    """Returns the `repr` of a value for an error message, cut off after 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

"""The schemas of the files with a run's measurements, such as `eval.json` and `completions.json`.

A file that an older jexit or another program wrote is either read, or refused with a UserError of
one sentence. Fields without a default are in every file that jexit has ever written. Fields with a
default were added later or are measured on demand, and a file contains them only if they were set.
Unknown fields are ignored.

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
REMEDY = "delete the file, or repeat the command that wrote it"

Kind = TypeVar("Kind")


def _fits(fits: Any, wanted: str) -> AfterValidator:
    """Returns a validator that accepts a value if `fits(value)` is true.

    `wanted` is the end of the error message, such as "a fraction from 0 to 1".
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
Share = Annotated[
    Finite, _fits(lambda value: not (value < 0 or value > 1), "a fraction from 0 to 1")
]
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
        """Writes the explicitly set fields to `path` as JSON; replaces the file atomically."""
        write_json_atomic(path, self.model_dump(exclude_unset=True))


class ClassDepth(Record):
    tokens: Count  # number of tokens of the class
    depth_mean: Finite  # mean layers run per token


class PolicyResult(Record):
    """The results of one policy: an entry of `runs` in `eval.json`, `before.json` or `after.json`.

    The depth of a token is the number of layers run in the pass that produced the token. The
    confidence intervals of depths and layers are bootstrapped over problems.
    """

    policy: str  # full, sample, threshold:X, confidence:X, fixed:N, or a control
    accuracy: Share  # fraction of correct answers
    accuracy_ci95: Interval  # Wilson's interval of the accuracy
    depth_mean: Finite  # mean layers run per token
    depth_fraction: Share  # mean fraction of all layers run per token
    depth_fraction_ci95: Interval | None = None
    layers_per_problem: Number = math.nan  # sum of a completion's depths: the cost of an answer
    layers_per_problem_ci95: Interval | None = None
    depth_histogram: dict[LayerCount, Count] = {}  # tokens by layers run
    depth_by_class: dict[str, ClassDepth] | None = None  # mean depth per class of token
    problems: Count
    tokens: Count  # tokens of all completions
    completion_length: Number = math.nan  # mean tokens per completion
    truncated: Number = math.nan  # fraction of completions that were cut off
    verdicts: dict[str, Count] = {}  # completions by verdict
    tokens_per_second: Number  # decoding speed without compilation
    text: dict[str, Number] = {}  # the task's own metrics of completions
    control_of: str | None = None  # the policy whose mean depth a control has
    # FLOPs of layers and exit decisions as a fraction of all layers'; a skipped layer is not free
    compute_fraction: Number = math.nan

    @model_validator(mode="after")
    def _layers_of_older_files(self) -> Self:
        if math.isnan(self.layers_per_problem):  # the product of the means is the same
            layers = self.depth_mean * self.completion_length
            object.__setattr__(self, "layers_per_problem", layers)
        return self

    @property
    def seconds_per_problem(self) -> float:
        """The decoding time per problem in seconds, at the speed of a batch; NaN if unknown."""
        speed = self.tokens_per_second
        return self.completion_length / speed if speed > 0 else math.nan

    @property
    def kind(self) -> str:
        return self.policy.partition(":")[0]

    @property
    def is_control(self) -> bool:
        """Whether the policy is a control, chosen to have the mean depth of another policy."""
        return self.control_of is not None


class ControlDifference(Record):
    """The accuracy and the depth fraction of a policy, minus those of the policy's control.

    The control has the same mean depth, so a positive difference of the accuracies is the gain from
    choosing which tokens stop early.
    """

    policy: str
    control: str
    accuracy_difference: Number
    accuracy_difference_ci95: Interval | None = None  # its interval, paired over problems
    depth_fraction_difference: Number  # difference of the fractions of layers run
    depth_fraction_difference_ci95: Interval | None = None  # its interval, paired over problems
    problems: Count


class ExitAgreement(Record):
    """The agreement between the predictions of one exit and those of the last layer.

    The averages cover the passes that can leave early: all but the first pass of each completion.
    """

    exit: Count  # the exit, given by the number of layers run before it
    kl_nats: Number  # mean KL(π_L ‖ π_e) in nats
    same_token: Number  # fraction of passes with the same most likely token
    close: Number  # fraction of passes with a KL under 0.05 nats


class EarlyLeaving(Record):
    """The agreement with full depth if tokens left as soon as an exit is close to the last layer.

    Each token leaves at the first exit whose KL to the last layer is below `threshold_nats`, and
    otherwise runs all layers.
    """

    threshold_nats: Number
    depth_fraction: Number  # mean fraction of all layers run per token
    kl_nats: Number  # mean KL from full depth in nats
    same_token: Number  # fraction of tokens with the same most likely token
    # the same fraction among the tokens that run all layers; NaN if there are none
    same_token_full_depth: Number = math.nan


class ExitQuality(Record):
    policy: str
    passes: Count  # passes that could leave
    exits: tuple[ExitAgreement, ...]
    leaving: tuple[EarlyLeaving, ...]


class HazardBin(Record):
    low: Finite
    high: Finite
    hazard_mean: Finite
    target_mean: Finite
    positions: Count


class ExitCalibration(Record):
    """How well the hazards of one exit are calibrated, over the passes that reach the exit."""

    exit: Count
    ece: Finite  # expected calibration error
    positions: Count
    hazard_mean: Finite
    target_mean: Finite
    bins: tuple[HazardBin, ...] = ()


class HazardCalibration(Record):
    """How closely the hazards of exits match target hazards, over a policy's completions.

    A hazard is the probability of leaving at an exit that has been reached. The target hazard is a
    function of the KL between the exit and the last layer (see `sharpness`).
    """

    policy: str
    sharpness: Number  # the factor k in the target 1 − tanh(k·KL / 2)
    target: str = "teacher"  # the model whose exits define the target: teacher or student
    ece: Number  # expected calibration error, averaged over exits with decisions as weights
    # mean KL(student ‖ teacher) at the policy's depths, in nats
    kl_student_teacher_nats: Number | None = None
    exits: tuple[ExitCalibration, ...]


class SerialDepth(Record):
    """The opaque serial depth of a policy's tokens, defined in `jexit.evaluation.serial_depth`."""

    policy: str
    length: Count  # tokens over which a pass attends
    # serial depth of a pass, by the number of layers that it runs
    by_depth: dict[LayerCount, Count]
    full: Count  # serial depth of a pass through all layers
    mean: Number  # mean over the tokens, at the depths that were run


class Planning(Record):
    """How well a linear probe on the residual at one depth predicts a later token.

    The control is the same probe on the embedding of the token that the pass reads.
    """

    policy: str
    layer: Count  # the number of layers below the residual
    ahead: Positive  # k: the pass that produces token t predicts token t + k
    accuracy: Share
    accuracy_embedding: Share  # the control's accuracy
    gain_ci95: Interval  # interval of the gain over the control
    passes: Count


class CurvePoint(Record):
    """The results when the answer is forced after only a part of the chain of thought."""

    kept: Share  # fraction of the steps after which the answer was forced
    same_answer: Number  # fraction of answers that equal the whole completion's answer
    of_whole: Number = math.nan  # `same_answer` divided by its value with the whole chain
    right: Number  # fraction of correct answers


class Measure(Record):
    """The result of one test of whether answers depend on their chains of thought.

    `jexit.evaluation.faithfulness` defines `value` and the entries of `detail`.
    """

    name: str
    value: Number
    ci95: Interval | None = None  # the interval of the value, over problems
    problems: Count
    depth_fraction: Number = math.nan  # mean fraction of all layers run for the replies' tokens
    completion_length: Number = math.nan  # mean tokens per reply
    detail: dict[str, Number] = {}  # the numbers behind the value
    curve: tuple[CurvePoint, ...] | None = None
    caveat: str | None = None  # the reason why the value is less informative than it seems


class Faithfulness(Record):
    """The measures of a policy's faithfulness, and the policy's results without interventions.

    A chain of thought is faithful if the answer depends on it.
    """

    policy: str
    problems: Count
    accuracy: Number
    depth_fraction: Number
    completion_length: Number
    measures: tuple[Measure, ...]


class PairedMeasure(Record):
    """The difference of a measure between two policies, on the problems that have both values."""

    policy: str
    against: str
    measure: str
    value: Number
    against_value: Number
    difference: Number
    difference_ci95: Interval | None = None
    problems: Count


class Capacity(Record):
    """The accuracy of a policy when steps in the chain of thought have a prescribed size.

    Either the prompt prescribes the size of all steps, or a forced prefix (the given beginning of
    the completion) fixes the size of the first step.
    """

    policy: str
    granularity: str  # operands per step, or the name of the step size
    problems: Count
    accuracy: Share  # fraction of correct answers, or of correct steps
    accuracy_ci95: Interval | None = None
    depth_fraction: Share  # mean fraction of all layers run per token
    completion_length: Number = math.nan  # mean tokens per completion
    step_size: Number | None = None  # mean operands per step that was written
    obeyed: Number | None = None  # fraction of completions with the prescribed steps
    accuracy_obeyed: Number | None = None  # accuracy of the completions with the prescribed steps
    accuracy_obeyed_ci95: Interval | None = None
    left_out: Count = 0  # problems for which the model had no room
    less_full: Number | None = None  # accuracy less the accuracy at full depth on the same problems
    less_full_ci95: Interval | None = None


class ModelDescription(Record):
    path: str
    layers: Positive
    exits: tuple[Count, ...] = ()


class Evaluation(Record):
    """The contents of `eval.json`: the results of one model under several policies.

    The tuples after `runs` are empty for measures that were not requested.
    """

    version: Count = 0  # version of this schema
    complete: Annotated[bool, Strict()] = True  # whether the evaluation has finished
    task: dict[str, Any]  # the section `task` of the config
    split: str = "test"  # the split of the task's problems
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
        """Returns all finite results, except in `exits`, by path, such as `sample/accuracy`."""
        placed: list[tuple[str, Record]] = [(run.policy, run) for run in self.runs]
        placed += [(f"{pair.policy} less {pair.control}", pair) for pair in self.controls]
        placed += [
            (f"{both.policy} less {both.against}/faithfulness/{both.measure}", both)
            for both in self.faithfulness_paired
        ]
        placed += [
            (f"{entry.policy}/faithfulness/{measure.name}", measure)
            for entry in self.faithfulness
            for measure in entry.measures
        ]
        for part in ("capacity", "begun_steps"):
            steps = getattr(self, part)
            placed += [(f"{step.policy}/{part}/{step.granularity}", step) for step in steps]
        for part in ("hazards", "serial_depth"):
            placed += [(f"{entry.policy}/{part}", entry) for entry in getattr(self, part)]
        placed += [(f"{p.policy}/planning/{p.layer}/{p.ahead}", p) for p in self.planning]
        found: dict[str, float] = {}
        for place, record in placed:
            found |= numbers(place, record)
        return found


class Completion(Record):
    """One completion, with the number of layers run for each of its tokens.

    The record is an entry of `completions.json`, or a line of `samples.jsonl`, which also contains
    `step`, `reward` and `rewards`.
    """

    prompt: str
    completion: str
    tokens: tuple[str, ...]
    depths: tuple[Count, ...]  # layers run for each token
    policy: str = "sample"
    verdict: str = ""
    answer: str = ""
    # P(leave) of each token at each exit; null at exits that it did not reach
    hazards: tuple[tuple[Number | None, ...] | None, ...] | None = None
    step: Count | None = None
    reward: Number | None = None
    rewards: dict[str, Number] = {}  # the parts of `reward`, by reward function

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
    """Returns the finite numbers in `value` by path; `place` is the beginning of every path.

    A pair of numbers is an interval, with the paths PATH/low and PATH/high. Other sequences,
    strings and booleans are left out.
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
    """Converts a JSON value to the type `kind`, such as a record or a tuple of records.

    Raises UserError for the first missing or invalid field; the message names the file `where`.
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
    """Returns the message for a pydantic error, with the file `where`, field, value and rule."""
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
    """Returns the location of a field in a file, such as `eval.json: runs[1].accuracy`."""
    parts = (f"[{p}]" if isinstance(p, int) else f".{repr(p[:40])[1:-1]}" for p in place)
    path = "".join(parts).removeprefix(".")
    return f"{where}: {path}" if path else where


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

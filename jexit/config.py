"""All settings of jexit: defaults, allowed values, meanings, and checks of their combinations.

A file in `configs/` starts from the defaults that `config_dict(command, preset)` returns, and sets
only what differs. `main` passes the parsed `ConfigDict` to `Config.from_dict`, which checks the
values and returns the frozen `Config` of the run. `docs/configuration.py` makes the list of
settings in docs/configuration.md from this file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from ml_collections import ConfigDict

from jexit.errors import UserError
from jexit.presets import PRESETS
from jexit.settings import (
    Bounds,
    Coefficient,
    Count,
    CountOrZero,
    LearningRate,
    Length,
    Name,
    Names,
    Options,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Signed,
    Steps,
    StepsOrZero,
    Temperature,
    TemperatureOrGreedy,
    build,
    check,
    shown,
)

Command = Literal["pretrain", "finetune", "sft", "rl", "eval", "generate"]
COMMANDS: tuple[Command, ...] = get_args(Command)
TRAINING = COMMANDS[:4]
TINY_PRESET = "tiny"
TINY_PATH = "jexit/assets/tiny"
TINY_CALIBRATED_PATH = "jexit/assets/tiny-calibrated"

Layer = Annotated[int, Bounds(1, 1_000)]
MessageText = Annotated[str, Length(1_000_000)]
HazardTarget = Literal["teacher", "student", "own"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
ChainMeasure = Literal[  # of whether the answer depends on the chain of thought
    "early_answering",
    "no_chain",
    "filler",
    "corrupted_step",
    "hint",
    "necessity",
    "substantivity",
    "paraphrasability",
]
CHAIN_MEASURES: tuple[ChainMeasure, ...] = get_args(ChainMeasure)
MeasureName = Literal[
    "exits",
    "hazards",
    "serial_depth",
    "planning",
    "capacity",
    ChainMeasure,
]
EVAL_MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)

# The largest products of settings, by command: texts or tokens that are in memory at once.
_EVALUATED = {("eval.problems", "eval.max_new_tokens"): 2**30}
MOST_TOGETHER = {
    "pretrain": {("batch_size", "pretrain.length"): 2**30},
    "finetune": {("batch_size", "finetune.max_new_tokens"): 2**30, **_EVALUATED},
    "sft": {
        ("batch_size", "sft.max_new_tokens"): 2**30,
        ("sft.generate_batch", "sft.max_new_tokens"): 2**30,
        **_EVALUATED,
    },
    "rl": {
        ("batch_size", "rl.rollouts"): 1_000_000,
        ("batch_size", "rl.rollouts", "rl.max_new_tokens"): 2**30,
        **_EVALUATED,
    },
    "eval": _EVALUATED,
    "generate": {},
}
MOST_PARAMETERS = 10**10  # in a trunk that is trained from random weights

# The settings, by section, under which exits are trained. The model keeps them.
TRAINED_UNDER = {"rl": ("hazard_temperature", "min_hazard"), "sft": ("sharpness", "target")}

# The metrics that can rank checkpoints, for each command that trains. In RL they are measured on
# the validation split before a checkpoint is written, because the reward of the training batches
# falls while λ and μ rise, whether or not the model becomes worse.
BEST_METRICS = {
    "pretrain": ("loss", "loss/text"),
    "finetune": ("loss",),
    "sft": ("loss", "loss/exit", "kl/teacher", "depth/fraction"),
    "rl": ("val/reward", "val/accuracy", "val/depth_fraction", "val/layers_per_problem"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the layers of a model are computed; these settings change results only by rounding."""

    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """The implementation of attention over whole sequences (training, scoring, prefill). cudnn is
    for NVIDIA GPUs and splash for TPUs. auto selects splash on TPUs for sequences of 2,048
    positions or more, and xla otherwise."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass recomputes to save memory: nothing (none), each layer (block), or
    everything except matrix products (dots)."""
    scan_unroll: Annotated[int, Bounds(1, 1_000)] = 1
    """The number of layers per iteration of the compiled loop; on CPUs, all layers is fastest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Execution):
    """Where the weights come from and how the model is computed."""

    path: Name = TINY_PATH
    """The model: a directory written by convert.from_hf or by a run, a directory in Hugging Face
    format, or a hub id in the local cache."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the base weights; auto selects float32 on CPUs and where all weights train
    (lora.rank=0), and otherwise bfloat16."""
    kernels: Literal["auto", "xla"] = "auto"
    """The implementation of log-probabilities and KLs over the vocabulary, and of attention in
    decoding. auto uses Pallas kernels if there are any for the chip. `jexit.doctor` reports where
    xla has to replace them."""

    @property
    def execution(self) -> Execution:
        return Execution(attention=self.attention, remat=self.remat, scan_unroll=self.scan_unroll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuationSettings:
    """What replaces the layers that a token skips after it has left at an exit."""

    continuation: Literal["frozen", "linear"] = "frozen"
    """frozen, as published: the token's residual stays as it was at the exit. linear: a linear map
    replaces each skipped layer."""
    continuation_rank: Annotated[int, Bounds(0, 1_000_000)] = 0
    """The rank of factored linear maps; 0 means full matrices."""

    def check_rank(self, where: str = "") -> None:
        """Raises UserError if a frozen continuation, which has no matrices, is given a rank.

        `where` precedes the names of the settings in the message.
        """
        if self.continuation_rank and self.continuation == "frozen":
            raise UserError(
                f"{where}continuation_rank is {self.continuation_rank}, but a frozen continuation "
                f"has no matrices; set {where}continuation=linear or {where}continuation_rank=0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitsConfig(ContinuationSettings):
    """The exits, at which tokens may leave, and what replaces the layers that those tokens skip."""

    layers: Annotated[tuple[Layer, ...], Length(1_000)] = ()
    """The exits, each given as the number of layers that a token has run when it leaves there. If
    empty, the exits of the checkpoint are used, or every 5th layer if it has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitHead:
    """The shape and the initial values of the exit heads, which compute each exit's hazard.

    A hazard is the probability that a token leaves at an exit that it has reached.
    """

    kind: Literal["mlp", "linear"] = "mlp"
    """mlp: a head with one hidden layer of twice the model's width. linear: no hidden layer."""
    norm: Literal["rms", "none"] = "rms"
    """The normalisation that a head applies to the residual."""
    bias: Signed = -4.0
    """The initial output bias. With the default, tokens almost never leave at an untrained head."""
    detached: bool = False
    """Whether hazards train only the heads: their gradient then stops at the residuals that the
    heads read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitSettings(ExitHead, ContinuationSettings):
    """The settings of a model's exit heads and of the continuation that replaces skipped layers.

    The last four fields are the settings of `RLConfig` and `SFTConfig` under which the heads were
    trained; None means that they are not known.
    """

    hazard_temperature: Temperature | None = None
    min_hazard: ShareBelowOne | None = None
    sharpness: Positive | None = None
    target: HazardTarget | None = None

    def __post_init__(self) -> None:
        check(self)
        self.check_rank()

    def check_width(self, width: int) -> None:
        """Raises UserError unless the continuation's rank is below the model's width, `width`."""
        if self.continuation_rank >= width:
            raise UserError(
                f"exits.continuation_rank is {self.continuation_rank}, but it must be smaller than "
                f"the model's width {width}; lower it, or set it to 0 for full matrices"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """LoRA adapters (arXiv:2106.09685): a projection y of x becomes
    y + (alpha / rank) · dropout(x) · A · B."""

    rank: Annotated[int, Bounds(0, 10_000)] = 8
    """The rank of the adapters. 0 means full fine-tuning, with a second copy of the weights as the
    teacher."""
    alpha: Positive = 16.0
    """The scale of the adapters' update; it is divided by the rank."""
    dropout: ShareBelowOne = 0.0
    """The fraction of an adapter's inputs that are dropped in training; published: 0.05."""
    targets: Annotated[tuple[Projection, ...], Length(100)] = ("q", "k", "v", "o")
    """The projections that have an adapter."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The problems, the format of their prompts, and the rewards for answers."""

    name: Name = "sums"
    """The task: sums, word_problems, gsm8k, tom, exploretom, blend (several tasks in turn), or your
    own as FILE.py:NAME or MODULE:NAME."""
    path: Name = ""
    """The task's data. For gsm8k: a JSONL file, a directory of such files, or a tfds data
    directory. For tom and exploretom: a CSV file with the columns story, question and answer, or a
    directory of such files."""
    options: Options = dataclasses.field(default_factory=dict)
    """The task's own settings, such as options.operands_max=6; see docs/tasks.md."""
    time_limit: Annotated[float, Bounds(0.1, 86_400)] = 60.0
    """The number of seconds that the task's reward functions may take per batch."""
    system: MessageText = ""
    """The system message before every prompt. If empty, there is none, or the chat template's
    own."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether prompts turn thinking on or off, if the chat template supports that (Qwen3's does).
    auto leaves it to the template."""
    max_prompt_tokens: Count = 256
    """The largest number of tokens in a prompt. A longer prompt stops the run, unless skip_long is
    set."""
    skip_long: bool = False
    """Whether to skip, and count, problems whose prompt is longer than max_prompt_tokens."""
    reward_strict: Signed = 1.0
    """The reward for a correct answer in the task's format, in the tasks of jexit."""
    reward_lenient: Signed = 0.5
    """The reward for a correct answer that only the lenient parser finds, in the tasks of jexit."""
    reward_wrong: Signed = 0.0
    """The reward for a wrong answer, in the tasks of jexit."""
    reward_none: Signed = -1.0
    """The reward for a completion without an answer, in the tasks of jexit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each mesh axis; a run uses the product of the three."""

    data: Count = 1
    """Devices that divide the rows and each have a copy of the parameters."""
    fsdp: Count = 1
    """Devices that divide the rows and also the parameters, which are gathered layer by layer."""
    tensor: Count = 1
    """Devices that divide the attention heads, the MLP and the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101), its learning rates and its schedule."""

    lora_lr: LearningRate = 1e-4
    """The peak learning rate of the adapters; the default is the published value."""
    exit_lr: LearningRate = 1e-5
    """The peak learning rate of the exit heads; the default is the published value."""
    exit_hidden: Share = 1.0
    """The learning rate of the heads' hidden layers, as a fraction of exit_lr. At 0, only the
    output layers train, on fixed features. Otherwise, Adam moves each of the many hidden parameters
    by about its learning rate, driven by the noise of the policy gradient."""
    exit_bias: Annotated[float, Bounds(0, 1000)] = 1.0
    """The learning rate of the heads' output biases, as a multiple of exit_lr. The depth penalty
    moves mostly these few numbers; at a high rate they follow it, while the thousands of other
    weights, which Adam moves as fast, would collect the noise of the policy gradient."""
    continuation_lr: LearningRate = 0.0
    """The peak learning rate of the linear continuation. At 0, it keeps its ridge fit. It reads
    unnormalised residuals with values of several hundred, so even 1e-5 spoils a real model within
    ten updates."""
    full_lr: LearningRate = 1e-5
    """The peak learning rate of the base weights, in pretraining and if lora.rank is 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The shape of the learning rates after the warm-up."""
    warmup_steps: StepsOrZero = 0
    """The number of updates in which the learning rates rise linearly to their peaks."""
    final_fraction: Share = 0.0
    """The fraction of the peak learning rates at the last step of a linear or cosine schedule."""
    b1: ShareBelowOne = 0.9
    """The decay of Adam's first moment."""
    b2: ShareBelowOne = 0.999
    """The decay of Adam's second moment."""
    eps: Annotated[float, Bounds(1e-16, 1)] = 1e-8
    """The constant that Adam adds to the root of the second moment."""
    weight_decay: Coefficient = 0.0
    """The coefficient of decoupled weight decay, which is multiplied by the learning rate."""
    clip_norm: Positive = 1.0
    """The largest global norm of a step's gradient; a larger gradient is scaled down to it."""
    accumulate: Count = 1
    """The number of micro-batches per step. Every token has the same weight as without them."""
    max_skipped: Count = 5
    """The number of consecutive steps, skipped because they were not finite, that stops the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training of a model without exits and adapters (a trunk) on the tasks' own text."""

    start: Name = ""
    """A model directory whose trunk is trained further. If empty, training starts from random
    weights."""
    length: Count = 144
    """The number of tokens per row; a row contains several texts."""
    width: Count = 96
    """The width of the residual."""
    layers: Layer = 8
    """The number of layers."""
    query_heads: Count = 4
    """The number of query heads per layer."""
    kv_heads: Count = 4
    """The number of key/value heads per layer."""
    head_dim: Count = 24
    """The width of an attention head."""
    mlp_width: Count = 256
    """The width of the MLP's hidden layer."""
    rope_theta: Annotated[float, Bounds(1, 1e9)] = 1e4
    """The base of the rotary embeddings' wavelengths (arXiv:2104.09864)."""
    word_problems: Share = 0.2
    """The fraction of word problems among the texts. Texts of neither kind are sums."""
    tom: Share = 0.0
    """The fraction of theory-of-mind stories among the texts."""
    exit_loss: Coefficient = 0.0
    """The weight of the cross-entropy at the exits' logit lens (deep supervision,
    arXiv:1409.5185)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Training by cross-entropy on reference completions, in the model's chat format."""

    max_new_tokens: Count = 256
    """The largest number of tokens in a reference, including its end-of-sequence token. A longer
    reference stops the run."""
    policy: Literal["full", "sample"] = "full"
    """full: the references run all layers, and the result is a plain trunk without exits. sample:
    their tokens exit at depths drawn from the model's trained exits, which stay as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Calibration of the exits by self-distillation (arXiv:2603.21376, stage 1)."""

    samples: Annotated[int, Bounds(1, 1_000)] = 4
    """S, the number of depth assignments that are drawn per sequence."""
    sharpness: Positive = 1.0
    """k in the target hazard 1 − tanh(k · KL / 2), where KL is that of an exit to the last layer,
    in nats."""
    exit_coef: Coefficient = 1.0
    """The weight of the heads' loss. The KL between student and teacher has weight 1."""
    explore: Share = 0.0
    """The probability that a depth is drawn uniformly, so that the student also learns to finish at
    exits where the teacher could not; published: 0. A value above 0 requires exit_loss=expected."""
    target: HazardTarget = "teacher"
    """The model at whose exits the target hazards are measured: the teacher, as published, or the
    student, whose exits improve. They are compared with the teacher's last layer; with own, exits
    of the student are compared with its own."""
    direction: Literal["student_teacher", "teacher_student", "jeffreys"] = "student_teacher"
    """The direction of the KL between student and teacher: KL(student ‖ teacher),
    KL(teacher ‖ student), or the sum of both (jeffreys)."""
    exit_loss: Literal["sampled", "expected"] = "sampled"
    """The heads' loss: −log P(d) of the drawn depths (sampled), as published, or its expectation
    under the target hazards (expected)."""
    lens_steps: StepsOrZero = 0
    """The number of steps, after the first `steps`, in which only the hazard heads train. With
    steps=0, the trunk does not change."""
    lens_tokens: Annotated[int, Bounds(1, 2**26)] = 65_536
    """The number of tokens, stored at all exits, on which the heads train in the lens steps."""
    kl_tolerance: Positive = 0.05
    """κ in the heads' loss of the lens steps, in nats: hazards exceed ½ where leaving is expected
    to cost a KL to the last layer below κ."""
    trajectories: Literal["generate", "dataset"] = "generate"
    """The source of the sequences: the teacher's own generations (generate), or the task's
    references (dataset)."""
    pool: Count = 512
    """The number of trajectories, which are generated once and stored in WORKDIR/teacher. A run
    with another pool of at least generate_batch, or other settings of training, can start with a
    copy of this folder."""
    completions: Annotated[int, Bounds(1, 1_000)] = 1
    """The number of completions per prompt. They share a row and a copy of the prompt, which saves
    work if prompts are long. A very certain model repeats its completions, and repetitions teach
    the adapters and heads less."""
    temperature: TemperatureOrGreedy = 1.0
    """The sampling temperature of the trajectories; 0 means greedy decoding."""
    max_new_tokens: Count = 256
    """The largest number of tokens in a trajectory's completion."""
    generate_batch: Annotated[int, Bounds(1, 100_000)] = 64
    """The number of trajectories that are generated at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """RLOO over tokens and depths with a depth penalty (arXiv:2603.21376, stage 2)."""

    rollouts: Annotated[int, Bounds(1, 10_000)] = 6
    """G, the number of completions per prompt; at least 2."""
    depth_coef: Coefficient = 0.5
    """λ, the coefficient of the depth penalty."""
    depth_norm: Literal["mean", "total"] = "mean"
    """The depth cost that λ multiplies. mean: the mean of depth / L over tokens, as published,
    which shallow filler lowers. total: the sum of depth / L, divided by length_ref, which measures
    the compute of the answer."""
    kl_coef: Coefficient = 0.1
    """β, the coefficient of the penalty on the KL to the teacher in the reward."""
    length_coef: Coefficient = 0.0
    """μ, the coefficient of the penalty on the number of tokens divided by length_ref."""
    length_ref: Annotated[float, Bounds(1, 1_000_000)] = 256.0
    """T_ref, the number of tokens by which the length penalty and depth_norm=total are divided."""
    advantage: Literal["rloo", "group_mean", "group_mean_std"] = "rloo"
    """rloo: the reward minus the mean of the prompt's other completions (arXiv:2402.14740).
    group_mean: the reward minus the mean of all of the prompt's completions. group_mean_std: the
    latter, divided by their standard deviation (arXiv:2402.03300)."""
    temperature: Temperature = 1.0
    """The sampling temperature of the rollouts' tokens."""
    max_new_tokens: Count = 256
    """The largest number of tokens in a rollout."""
    norm: Literal["constant", "sequence", "tokens"] = "constant"
    """The number that divides a completion's loss: a constant, the completion's own length
    (sequence) or the number of tokens in the batch (tokens). Only the constant gives the gradient
    of the mean reward. With the others, a token counts more in shorter texts."""
    updates_per_batch: Annotated[int, Bounds(1, 20)] = 1
    """The number of optimiser steps per batch. More than one uses PPO's clipped ratio
    (arXiv:1707.06347)."""
    clip: Positive = 0.2
    """The largest change of PPO's ratio from 1."""
    kl_loss_coef: Coefficient = 0.0
    """The weight of a KL to the teacher in the loss."""
    kl_loss: Literal["exact", "forward", "k2", "k3"] = "exact"
    """The KL in the loss. exact: KL(student ‖ teacher) over all next tokens. forward:
    KL(teacher ‖ student), whose gradient is bounded, while that of exact grows with the teacher's
    certainty. k2 and k3 use only the sampled tokens; on average, k2 has the gradient of exact and
    k3 that of forward."""
    causal_depth: bool = False
    """Whether a token is charged only for the depths at and after it."""
    depth_entropy_coef: Coefficient = 0.0
    """The weight of a bonus on the entropy of depths, which keeps exits from shutting."""
    min_hazard: ShareBelowOne = 0.0
    """The smallest hazard, which keeps up exploration. It is part of the distribution that is
    scored."""
    hazard_temperature: Temperature = 1.0
    """The temperature that divides the heads' logits wherever depths are sampled."""
    warmup_steps: StepsOrZero = 0
    """The number of updates over which λ and μ rise linearly to their full values. Updates at which
    accuracy is below accuracy_floor do not count."""
    dual_ascent: bool = False
    """Whether λ and μ rise by dual_rate per update while accuracy is at or above the floor, and
    fall by it otherwise."""
    dual_rate: Share = 0.02
    """The change of λ and μ per update of dual ascent, as a fraction of their full values."""
    accuracy_floor: Share = 0.0
    """The accuracy below which λ and μ are withheld; 0 means that they never are."""
    floor_of: Literal["absolute", "initial"] = "absolute"
    """Whether accuracy_floor is an accuracy (absolute), or a fraction of the initial model's
    accuracy at full depth (initial)."""
    stop_on_collapse: bool = True
    """Whether to stop the run when accuracy has halved while nearly all tokens leave at the first
    exit or completions have become short. The run's model is then the last checkpoint before the
    collapse."""
    importance_cap: Coefficient = 0.0
    """The largest importance weight between sampler and trainer; 0 means no importance weights."""
    mask_truncated: bool = False
    """Whether to leave completions that reached max_new_tokens out of the loss and the baseline. To
    reach the limit then also costs nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSize:
    """The size of each data shard's decoding engine; 0 lets the engine choose a number.

    The engine decodes a pool of completions (rows). A tick runs up to `tick_rows` of these rows
    through the layers between two exits (a segment). Early exits save time if the pool has about
    three times as many rows as a tick, because rows that wait at other segments then replace rows
    that have left.
    """

    rows: CountOrZero = 0
    """The number of completions in the pool. With 0, the pool's keys and values take at most a
    fixed share of an accelerator's memory."""
    tick_rows: CountOrZero = 0
    """The number of rows in a tick, which runs the layers between two exits."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The measurements of configs/eval.py, and of training runs before and after the training."""

    problems: Annotated[int, Bounds(1, 100_000)] = 256
    """The number of problems, from the beginning of the split."""
    policies: Names = ("full", "sample")
    """The policies to evaluate: full, sample, threshold:X, confidence:X, fixed:LAYERS, and the
    controls shuffled and fixed:matched. A control has the mean depth of sample, or of POLICY if
    `:POLICY` is appended; that policy must come before it."""
    measures: Annotated[tuple[MeasureName, ...], Length(100)] = ()
    """The measures besides accuracy and depth; docs/evaluation.md defines them."""
    measured: Name = "sample"
    """The policy to which `measures` are applied, besides full depth."""
    temperature: TemperatureOrGreedy = 0.0
    """The sampling temperature of the tokens; 0 means greedy decoding."""
    max_new_tokens: Count = 256
    """The largest number of tokens in a completion."""
    split: Literal["train", "val", "test"] = "val"
    """The split to evaluate. Training reports and chooses checkpoints by val; configs/eval.py,
    which measures results, sets test."""
    heat_maps: CountOrZero = 8
    """The number of completions that are stored with the depth of each token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The prompts that configs/generate.py completes, and how it decodes them."""

    prompts: Annotated[tuple[MessageText, ...], Length(10_000)] = ()
    """The user's messages, each in a conversation of its own."""
    policy: Name = "sample"
    """The halting policy: full, sample, threshold:X, fixed:LAYERS or speculate:LAYER."""
    temperature: TemperatureOrGreedy = 0.0
    """The sampling temperature of the tokens; 0 means greedy decoding."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Samples only from the likeliest tokens that together have this probability
    (arXiv:1904.09751)."""
    top_k: CountOrZero = 0
    """Samples only from this number of the likeliest tokens; 0 means all tokens."""
    min_p: Share = 0.0
    """Samples only from tokens with at least this fraction of the likeliest token's probability
    (arXiv:2407.01082)."""
    stop: Names = ()
    """Strings that end a completion."""
    max_new_tokens: Count = 256
    """The largest number of tokens in a completion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The checkpoints that a run keeps, and the one that becomes its model."""

    every: StepsOrZero = 0
    """The number of steps between checkpoints; 0 means one at the end only."""
    keep: Count = 2
    """The number of newest checkpoints to keep."""
    keep_best: CountOrZero = 0
    """The number of best checkpoints to keep as well. They are ranked by the mean of best_metric
    since the checkpoint before."""
    best_metric: Name = ""
    """The metric that ranks checkpoints, with a "-" before its name if lower is better. If empty,
    it is val/reward in RL and -loss otherwise."""
    final: Literal["last", "best"] = "last"
    """The checkpoint from which WORKDIR/model is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The logs of a run besides metrics.jsonl."""

    samples_every: Steps = 20
    """The number of steps after which sample completions are written to samples.jsonl again."""
    samples: CountOrZero = 4
    """The number of sample completions that are written each time."""
    tensorboard: bool = True
    """Whether to write the metrics for TensorBoard as well."""
    wandb_project: Name = ""
    """The Weights & Biases project to which the metrics are sent as well; empty means none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run."""

    command: Command
    """The command that the run executes; each file in configs/ sets it."""
    preset: Name = TINY_PRESET
    """The model whose defaults apply; it follows the colon in --config=FILE:PRESET."""
    seed: Seed = 0
    """The seed of all random numbers."""
    steps: StepsOrZero = 100
    """The number of training steps. Only sft accepts 0, and then trains for lens_steps alone."""
    batch_size: Annotated[int, Bounds(1, 100_000)] = 32
    """The number of sequences per step, or of prompts per step in rl."""
    model: ModelConfig = ModelConfig()
    exits: ExitsConfig = ExitsConfig()
    exit_head: ExitHead = ExitHead()
    lora: LoRA = LoRA()
    task: TaskConfig = TaskConfig()
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    sft: SFTConfig = SFTConfig()
    rl: RLConfig = RLConfig()
    engine: EngineSize = EngineSize()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def adapters(self) -> LoRA | None:
        """The settings of the LoRA adapters that a run trains; None for full fine-tuning."""
        return self.lora if self.lora.rank else None

    @property
    def micro_batch_rows(self) -> int:
        """The number of rows in a micro-batch of a training step; in RL, of completions."""
        samples = self.rl.rollouts if self.command == "rl" else 1
        together = self.sft.completions if self.command == "sft" else 1
        return self.batch_size * samples // (together * self.optim.accumulate)

    @property
    def exit_settings(self) -> ExitSettings:
        """The settings of the exit heads and the continuation that a run trains."""
        trained = {
            name: getattr(getattr(self, section), name)
            for section, names in TRAINED_UNDER.items()
            if self.command in ("sft", section)
            for name in names
        }
        if self.command == "sft" and self.sft.lens_steps:
            trained["target"] = "own"  # of the heads' phase, which is the last
        return ExitSettings(
            **dataclasses.asdict(self.exit_head),
            continuation=self.exits.continuation,
            continuation_rank=self.exits.continuation_rank,
            **trained,
        )

    @property
    def dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """The dtype of the weights; float32 where they train, as bfloat16 loses small updates."""
        full = self.command in TRAINING and self.lora.rank == 0
        return "float32" if full and self.model.dtype == "auto" else self.model.dtype

    @property
    def best_metric(self) -> str:
        """The metric that ranks checkpoints; a "-" before the name means that lower is better."""
        return self.checkpoint.best_metric or ("val/reward" if self.command == "rl" else "-loss")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | ConfigDict) -> Config:
        """Returns a checked config with the settings in `values`.

        Raises UserError if a key does not exist, a value is not allowed or values contradict each
        other.
        """
        config = build(
            cls, values.to_dict() if isinstance(values, ConfigDict) else values, "config"
        )
        config.validate()
        return config

    def validate(self) -> None:
        """Raises UserError if settings contradict each other; checks only what needs no model."""
        _check_preset(self.preset)
        check_rising(self.exits.layers)
        self.exits.check_rank("config.exits.")
        for rules in (_sizes, _calibration, _weights, _checkpoints, _reinforcement):
            for contradiction in rules(self):
                raise UserError(contradiction)
        _check_policies(self)


# Contradictions between settings. Each message is a sentence with values, rule and remedy.


def _sizes(config: Config) -> Iterator[str]:
    """Yields a message for each group of sizes that do not fit together or are too large."""
    accumulate, mesh = config.optim.accumulate, config.mesh
    together = config.sft.completions if config.command == "sft" else 1  # sequences of a row
    if config.batch_size % (accumulate * together):
        yield (
            f"config.batch_size is {config.batch_size}, but it must be a multiple of "
            f"config.optim.accumulate={accumulate}"
            + (f" × config.sft.completions={together}" if together > 1 else "")
            + f"; set it to a multiple of {accumulate * together}"
        )
    shares, rows = mesh.data * mesh.fsdp, config.micro_batch_rows
    if config.command in TRAINING and rows % shares:
        yield (
            f"a micro-batch has {rows} rows, but the number of rows must be a multiple of "
            f"config.mesh.data={mesh.data} × config.mesh.fsdp={mesh.fsdp}; make config.batch_size "
            f"a multiple of {shares * accumulate * together}"
        )
    if config.steps == 0 and not (config.command == "sft" and config.sft.lens_steps):
        yield (
            "config.steps is 0, but only calibration with config.sft.lens_steps above 0 supports "
            "that; set config.steps to at least 1"
        )
    for keys, most in MOST_TOGETHER[config.command].items():
        sizes = [operator.attrgetter(key)(config) for key in keys]
        if math.prod(sizes) > most:
            yield (
                f"config.{' × '.join(keys)} is {' × '.join(map(str, sizes))} = "
                f"{math.prod(sizes)}, but the product must be at most {most}; lower one of them"
            )
    p = config.pretrain
    heads = 2 * p.head_dim * (p.query_heads + p.kv_heads)
    parameters = p.layers * p.width * (heads + 3 * p.mlp_width)
    if config.command == "pretrain" and parameters > MOST_PARAMETERS:
        yield (
            f"config.pretrain requests {parameters} parameters in the blocks, but at most "
            f"{MOST_PARAMETERS} are allowed; lower width, layers, mlp_width or the heads"
        )
    if p.word_problems + p.tom > 1.0:
        yield (
            "config.pretrain.word_problems and config.pretrain.tom add up to "
            f"{p.word_problems + p.tom:g}, but the fractions of the text must add up to at most 1; "
            "lower one of them"
        )


def _calibration(config: Config) -> Iterator[str]:
    sft = config.sft
    if config.command != "sft":
        return
    if sft.completions > 1 and sft.generate_batch % sft.completions:
        yield (
            f"config.sft.generate_batch is {sft.generate_batch}, but it must be a multiple of "
            f"config.sft.completions={sft.completions}; change one of them"
        )
    if sft.completions > 1 and sft.trajectories == "dataset":
        yield (
            f"config.sft.completions is {sft.completions}, but with "
            "config.sft.trajectories=dataset there is one completion per prompt; set "
            "config.sft.completions=1 or config.sft.trajectories=generate"
        )
    if sft.explore > 0 and sft.exit_loss == "sampled":
        yield (
            f"config.sft.explore is {sft.explore:g}, but config.sft.exit_loss=sampled would teach "
            "the heads the explored depths instead of the targets; set "
            "config.sft.exit_loss=expected or config.sft.explore=0"
        )
    if config.lora.rank == 0 and sft.target == "student":
        yield (
            "config.sft.target=student compares exits of the student with the teacher's last layer "
            "through one output head, but config.lora.rank=0 trains that head; set "
            "config.sft.target=teacher or own, or config.lora.rank above 0"
        )


def _weights(config: Config) -> Iterator[str]:
    if config.command in TRAINING and config.lora.rank == 0 and config.dtype == "bfloat16":
        yield (
            "config.model.dtype is bfloat16, which loses most updates of weights, but "
            "config.lora.rank=0 trains all weights; set config.model.dtype to auto or float32, or "
            "config.lora.rank above 0"
        )


def _checkpoints(config: Config) -> Iterator[str]:
    measured, where = BEST_METRICS.get(config.command, ()), ""
    if config.command == "sft" and config.sft.lens_steps:
        measured, where = ("loss", "loss/exit"), " in its last phase, which trains the heads alone"
    if measured and config.best_metric.removeprefix("-") not in measured:
        yield (
            f"config.checkpoint.best_metric is {config.checkpoint.best_metric!r}, but "
            f"{config.command} does not measure that{where}; choose one of {', '.join(measured)}, "
            "with a '-' before the name if lower is better"
        )
    if config.checkpoint.final == "best" and config.checkpoint.keep_best == 0:
        yield (
            "config.checkpoint.final is best, but config.checkpoint.keep_best=0 does not keep the "
            "best checkpoint; set config.checkpoint.keep_best=1"
        )


def _reinforcement(config: Config) -> Iterator[str]:
    rl = config.rl
    if config.command != "rl":
        return
    if rl.rollouts < 2:
        yield (
            f"RLOO needs at least 2 rollouts per prompt, got {rl.rollouts}; "
            "raise config.rl.rollouts"
        )
    if rl.updates_per_batch > 1 and rl.importance_cap > 0:
        yield (
            f"config.rl.importance_cap is {rl.importance_cap:g}, but "
            f"config.rl.updates_per_batch={rl.updates_per_batch} clips ratios instead of weighting "
            "them; set config.rl.importance_cap=0 or config.rl.updates_per_batch=1"
        )
    if rl.dual_ascent and rl.warmup_steps > 0:
        yield (
            f"config.rl.warmup_steps is {rl.warmup_steps}, but config.rl.dual_ascent sets λ and μ "
            "itself; set config.rl.warmup_steps=0 or config.rl.dual_ascent=False"
        )
    if rl.floor_of == "initial" and rl.accuracy_floor <= 0:
        yield (
            "config.rl.floor_of=initial makes the floor a fraction of the initial model's "
            f"accuracy, but config.rl.accuracy_floor is {rl.accuracy_floor:g}; set "
            "config.rl.accuracy_floor to a fraction such as 0.9"
        )
    if rl.dual_ascent and rl.accuracy_floor <= 0:
        yield (
            "config.rl.dual_ascent needs a floor of accuracy, but config.rl.accuracy_floor is "
            f"{rl.accuracy_floor:g}; set config.rl.accuracy_floor above 0"
        )


def _check_policies(config: Config) -> None:
    policies = config.eval.policies
    if config.command in TRAINING and config.eval.split == "test":
        raise UserError(
            "config.eval.split is 'test', but a training run chooses checkpoints on this split, so "
            "it must not be the test split; set it to val, and evaluate on test with "
            "configs/eval.py"
        )
    if config.command == "eval" and not policies:
        raise UserError(
            "config.eval.policies is empty, but it must name at least one policy; add one, such as "
            "full"
        )
    for index, policy in enumerate(policies):
        of = control_of(policy)
        parse_policy(policy if of is None else of, "confidence")
        if of is not None and of not in policies[:index]:
            raise UserError(
                f"policy {policy!r} is a control for {of!r}, but {of!r} does not come before it; "
                f"put {of!r} before it in config.eval.policies"
            )
    parse_policy(config.generate.policy, "speculate")
    parse_policy(config.eval.measured)


def check_key(key: str) -> type:
    """Returns the type of the setting or section `key`, such as `config.rl.rollouts`.

    For a task's own options, which jexit does not define, the type is `object`. Raises UserError if
    the key does not exist.
    """
    owner, where = Config, "config"
    for name in key.split(".")[1:]:
        if owner is dict:  # jexit does not define the names in it
            return object
        hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            meant = f"did you mean {where}.{near[0]}? " if near else ""
            keys = f"use one of the keys {', '.join(sorted(hints))}"
            rest = keys if hints else f"set {where} itself, which is a single value"
            raise UserError(f"{where}.{name} does not exist; {meant}{rest}")
        owner, where = hints[name], f"{where}.{name}"
    return owner


def check_exits(exits: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Returns `exits` or, if it is empty, every 5th layer of a model with `layers` layers.

    Raises the errors of `check_rising`, and UserError if `exits` is empty and `layers` is at most
    5.
    """
    exits = tuple(exits) or tuple(range(5, layers, 5))
    if not exits:
        raise UserError(
            f"a model of {layers} layers is too shallow for the default exits at every 5th layer; "
            "set config.exits.layers to lower layer numbers, such as (1,2)"
        )
    check_rising(exits, layers)
    return exits


def check_rising(
    exits: tuple[Any, ...], layers: int | None = None, what: str = "config.exits.layers is"
) -> None:
    """Raises UserError unless `exits` increase strictly in 1 … `layers` − 1, or are empty.

    If `layers` is None, the numbers have no upper bound. The error message begins with `what`.
    """
    rising = all(isinstance(e, int) for e in exits) and list(exits) == sorted(set(exits))
    end = math.inf if layers is None else layers
    if not rising or (exits and not 1 <= exits[0] <= exits[-1] < end):
        numbers = ", such as (5, 10, 15)" if layers is None else f" from 1 to {layers - 1}"
        raise UserError(
            f"{what} {shown(exits)}, but exits must be rising layer numbers{numbers}; choose such "
            "layers"
        )


def parse_policy(text: str, *further: str) -> tuple[str, float | int | None]:
    """Returns (kind, number) for the name of a halting policy, such as ("fixed", 4) for "fixed:4".

    The names are `full` and `sample`, whose number is None, `threshold:X` (0 < X < 1) and `fixed:N`
    (N layers, at least 1). If `further` contains the kind, `confidence:X` (0 < X < 1) or
    `speculate:N` (N layers) is allowed as well. Raises UserError for any other name.
    """
    kind, _, argument = text.partition(":")
    if kind in ("full", "sample") and not argument:
        return kind, None
    allowed = kind in ("threshold", "fixed", *further)
    try:
        if allowed and kind in ("threshold", "confidence") and 0.0 < float(argument) < 1.0:
            return kind, float(argument)
        if allowed and kind in ("fixed", "speculate") and int(argument) >= 1:
            return kind, int(argument)
    except ValueError:
        pass
    named = {"confidence": "confidence:X", "speculate": "speculate:N"}
    also = "".join(f", {named[kind]}" for kind in further)
    raise UserError(
        f"policy {text!r} is not known; use full, sample, threshold:X (0 < X < 1){also} or fixed:N "
        "(N layers, at least 1)"
    )


def control_of(text: str) -> str | None:
    """Returns the policy whose mean depth the control `text` matches; None if it is no control.

    The control `shuffled` assigns the depths of `sample` to tokens at random. The control
    `fixed:matched` stops each completion at one of the two exits that enclose the mean depth of
    `sample`. `shuffled:POLICY` and `fixed:matched:POLICY` use the policy POLICY instead of
    `sample`.
    """
    found = re.fullmatch(r"(?:shuffled|fixed:matched)(?::(.*))?", text, re.DOTALL)
    if found is None:
        return None
    return "sample" if found[1] is None else found[1]


def config_dict(command: str, preset: str = TINY_PRESET) -> ConfigDict:
    """Returns the default settings of `command` for `preset`, as a locked ConfigDict."""
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is not known; choose one of {', '.join(COMMANDS)}")
    config = ConfigDict(Config(command=command, preset=preset or TINY_PRESET).to_dict())
    if command == "eval":
        config.eval.split = "test"
    if config.preset == TINY_PRESET:
        config.exits.layers = (1, 2, 3, 4, 6)
        config.lora.rank, config.lora.alpha = 16, 32.0
        config.lora.targets = PROJECTIONS
        return _locked(config)
    _check_preset(config.preset)
    known = PRESETS[config.preset]
    config.model.path = f"models/{config.preset}"
    config.exits.layers = tuple(range(5, known.architecture.layers, 5))
    config.exits.continuation = "linear"
    config.exit_head.detached = True
    config.task.max_prompt_tokens = 512
    config.lora.rank = known.lora_rank
    config.lora.alpha = 2.0 * known.lora_rank
    config.lora.dropout = 0.05
    return _locked(config)


def _locked(config: ConfigDict) -> ConfigDict:
    """Locks `config` and returns it: no keys can be added, and no value can change its type.

    The options of the task are exempt.
    """
    config.task.options = ConfigDict(config.task.options.to_dict(), type_safe=False)
    config.lock()
    config.task.options.unlock()
    return config


def _check_preset(preset: str) -> None:
    if preset not in (TINY_PRESET, *PRESETS):
        names = ", ".join((TINY_PRESET, *PRESETS))
        raise UserError(f"preset {shown(preset)} is not known; choose one of {names}")

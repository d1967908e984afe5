"""Every setting of jexit: its default, what it may be, what it means, and what goes together.

A file in `configs/` starts from `config_dict(command, preset)` and only says what differs. `main`
turns the parsed `ConfigDict` into the frozen `Config` below with `Config.from_dict`, which checks.
docs/configuration.md lists them all; `docs/configuration.py` makes it from what stands here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
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
Message = Annotated[str, Length(1_000_000)]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
Measure = Literal[
    "exits",
    "hazards",
    "capacity",
    "early_answering",
    "no_chain",
    "filler",
    "corrupted_step",
    "hint",
]
EVAL_MEASURES: tuple[Measure, ...] = get_args(Measure)

# The most that settings multiply to, by command: texts or tokens that memory holds at once.
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
MOST_PARAMETERS = 10**10  # of a trunk that is trained from nothing

# Metrics by which a checkpoint can be the best, of each command that trains. In RL they are
# measured on the validation split before a checkpoint is written: the training batches' own reward
# falls while λ and μ rise, and so does what it ranks.
BEST_METRICS = {
    "pretrain": ("loss", "loss/text"),
    "finetune": ("loss",),
    "sft": ("loss", "loss/exit", "kl/teacher", "depth/fraction"),
    "rl": ("val/reward", "val/accuracy", "val/depth_fraction", "val/layers_per_problem"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the stack is computed; no influence on the result beyond rounding."""

    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention over whole sequences (training, scoring, prefill): cudnn is for NVIDIA GPUs, splash
    for TPUs; auto is splash on TPUs from 2,048 positions on, else xla."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass computes again to save memory: nothing, each layer, or all but matrix
    products."""
    scan_unroll: Annotated[int, Bounds(1, 1_000)] = 1
    """Layers per iteration of the compiled loop; all of them is fastest on CPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Execution):
    """Where the weights come from and how they are computed with."""

    path: Name = TINY_PATH
    """A directory of convert.from_hf, of a run, or in Hugging Face format; or a hub id in the
    local cache."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights; auto is float32 on CPUs and bfloat16 on accelerators."""
    kernels: Literal["auto", "xla"] = "auto"
    """What computes over the vocabulary and decodes attention: auto is Pallas kernels where the
    chip has them. `jexit.doctor` tells where xla has to take their place."""

    @property
    def execution(self) -> Execution:
        return Execution(attention=self.attention, remat=self.remat, scan_unroll=self.scan_unroll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a token does in the layers that it skips."""

    continuation: Literal["frozen", "linear"] = "frozen"
    """frozen, as published: its residual stays as it was at the exit. linear: each skipped layer is
    replaced by a linear map."""
    continuation_rank: Annotated[int, Bounds(0, 1_000_000)] = 0
    """Rank of factored linear maps; 0: full matrices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitsConfig(Continuation):
    """Where tokens may leave, and what they do after."""

    layers: Annotated[tuple[Layer, ...], Length(1_000)] = ()
    """Layers before which tokens may leave; empty: the checkpoint's own, else every 5th."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitHead:
    """Shape and start of the heads that give each exit's hazard."""

    kind: Literal["mlp", "linear"] = "mlp"
    """A hidden layer of twice the model's width, or none."""
    norm: Literal["rms", "none"] = "rms"
    """What the residual goes through first."""
    bias: Signed = -4.0
    """Initial output bias: a fresh head almost never leaves."""
    detached: bool = False
    """Hazards train the heads alone: their gradient stops at the residuals that they read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitSettings(ExitHead, Continuation):
    """Exit heads and the continuation after them, as a model has them."""

    def __post_init__(self) -> None:
        check(self)
        if self.continuation_rank and self.continuation == "frozen":
            raise UserError(
                f"continuation_rank is {self.continuation_rank} for a frozen continuation, which "
                "has no matrices; set continuation=linear or continuation_rank=0"
            )

    def check_width(self, width: int) -> None:
        """Raises UserError for a continuation that has no lower rank than the model's width."""
        if self.continuation_rank >= width:
            raise UserError(
                f"continuation_rank is {self.continuation_rank} for a model of width {width}; make "
                "it smaller than the width, or 0 for full matrices"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters: y += (alpha / rank) · dropout(x) · A · B (arXiv:2106.09685)."""

    rank: Annotated[int, Bounds(0, 10_000)] = 8
    """0: full fine-tuning, with a second copy of the weights as the teacher."""
    alpha: Positive = 16.0
    """Scale of the update, over the rank."""
    dropout: ShareBelowOne = 0.0
    """Share of an adapter's inputs that training drops; published: 0.05."""
    targets: Annotated[tuple[Projection, ...], Length(100)] = ("q", "k", "v", "o")
    """The projections that have an adapter."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which problems, how they are put, and what answers earn."""

    name: Name = "sums"
    """sums, word_problems, gsm8k, tom, exploretom, blend (several in turn), or your own as
    FILE.py:NAME or MODULE:NAME."""
    path: Name = ""
    """Its data. gsm8k: a JSONL file, a directory of them, or a tfds data directory; tom and
    exploretom: a CSV file with the columns story, question and answer, or a directory of them."""
    options: Options = dataclasses.field(default_factory=dict)
    """Its own settings, as in options.operands_max=6: see docs/tasks.md."""
    time_limit: Annotated[float, Bounds(0.1, 86_400)] = 60.0
    """Seconds that its reward functions may take for one batch."""
    system: Message = ""
    """The system message before every prompt; empty: none, or the chat template's own."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """What prompts tell a chat template that can switch thinking (Qwen3's can); auto: nothing."""
    max_prompt_tokens: Count = 256
    """Tokens of a prompt; a longer one stops the run, or see skip_long."""
    skip_long: bool = False
    """Leave out (and count) problems over max_prompt_tokens."""
    reward_strict: Signed = 1.0
    """Tasks of jexit: for a correct answer in the task's format."""
    reward_lenient: Signed = 0.5
    """Tasks of jexit: for a correct answer that only the lenient parse finds."""
    reward_wrong: Signed = 0.0
    """Tasks of jexit: for a wrong answer."""
    reward_none: Signed = -1.0
    """Tasks of jexit: for no answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; as many are used as the three multiply to."""

    data: Count = 1
    """Rows divided, parameters repeated."""
    fsdp: Count = 1
    """Rows divided, parameters divided too and gathered a layer at a time."""
    tensor: Count = 1
    """Heads, MLP and vocabulary divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101), its learning rates and its schedule."""

    lora_lr: LearningRate = 1e-4
    """Peak learning rate of the adapters, as published."""
    exit_lr: LearningRate = 1e-5
    """Peak learning rate of the exit heads, as published."""
    exit_hidden: Share = 1.0
    """Learning rate of the heads' hidden layers, as a fraction of exit_lr. At 0 their features stay
    fixed and only the output layers train: otherwise Adam would move each of the many hidden
    parameters by about its learning rate, driven by the noise of the policy gradient."""
    continuation_lr: LearningRate = 0.0
    """Peak learning rate of the linear continuation; 0: it keeps its fit. It reads unnormalised
    residuals, some hundreds in size: even 1e-5 spoils a real model within ten updates."""
    full_lr: LearningRate = 1e-5
    """Peak learning rate of base weights: in pretraining, and where lora.rank is 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates fall after the warm-up."""
    warmup_steps: StepsOrZero = 0
    """Steps in which the learning rates rise linearly from 0."""
    final_fraction: Share = 0.0
    """Of the peak learning rates, at the last step of a schedule that falls."""
    b1: ShareBelowOne = 0.9
    """Adam's decay of the first moment."""
    b2: ShareBelowOne = 0.999
    """Adam's decay of the second moment."""
    eps: Annotated[float, Bounds(1e-16, 1)] = 1e-8
    """Adam's addition to the root of the second moment."""
    weight_decay: Coefficient = 0.0
    """Decoupled, times the learning rate."""
    clip_norm: Positive = 1.0
    """Largest global norm of a step's gradient."""
    accumulate: Count = 1
    """Micro-batches of a step, summed by token weight."""
    max_skipped: Count = 5
    """Steps in a row with a loss that is not finite before the run stops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The shipped model's trunk, trained from nothing on the tasks' own text."""

    start: Name = ""
    """A model directory whose trunk is trained further; empty: random weights."""
    length: Count = 144
    """Tokens of a row, which holds several texts."""
    width: Count = 96
    """Width of the residual."""
    layers: Layer = 8
    """Number of layers."""
    query_heads: Count = 4
    """Query heads of a layer."""
    kv_heads: Count = 4
    """Key/value heads of a layer."""
    head_dim: Count = 24
    """Width of a head."""
    mlp_width: Count = 256
    """Width of the MLP's hidden layer."""
    rope_theta: Annotated[float, Bounds(1, 1e9)] = 1e4
    """Base of the rotary embeddings' wavelengths (arXiv:2104.09864)."""
    word_problems: Share = 0.2
    """Share of word problems in the text; what the shares leave is sums."""
    tom: Share = 0.0
    """Share of theory-of-mind stories in the text."""
    exit_loss: Coefficient = 0.0
    """Weight of cross-entropy at the exits' logit lens: deep supervision (arXiv:1409.5185)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Cross-entropy on reference completions, in the model's chat format."""

    max_new_tokens: Count = 256
    """Of a reference with its end token; a longer one is refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Calibration of the exits by self-distillation (arXiv:2603.21376, stage 1)."""

    samples: Annotated[int, Bounds(1, 1_000)] = 4
    """S: depth assignments that are drawn for each sequence."""
    sharpness: Positive = 1.0
    """k: target hazards are 1 − tanh(k · KL / 2) of an exit's KL to the last layer, in nats."""
    exit_coef: Coefficient = 1.0
    """Weight of the heads' loss beside the KL of the student to the teacher."""
    stay_weight: Annotated[float, Bounds(1, 1_000_000)] = 1.0
    """How many times staying counts in the heads' cross-entropy: divides the odds of their hazards,
    which add up over the exits when depths are sampled. Needs exit_loss=expected."""
    explore: Share = 0.0
    """Probability that a depth is drawn uniformly, so that the student learns to finish early where
    the teacher could not; published: 0. Needs exit_loss=expected."""
    target: Literal["teacher", "student"] = "teacher"
    """Whose exits the target hazards are measured at: the teacher's, as published, or the
    student's, which improve."""
    direction: Literal["student_teacher", "teacher_student", "jeffreys"] = "student_teacher"
    """Of the KL between student and teacher; jeffreys: the sum of both."""
    exit_loss: Literal["sampled", "expected"] = "sampled"
    """−log P(d) of the drawn depths, as published, or its expectation under the targets."""
    lens_steps: StepsOrZero = 0
    """Steps after `steps` in which the hazard heads alone learn; with steps=0 the trunk stays as it
    is."""
    lens_tokens: Annotated[int, Bounds(1, 2**26)] = 65_536
    """Tokens that the heads learn from in those, kept at all exits."""
    trajectories: Literal["generate", "dataset"] = "generate"
    """Sequences are the teacher's own generations, or the task's references."""
    pool: Count = 512
    """Trajectories that are generated once and cached."""
    completions: Annotated[int, Bounds(1, 1_000)] = 1
    """Of each prompt. They share a row, and a copy of the prompt: less work where prompts are
    long. A model that is sure of itself repeats them, which teaches adapters and heads less."""
    temperature: TemperatureOrGreedy = 1.0
    """At which trajectories are generated."""
    max_new_tokens: Count = 256
    """Of a trajectory."""
    generate_batch: Annotated[int, Bounds(1, 100_000)] = 64
    """Trajectories that are generated at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """RLOO over tokens and depths with a depth penalty (arXiv:2603.21376, stage 2)."""

    rollouts: Annotated[int, Bounds(1, 10_000)] = 6
    """G: completions of each prompt; at least 2."""
    depth_coef: Coefficient = 0.5
    """λ: the penalty on depth."""
    depth_norm: Literal["mean", "total"] = "mean"
    """What λ is charged on: the mean of depth / L over tokens, as published, which shallow filler
    lowers; or its sum over length_ref, the compute of the answer."""
    kl_coef: Coefficient = 0.1
    """β: the penalty on the KL to the teacher, in the reward."""
    length_coef: Coefficient = 0.0
    """μ: the penalty on tokens, over length_ref."""
    length_ref: Annotated[float, Bounds(1, 1_000_000)] = 256.0
    """T_ref: the tokens that μ and depth_norm=total count in."""
    advantage: Literal["rloo", "group_mean", "group_mean_std"] = "rloo"
    """The reward less the mean of the prompt's other completions (arXiv:2402.14740), or of all, or
    that over their standard deviation (arXiv:2402.03300)."""
    temperature: Temperature = 1.0
    """Of the rollouts' tokens."""
    max_new_tokens: Count = 256
    """Of a rollout."""
    norm: Literal["constant", "sequence", "tokens"] = "constant"
    """What a completion's loss is divided by. Only a constant gives the gradient of the mean
    reward; by its own length (sequence) or the batch's (tokens) a token counts for more in shorter
    texts."""
    updates_per_batch: Annotated[int, Bounds(1, 20)] = 1
    """Optimiser steps on each batch; more than one: PPO's clipped ratio (arXiv:1707.06347)."""
    clip: Positive = 0.2
    """Largest change of PPO's ratio."""
    kl_loss_coef: Coefficient = 0.0
    """Weight of a KL to the teacher in the loss."""
    kl_loss: Literal["exact", "forward", "k2", "k3"] = "exact"
    """exact: KL(student ‖ teacher) of every next token; forward: KL(teacher ‖ student), whose
    gradient is bounded, where the other's grows with the teacher's certainty. On the sampled tokens
    alone, k2 has the gradient of the first in the mean, k3 that of the second."""
    causal_depth: bool = False
    """Charge a token for depths at and after it only."""
    depth_entropy_coef: Coefficient = 0.0
    """Weight of a bonus on the entropy of depths, against shut-down."""
    min_hazard: ShareBelowOne = 0.0
    """A floor under the hazards, and so under exploration; part of the distribution that is
    scored."""
    hazard_temperature: Temperature = 1.0
    """Divides the heads' logits wherever depths are sampled."""
    warmup_steps: StepsOrZero = 0
    """Updates over which λ and μ rise linearly to their value."""
    dual_ascent: bool = False
    """λ and μ grow only while accuracy stays over the floor, by the sign of the violation."""
    dual_rate: Share = 0.02
    """What they grow by in an update of dual ascent, of their value."""
    accuracy_floor: Share = 0.0
    """λ and μ are withheld while accuracy is below; 0: never."""
    floor_of: Literal["absolute", "initial"] = "absolute"
    """Whether the floor is an accuracy, or a share of the initial model's at full depth."""
    stop_on_collapse: bool = True
    """Stop when accuracy has halved at the first exit, or as the text shrinks away; the model is
    the last checkpoint from before it."""
    importance_cap: Coefficient = 0.0
    """Largest importance weight between sampler and trainer; 0: none."""
    mask_truncated: bool = False
    """Leave completions that ran into the limit out of loss and baseline, which also makes running
    into it free."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSize:
    """How much the decoding engine of each data shard does at once; 0 leaves a number to it.

    Depths save time when the pool has some three times as many rows as a tick has places: rows that
    wait at other segments then fill the places of those that have left.
    """

    rows: CountOrZero = 0
    """Completions under way. By itself the pool's keys and values take at most a fixed share of an
    accelerator's memory."""
    places: CountOrZero = 0
    """Rows of a tick, which runs the layers between two exits."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, by configs/eval.py and before and after training."""

    problems: Annotated[int, Bounds(1, 100_000)] = 256
    """How many, from the beginning of the split."""
    policies: Names = ("full", "sample")
    """full, sample, threshold:X, fixed:LAYERS; and the controls shuffled and fixed:matched, or
    either with :POLICY, at the mean depth of a policy before them."""
    measures: Annotated[tuple[Measure, ...], Length(100)] = ()
    """Beyond accuracy and depth; docs/evaluation.md defines them."""
    measured: Name = "sample"
    """The policy that these measure, beside full depth."""
    temperature: TemperatureOrGreedy = 0.0
    """Of the tokens; 0: greedy."""
    max_new_tokens: Count = 256
    """Of a completion."""
    split: Literal["train", "val", "test"] = "val"
    """A run that trains reports and chooses by val; configs/eval.py, for results, has test."""
    heat_maps: CountOrZero = 8
    """Completions that are kept with each token's depth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What configs/generate.py completes and prints."""

    prompts: Annotated[tuple[Message, ...], Length(10_000)] = ()
    """What the user says, each a conversation of its own."""
    policy: Name = "sample"
    """full, sample, threshold:X or fixed:LAYERS."""
    temperature: TemperatureOrGreedy = 0.0
    """Of the tokens; 0: greedy."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Only the likeliest tokens that have this probability together (arXiv:1904.09751)."""
    top_k: CountOrZero = 0
    """Only so many of the likeliest tokens; 0: all."""
    min_p: Share = 0.0
    """Only tokens with this share of the likeliest one's probability (arXiv:2407.01082)."""
    stop: Names = ()
    """Strings that end a completion."""
    max_new_tokens: Count = 256
    """Of a completion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run can continue from, and what its model is made of."""

    every: StepsOrZero = 0
    """Steps between checkpoints; 0: at the end only."""
    keep: Count = 2
    """The newest ones that stay."""
    keep_best: CountOrZero = 0
    """And as many with the best metric, a mean since the checkpoint before."""
    best_metric: Name = ""
    """Its name, with a "-" before one that is best when lowest; empty: val/reward in RL, else
    -loss."""
    final: Literal["last", "best"] = "last"
    """The checkpoint that WORKDIR/model is made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written beside metrics.jsonl."""

    samples_every: Steps = 20
    """Steps between sample completions in samples.jsonl."""
    samples: CountOrZero = 4
    """Sample completions at a time."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard, too."""
    wandb_project: Name = ""
    """A project of Weights & Biases that gets them, too; empty: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    command: Command
    """What the run does; a file in configs/ sets it."""
    preset: Name = TINY_PRESET
    """The model that defaults are for: what follows the colon of --config=FILE:PRESET."""
    seed: Seed = 0
    """Of everything that is random."""
    steps: StepsOrZero = 100
    """Optimiser batches; 0: in sft with lens_steps, those alone."""
    batch_size: Annotated[int, Bounds(1, 100_000)] = 32
    """Sequences of a step; in rl prompts."""
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
        """The adapters that a run trains; None for full fine-tuning."""
        return self.lora if self.lora.rank else None

    @property
    def exit_settings(self) -> ExitSettings:
        """The heads and the continuation that a run trains."""
        continuation = {
            field.name: getattr(self.exits, field.name)
            for field in dataclasses.fields(Continuation)
        }
        return ExitSettings(**dataclasses.asdict(self.exit_head), **continuation)

    @property
    def best_metric(self) -> str:
        """The metric that the best checkpoint maximises; with "-" before the name, minimises."""
        return self.checkpoint.best_metric or ("val/reward" if self.command == "rl" else "-loss")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | ConfigDict) -> Config:
        """Builds and checks the config; raises UserError with key, value, rule and remedy."""
        config = build(
            cls, values.to_dict() if isinstance(values, ConfigDict) else values, "config"
        )
        config.validate()
        return config

    def validate(self) -> None:
        """Checks what can be known before the model is read (`check_exits` does the rest)."""
        _check_preset(self.preset)
        for rules in (_exits, _sizes, _tasks, _calibration, _checkpoints, _reinforcement):
            for contradiction in rules(self):
                raise UserError(contradiction)
        _check_policies(self)


# What does not go together, each rule a sentence with the values, the rule and the remedy.


def _exits(config: Config) -> Iterator[str]:
    exits = config.exits
    if list(exits.layers) != sorted(set(exits.layers)):
        yield (
            f"config.exits.layers is {shown(exits.layers)}; exits are distinct layer numbers in "
            "rising order, such as (5,10,15)"
        )
    if exits.continuation_rank and exits.continuation == "frozen":
        yield (
            f"config.exits.continuation_rank is {exits.continuation_rank} and "
            "config.exits.continuation is frozen, which has no matrices; set "
            "config.exits.continuation=linear or the rank to 0"
        )


def _sizes(config: Config) -> Iterator[str]:
    """Also what is too large only together: it would fill the memory before it began."""
    accumulate, mesh = config.optim.accumulate, config.mesh
    together = config.sft.completions if config.command == "sft" else 1  # sequences of a row
    if config.batch_size % (accumulate * together):
        yield (
            f"config.batch_size {config.batch_size} does not divide into optim.accumulate "
            f"{accumulate} micro-batches"
            + (f" of prompts with sft.completions {together} each" if together > 1 else "")
            + "; make it a multiple"
        )
    shares = mesh.data * mesh.fsdp
    rows = config.batch_size * (config.rl.rollouts if config.command == "rl" else 1)
    rows //= together * accumulate
    if config.command in TRAINING and rows % shares:
        yield (
            f"a micro-batch has {rows} rows, which do not divide over config.mesh.data {mesh.data} "
            f"× fsdp {mesh.fsdp}; make config.batch_size a multiple of "
            f"{shares * accumulate * together}"
        )
    if config.steps == 0 and not (config.command == "sft" and config.sft.lens_steps):
        yield (
            "config.steps is 0, which only calibration with config.sft.lens_steps can have; it "
            "must be at least 1"
        )
    for keys, most in MOST_TOGETHER[config.command].items():
        sizes = [operator.attrgetter(key)(config) for key in keys]
        if math.prod(sizes) > most:
            yield (
                f"config.{' × '.join(keys)} is {' × '.join(map(str, sizes))} = "
                f"{math.prod(sizes)}; together it must be at most {most}: lower one of them"
            )
    p = config.pretrain
    heads = 2 * p.head_dim * (p.query_heads + p.kv_heads)
    parameters = p.layers * p.width * (heads + 3 * p.mlp_width)
    if config.command == "pretrain" and parameters > MOST_PARAMETERS:
        yield (
            f"config.pretrain asks for {parameters} parameters in the blocks; it must be at "
            f"most {MOST_PARAMETERS}: lower width, layers, mlp_width or the heads"
        )


def _tasks(config: Config) -> Iterator[str]:
    p = config.pretrain
    if p.word_problems + p.tom > 1.0:
        yield (
            f"config.pretrain.word_problems and tom add up to {p.word_problems + p.tom:g}; they "
            "are shares of the text, together at most 1"
        )


def _calibration(config: Config) -> Iterator[str]:
    sft = config.sft
    if config.command != "sft":
        return
    if sft.completions > 1 and sft.generate_batch % sft.completions:
        yield (
            f"config.sft.generate_batch {sft.generate_batch} does not divide into prompts with "
            f"sft.completions {sft.completions} each; make it a multiple"
        )
    if sft.completions > 1 and sft.trajectories == "dataset":
        yield (
            f"config.sft.completions={sft.completions} is for completions that the teacher "
            "generates, and a data set has one of each prompt; set it to 1, or "
            "config.sft.trajectories=generate"
        )
    if sft.explore > 0 and sft.exit_loss == "sampled":
        yield (
            f"config.sft.explore is {sft.explore:g} and config.sft.exit_loss is sampled, "
            "which would teach the heads the explored depths in place of the targets; set "
            "config.sft.exit_loss=expected or config.sft.explore=0"
        )
    if sft.stay_weight != 1 and sft.exit_loss == "sampled":
        yield (
            f"config.sft.stay_weight is {sft.stay_weight:g} and config.sft.exit_loss is "
            "sampled, which scores the drawn depths and has no such weight; set "
            "config.sft.exit_loss=expected or config.sft.stay_weight=1"
        )
    if config.lora.rank == 0 and sft.target == "student":
        yield (
            "config.sft.target=student measures exits with the teacher's output head, which "
            "config.lora.rank=0 trains; set config.sft.target=teacher or a rank above 0"
        )


def _checkpoints(config: Config) -> Iterator[str]:
    measured = BEST_METRICS.get(config.command, ())
    if measured and config.best_metric.removeprefix("-") not in measured:
        yield (
            f"config.checkpoint.best_metric is {config.checkpoint.best_metric!r}; choose among "
            f"{', '.join(measured)}, with a '-' before what is best when lowest"
        )
    if config.checkpoint.final == "best" and config.checkpoint.keep_best == 0:
        yield (
            "config.checkpoint.final=best needs a checkpoint that is kept for being the best; "
            "set config.checkpoint.keep_best=1"
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
            "config.rl.importance_cap weights single updates, and config.rl.updates_per_batch "
            f"is {rl.updates_per_batch}, which clips ratios instead; set one of the two"
        )
    if rl.dual_ascent and rl.warmup_steps > 0:
        yield "config.rl.dual_ascent sets λ and μ itself; set config.rl.warmup_steps to 0"
    if rl.floor_of == "initial" and rl.accuracy_floor <= 0:
        yield (
            "config.rl.floor_of=initial makes the floor a share of the initial model's "
            f"accuracy, and config.rl.accuracy_floor is {rl.accuracy_floor:g}; set it "
            "above 0, 0.9 say"
        )
    if rl.dual_ascent and rl.accuracy_floor <= 0:
        yield "config.rl.dual_ascent needs a floor to hold; set config.rl.accuracy_floor above 0"


def _check_policies(config: Config) -> None:
    policies = config.eval.policies
    if config.command in TRAINING and config.eval.split == "test":
        raise UserError(
            "config.eval.split is 'test' in a run that trains, which no choice may see; set it "
            "to val here and measure test with configs/eval.py"
        )
    if config.command == "eval" and not policies:
        raise UserError("config.eval.policies is empty; name at least one policy, such as full")
    for index, policy in enumerate(policies):
        of = control_of(policy)
        parse_policy(policy if of is None else of)
        if of is not None and of not in policies[:index]:
            raise UserError(
                f"policy {policy!r} is a control for {of!r}; put that before it in "
                "config.eval.policies"
            )
    parse_policy(config.generate.policy)
    parse_policy(config.eval.measured)


def check_key(key: str) -> type:
    """The type of a setting or section such as `config.rl.rollouts`; UserError if it is none."""
    owner, where = Config, "config"
    for name in key.split(".")[1:]:
        if owner is dict:  # whose names are not jexit's
            return object
        hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            meant = f"did you mean {where}.{near[0]}? " if near else ""
            keys = f"use one of the keys {', '.join(sorted(hints))}"
            rest = keys if hints else f"{where} is a single value"
            raise UserError(f"{where}.{name} does not exist; {meant}{rest}")
        owner, where = hints[name], f"{where}.{name}"
    return owner


def check_exits(exits: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The exits to use in a model of `layers` layers: those given, else every 5th.

    Raises UserError when an exit lies at or beyond the last layer, or none is left.
    """
    exits = tuple(exits) or tuple(range(5, layers, 5))
    if not exits:
        raise UserError(
            f"a model of {layers} layers has no exit at every 5th layer; set config.exits.layers"
        )
    if exits[-1] >= layers:
        raise UserError(
            f"exit {exits[-1]} is not below the model's {layers} layers; config.exits.layers takes "
            f"layer numbers from 1 to {layers - 1}"
        )
    return exits


def parse_policy(text: str) -> tuple[str, float | int | None]:
    """Parses `full`, `sample`, `threshold:X` (0 < X < 1) or `fixed:LAYERS`."""
    kind, _, argument = text.partition(":")
    if kind in ("full", "sample") and not argument:
        return kind, None
    try:
        if kind == "threshold" and 0.0 < float(argument) < 1.0:
            return kind, float(argument)
        if kind == "fixed" and int(argument) >= 1:
            return kind, int(argument)
    except ValueError:
        pass
    raise UserError(
        f"policy {text!r} is not known; use full, sample, threshold:X (0 < X < 1) or fixed:N "
        "(N layers, at least 1)"
    )


def control_of(text: str) -> str | None:
    """The policy at whose mean depth a control runs; None for a policy that is no control.

    `shuffled` deals out the depths of `sample` to tokens at random, `fixed:matched` stops each
    completion at one of the two exits that enclose its mean depth; `shuffled:POLICY` and
    `fixed:matched:POLICY` do so with another policy's.
    """
    for control in ("shuffled", "fixed:matched"):
        if text == control:
            return "sample"
        if text.startswith(f"{control}:"):
            return text.removeprefix(f"{control}:")
    return None


def config_dict(command: str, preset: str = TINY_PRESET) -> ConfigDict:
    """The defaults of a command for a preset, as a locked, type-checked ConfigDict."""
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is not one of {', '.join(COMMANDS)}")
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
    """Without new keys or types, but for the options of a task, which it knows itself."""
    config.task.options = ConfigDict(config.task.options.to_dict(), type_safe=False)
    config.lock()
    config.task.options.unlock()
    return config


def _check_preset(preset: str) -> None:
    if preset not in (TINY_PRESET, *PRESETS):
        names = ", ".join((TINY_PRESET, *PRESETS))
        raise UserError(f"preset {shown(preset)} is not known; choose one of {names}")

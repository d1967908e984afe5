"""The sections of a run's settings, each with its defaults; `jexit.config` puts them together."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jexit.bounds import (
    Bounds,
    Coefficient,
    Count,
    CountOrZero,
    LearningRate,
    Length,
    Name,
    Names,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Signed,
    Steps,
    StepsOrZero,
    Temperature,
    TemperatureOrGreedy,
)

Layer = Annotated[int, Bounds(1, 1_000)]

TINY_PATH = "jexit/assets/tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the weights come from and how they are computed with."""

    path: Name = TINY_PATH  # a directory of convert.from_hf, of a run, or in Hugging Face format
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # base weights; auto: float32 on CPU
    # Over whole sequences: training, scoring, prefill; decoding is XLA's. cudnn: NVIDIA GPUs,
    # splash: TPUs, auto: splash on TPUs for 2,048 positions and more, else xla.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: Literal["none", "block", "dots"] = "none"
    scan_unroll: Annotated[int, Bounds(1, 1_000)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitsConfig:
    """Which layers may be left before; empty means: the checkpoint's own, else every 5th."""

    layers: Annotated[tuple[Layer, ...], Length(1_000)] = ()
    # What a token does in the layers that it skips. frozen, as published: its residual stays as it
    # was at the exit. linear: each such layer is replaced by a linear map.
    continuation: Literal["frozen", "linear"] = "frozen"
    continuation_rank: Annotated[int, Bounds(0, 1_000_000)] = 0  # of factored maps; 0: full


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitHeadConfig:
    kind: Literal["mlp", "linear"] = "mlp"
    norm: Literal["rms", "none"] = "rms"
    bias: Signed = -4.0  # initial b2: a fresh head almost never leaves
    # Hazards are learnt by the heads alone: their gradient stops at the residuals that they read.
    detached: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    # 0: full fine-tuning, with a second copy of the weights as the teacher.
    rank: Annotated[int, Bounds(0, 10_000)] = 8
    alpha: Positive = 16.0
    dropout: ShareBelowOne = 0.0
    targets: Names = ("q", "k", "v", "o")


# The values of `task.steps` that a task knows; the others know "free" alone.
STEPS = {
    "sums": ("free", "2", "3", "4", "5", "at_once", "mixed"),
    "tom": ("free", "fine", "coarse", "at_once", "mixed"),
    "blend": ("free", "at_once", "mixed"),  # of those parts that know it
}
# The tasks that a blend may have: generated ones, which never end.
BLENDABLE = ("sums", "word_problems", "tom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: Literal["sums", "word_problems", "gsm8k", "tom", "exploretom", "blend"] = "sums"
    parts: Names = BLENDABLE  # blend: problems of each equally often
    # gsm8k: a JSONL file, a directory of them, or a tfds data directory; tom and exploretom: a CSV
    # file with the columns story, question and answer, or a directory of them.
    path: Name = ""
    # What a prompt prescribes: see STEPS for each task's.
    steps: Literal["free", "2", "3", "4", "5", "fine", "coarse", "at_once", "mixed"] = "free"
    operands_min: Annotated[int, Bounds(2, 100)] = 3  # sums
    operands_max: Annotated[int, Bounds(2, 100)] = 8
    # gsm8k: worked examples of the training split before every problem.
    shots: Annotated[int, Bounds(0, 100)] = 0
    shots_seed: Seed = 0  # which ones
    # What prompts tell a chat template that can switch thinking, such as Qwen3's; auto: nothing.
    thinking: Literal["auto", "on", "off"] = "auto"
    kinds: Names = ()  # tom, of question; empty: all
    people_min: Annotated[int, Bounds(2, 8)] = 3  # tom
    people_max: Annotated[int, Bounds(2, 8)] = 4
    moves_min: Annotated[int, Bounds(3, 8)] = 4  # tom, sentences that name a place or a topic
    moves_max: Annotated[int, Bounds(3, 8)] = 5
    max_prompt_tokens: Count = 256
    skip_long: bool = False  # skip (and count) problems over the limit instead of stopping
    reward_strict: Signed = 1.0
    reward_lenient: Signed = 0.5
    reward_wrong: Signed = 0.0
    reward_none: Signed = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; as many are used as the three multiply to."""

    data: Count = 1  # rows divided, parameters repeated
    fsdp: Count = 1  # rows divided, parameters divided too and gathered a layer at a time
    tensor: Count = 1  # heads, MLP and vocabulary divided


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lora_lr: LearningRate = 1e-4
    exit_lr: LearningRate = 1e-5
    # Learning rate of the heads' hidden layers, in `exit_lr`. Under the noise of a policy gradient
    # Adam moves each of their many parameters by its rate; at 0 what they have learnt to see stays,
    # and their outputs alone learn.
    exit_hidden: Share = 1.0
    # 0: the continuation stays at its fit. It reads residuals as they are, some of them hundreds
    # large, and Adam's steps of even 1e-5 take a real model away from itself within ten updates.
    continuation_lr: LearningRate = 0.0
    # Of base weights: pretraining, and full fine-tuning when lora.rank is 0.
    full_lr: LearningRate = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: StepsOrZero = 0
    final_fraction: Share = 0.0  # of the peak learning rate, at the last step
    b1: ShareBelowOne = 0.9
    b2: ShareBelowOne = 0.999
    eps: Annotated[float, Bounds(1e-16, 1)] = 1e-8
    weight_decay: Coefficient = 0.0
    clip_norm: Positive = 1.0
    accumulate: Count = 1  # micro-batches a step, summed by token weight
    max_skipped: Count = 5  # non-finite steps in a row before the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The shipped model's trunk, trained from nothing on the tasks' own text."""

    start: Name = ""  # a model directory whose trunk is trained further; empty: random weights
    length: Count = 144  # of a row, which holds several texts
    width: Count = 96
    layers: Layer = 8
    query_heads: Count = 4
    kv_heads: Count = 4
    head_dim: Count = 24
    mlp_width: Count = 256
    rope_theta: Annotated[float, Bounds(1, 1e9)] = 1e4
    word_problems: Share = 0.2  # share of word problems; what the shares leave is sums
    tom: Share = 0.0  # share of theory-of-mind stories
    exit_loss: Coefficient = 0.0  # total weight of cross-entropy at the exits' logit lens
    prompt_loss: Coefficient = 0.0  # weight of the prompt's tokens in the loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Cross-entropy on reference completions, in the model's chat format."""

    max_new_tokens: Count = 256  # of a reference with its end token; a longer one is refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Calibration of the exits by self-distillation (arXiv:2603.21376, stage 1)."""

    samples: Annotated[int, Bounds(1, 1_000)] = 4  # S, depth assignments a sequence
    sharpness: Positive = 1.0  # k
    exit_coef: Coefficient = 1.0  # w_exit
    # How many times staying counts in the heads' cross-entropy: divides the odds of their hazards,
    # which add up over the exits when depths are sampled.
    stay_weight: Annotated[float, Bounds(1, 1_000_000)] = 1.0
    explore: Share = 0.0  # probability that a depth is drawn uniformly
    target: Literal["teacher", "student"] = "teacher"
    direction: Literal["student_teacher", "teacher_student", "jeffreys"] = "student_teacher"
    exit_loss: Literal["sampled", "expected"] = "sampled"  # published: −log P(d) of the draw
    # Steps after `steps` in which the hazard heads alone learn. With steps=0 the trunk stays as it
    # is.
    lens_steps: StepsOrZero = 0
    lens_tokens: Annotated[int, Bounds(1, 2**26)] = 65_536  # they learn from, kept at all exits
    trajectories: Literal["generate", "dataset"] = "generate"
    pool: Count = 512  # trajectories that are generated once and cached
    # Of each prompt. They share a row, and a copy of the prompt: less work where prompts are long.
    completions: Annotated[int, Bounds(1, 1_000)] = 1
    temperature: TemperatureOrGreedy = 1.0
    max_new_tokens: Count = 256
    generate_batch: Annotated[int, Bounds(1, 100_000)] = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """RLOO over tokens and depths with a depth penalty (arXiv:2603.21376, stage 2)."""

    rollouts: Annotated[int, Bounds(1, 10_000)] = 6  # G
    depth_coef: Coefficient = 0.5  # λ
    # What λ is charged on: the mean of depth/L over tokens, as published, which shallow filler
    # lowers; or its total over T_ref, the compute of the answer.
    depth_norm: Literal["mean", "total"] = "mean"
    kl_coef: Coefficient = 0.1  # β, in the reward
    length_coef: Coefficient = 0.0  # μ
    length_ref: Annotated[float, Bounds(1, 1_000_000)] = 256.0  # T_ref
    advantage: Literal["rloo", "group_mean", "group_mean_std"] = "rloo"
    temperature: Temperature = 1.0
    max_new_tokens: Count = 256
    # Of the loss. Only a constant gives the gradient of the mean reward; by its own length
    # (sequence) or the batch's (tokens) a token counts for more in shorter texts.
    norm: Literal["constant", "sequence", "tokens"] = "constant"
    updates_per_batch: Annotated[int, Bounds(1, 20)] = 1  # more than one: PPO's clipped ratio
    clip: Positive = 0.2
    kl_loss_coef: Coefficient = 0.0
    # exact: KL(student ‖ teacher) of every next token; forward: KL(teacher ‖ student), whose
    # gradient is bounded, where the other's grows with the teacher's certainty. On the sampled
    # tokens alone, k2 has the gradient of the first in the mean, k3 that of the second.
    kl_loss: Literal["exact", "forward", "k2", "k3"] = "exact"
    causal_depth: bool = False  # a token is charged for depths at and after it only
    depth_entropy_coef: Coefficient = 0.0
    min_hazard: ShareBelowOne = 0.0  # a floor under exploration, part of the law
    hazard_temperature: Temperature = 1.0
    warmup_steps: StepsOrZero = 0  # λ and μ rise linearly to their value over these updates
    # λ and μ grow only while accuracy stays over the floor: by dual_rate of their value a step,
    # the sign of the violation and not its size.
    dual_ascent: bool = False
    dual_rate: Share = 0.02
    accuracy_floor: Share = 0.0  # 0: off; else λ and μ are withheld below it
    # Whether the floor is an accuracy, or a share of the initial model's at full depth.
    floor_of: Literal["absolute", "initial"] = "absolute"
    stop_on_collapse: bool = True  # with the last checkpoint from before it
    importance_cap: Coefficient = 0.0  # 0: off; else truncated weights between sampler and trainer
    # Completions that ran into the limit teach nothing, which also makes running into it free.
    mask_truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Decoding, of each data shard; 0 leaves a number to the engine (see `EngineSize`)."""

    rows: CountOrZero = 0  # completions under way
    places: CountOrZero = 0  # rows of a tick, which runs the layers between two exits


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    problems: Annotated[int, Bounds(1, 100_000)] = 256
    policies: Names = ("full", "sample")
    # Beyond accuracy and depth: exits, hazards, capacity, early_answering, no_chain, filler,
    # corrupted_step, hint (`jexit.evaluation` defines them).
    measures: Names = ()
    measured: Name = "sample"  # the policy that is measured, beside full depth
    temperature: TemperatureOrGreedy = 0.0
    max_new_tokens: Count = 256
    # A run that trains reports and chooses by val; configs/eval.py, for results, has test.
    split: Literal["train", "val", "test"] = "val"
    heat_maps: CountOrZero = 8  # completions kept with each token's depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    prompts: Annotated[tuple[Annotated[str, Length(1_000_000)], ...], Length(10_000)] = ()
    policy: Name = "sample"
    temperature: TemperatureOrGreedy = 0.0
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    top_k: CountOrZero = 0  # 0: all tokens
    min_p: Share = 0.0
    stop: Names = ()  # strings that end a completion
    max_new_tokens: Count = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: StepsOrZero = 0  # steps; 0: at the end only
    keep: Count = 2  # the newest ones
    # And as many with the best metric, a mean since the checkpoint before.
    keep_best: CountOrZero = 0
    best_metric: Name = ""  # "-NAME": lowest; empty: val/reward in RL, else -loss
    final: Literal["last", "best"] = "last"  # what WORKDIR/model is made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    samples_every: Steps = 20  # steps between sample completions in samples.jsonl
    samples: CountOrZero = 4
    tensorboard: bool = True
    wandb_project: Name = ""

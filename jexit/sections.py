"""The sections of a run's settings, each with its defaults; `jexit.config` puts them together."""

from __future__ import annotations

import dataclasses
from typing import Literal

TINY_PATH = "jexit/assets/tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the weights come from and how they are computed with."""

    path: str = TINY_PATH  # a directory of convert.from_hf, of a run, or in Hugging Face format
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # base weights; auto: float32 on CPU
    # Over whole sequences: training, scoring, prefill; decoding is XLA's. cudnn: NVIDIA GPUs,
    # splash: TPUs, auto: splash on TPUs for 2,048 positions and more, else xla.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: Literal["none", "block", "dots"] = "none"
    scan_unroll: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitsConfig:
    """Which layers may be left before; empty means: the checkpoint's own, else every 5th."""

    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitHeadConfig:
    kind: Literal["mlp", "linear"] = "mlp"
    norm: Literal["rms", "none"] = "rms"
    bias: float = -4.0  # initial b2: a fresh head almost never leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 8  # 0: full fine-tuning, with a second copy of the weights as the teacher
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o")


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
    parts: tuple[str, ...] = BLENDABLE  # blend: problems of each equally often
    # gsm8k: a JSONL file, a directory of them, or a tfds data directory; tom and exploretom: a CSV
    # file with the columns story, question and answer, or a directory of them.
    path: str = ""
    # What a prompt prescribes: see STEPS for each task's.
    steps: Literal["free", "2", "3", "4", "5", "fine", "coarse", "at_once", "mixed"] = "free"
    operands_min: int = 3  # sums
    operands_max: int = 8
    shots: int = 0  # gsm8k: worked examples of the training split before every problem
    shots_seed: int = 0  # which ones
    # What prompts tell a chat template that can switch thinking, such as Qwen3's; auto: nothing.
    thinking: Literal["auto", "on", "off"] = "auto"
    kinds: tuple[str, ...] = ()  # tom, of question; empty: all
    people_min: int = 3  # tom
    people_max: int = 4
    moves_min: int = 4  # tom, sentences that name a place or a topic
    moves_max: int = 5
    max_prompt_tokens: int = 256
    skip_long: bool = False  # skip (and count) problems over the limit instead of stopping
    reward_strict: float = 1.0
    reward_lenient: float = 0.5
    reward_wrong: float = 0.0
    reward_none: float = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; as many are used as the three multiply to."""

    data: int = 1  # rows divided, parameters repeated
    fsdp: int = 1  # rows divided, parameters divided too and gathered a layer at a time
    tensor: int = 1  # heads, MLP and vocabulary divided


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lora_lr: float = 1e-4
    exit_lr: float = 1e-5
    full_lr: float = 1e-5  # base weights: pretraining, and full fine-tuning when lora.rank is 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak learning rate, at the last step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1  # micro-batches a step, summed by token weight
    max_skipped: int = 5  # non-finite steps in a row before the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The shipped model's trunk, trained from nothing on the tasks' own text."""

    start: str = ""  # a model directory whose trunk is trained further; empty: random weights
    length: int = 144  # of a row, which holds several texts
    width: int = 96
    layers: int = 8
    query_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 24
    mlp_width: int = 256
    rope_theta: float = 1e4
    word_problems: float = 0.2  # share of word problems; what the shares leave is sums
    tom: float = 0.0  # share of theory-of-mind stories
    exit_loss: float = 0.0  # total weight of cross-entropy at the exits' logit lens
    prompt_loss: float = 0.0  # weight of the prompt's tokens in the loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Calibration of the exits by self-distillation (arXiv:2603.21376, stage 1)."""

    samples: int = 4  # S, depth assignments a sequence
    sharpness: float = 1.0  # k
    exit_coef: float = 1.0  # w_exit
    explore: float = 0.0  # probability that a depth is drawn uniformly
    target: Literal["teacher", "student"] = "teacher"
    direction: Literal["student_teacher", "teacher_student", "jeffreys"] = "student_teacher"
    exit_loss: Literal["sampled", "expected"] = "sampled"  # published: −log P(d) of the draw
    trajectories: Literal["generate", "dataset"] = "generate"
    pool: int = 512  # trajectories that are generated once and cached
    temperature: float = 1.0
    max_new_tokens: int = 256
    generate_batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """RLOO over tokens and depths with a depth penalty (arXiv:2603.21376, stage 2)."""

    rollouts: int = 6  # G
    depth_coef: float = 0.5  # λ
    kl_coef: float = 0.1  # β, in the reward
    length_coef: float = 0.0  # μ
    length_ref: float = 256.0  # T_ref
    advantage: Literal["rloo", "group_mean", "group_mean_std"] = "rloo"
    temperature: float = 1.0
    max_new_tokens: int = 256
    norm: Literal["constant", "sequence", "tokens"] = "constant"
    updates_per_batch: int = 1  # more than one: PPO's clipped ratio
    clip: float = 0.2
    kl_loss_coef: float = 0.0
    kl_loss: Literal["exact", "k3"] = "exact"
    causal_depth: bool = False  # a token is charged for depths at and after it only
    depth_entropy_coef: float = 0.0
    min_hazard: float = 0.0  # a floor under exploration, part of the law
    hazard_temperature: float = 1.0
    warmup_steps: int = 0  # λ and μ rise linearly to their value over these updates
    dual_ascent: bool = False  # λ and μ grow only while accuracy stays over the floor
    dual_rate: float = 0.02
    accuracy_floor: float = 0.0  # 0: off; else λ and μ are withheld below it
    importance_cap: float = 0.0  # 0: off; else truncated weights between sampler and trainer
    mask_truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Decoding, of each data shard; 0 leaves a number to the engine (see `EngineSize`)."""

    rows: int = 0  # completions under way
    places: int = 0  # rows of a tick, which runs the layers between two exits


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    problems: int = 256
    policies: tuple[str, ...] = ("full", "sample")
    # Beyond accuracy and depth: hazards, capacity, early_answering, no_chain, filler,
    # corrupted_step, hint (`jexit.eval` defines them).
    measures: tuple[str, ...] = ()
    measured: str = "sample"  # the policy that is measured, beside full depth
    temperature: float = 0.0
    max_new_tokens: int = 256
    split: Literal["train", "test"] = "test"
    heat_maps: int = 8  # completions kept with each token's depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    prompts: tuple[str, ...] = ()
    policy: str = "sample"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # strings that end a completion
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: at the end only
    keep: int = 2  # the newest ones
    keep_best: int = 0  # and as many with the best metric, a mean since the checkpoint before
    best_metric: str = ""  # "-NAME": lowest; empty: reward/mean in RL, else -loss
    final: Literal["last", "best"] = "last"  # what WORKDIR/model is made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    samples_every: int = 20  # steps between sample completions in samples.jsonl
    samples: int = 4
    tensorboard: bool = True
    wandb_project: str = ""

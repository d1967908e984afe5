"""Every setting of jexit, its default and the rules that hold between settings.

A file in `configs/` starts from `config_dict(command, preset)` and only says what differs. `main`
turns the parsed `ConfigDict` into the frozen `Config` below with `Config.from_dict`, which checks.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from typing import Any, Literal

from ml_collections import ConfigDict

from jexit.presets import PRESETS

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COMMANDS = ("pretrain", "sft", "rl", "eval", "generate")
TINY_PRESET = "tiny"
TINY_PATH = "jexit/assets/tiny"
TINY_CALIBRATED_PATH = "jexit/assets/tiny-calibrated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the weights come from and how they are computed with."""

    path: str = TINY_PATH  # a directory of convert.from_hf, of a run, or in Hugging Face format
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # base weights; auto: float32 on CPU
    attention: Literal["xla", "cudnn"] = "xla"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: Literal["sums", "word_problems", "gsm8k"] = "sums"
    path: str = ""  # gsm8k: a JSONL file, a directory of them, or a tfds data directory
    steps: Literal["free", "2", "3", "4", "5", "at_once", "mixed"] = "free"  # sums only
    operands_min: int = 3
    operands_max: int = 8
    max_prompt_tokens: int = 256
    skip_long: bool = False  # skip (and count) problems over the limit instead of stopping
    reward_strict: float = 1.0
    reward_lenient: float = 0.5
    reward_wrong: float = 0.0
    reward_none: float = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. This version runs on one device and refuses more."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


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

    length: int = 56
    width: int = 96
    layers: int = 8
    query_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 24
    mlp_width: int = 256
    rope_theta: float = 1e4
    word_problems: float = 0.2  # share of word problems; the rest is sums
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
class EvalConfig:
    problems: int = 256
    policies: tuple[str, ...] = ("full", "sample")
    temperature: float = 0.0
    max_new_tokens: int = 256
    batch_size: int = 64
    split: Literal["train", "test"] = "test"
    heat_maps: int = 8  # completions kept with each token's depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    prompts: tuple[str, ...] = ()
    policy: str = "sample"
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: at the end only
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    samples_every: int = 20  # steps between sample completions in samples.jsonl
    samples: int = 4
    tensorboard: bool = True
    wandb_project: str = ""


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "lora.rank": 0,
    "task.max_prompt_tokens": 1,
    "optim.lora_lr": 0,
    "optim.exit_lr": 0,
    "optim.full_lr": 0,
    "optim.warmup_steps": 0,
    "optim.accumulate": 1,
    "optim.max_skipped": 1,
    "sft.samples": 1,
    "sft.pool": 1,
    "sft.generate_batch": 1,
    "sft.max_new_tokens": 1,
    "rl.updates_per_batch": 1,
    "rl.warmup_steps": 0,
    "rl.max_new_tokens": 1,
    "eval.problems": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.temperature": 0,
    "generate.max_new_tokens": 1,
    "generate.temperature": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.samples_every": 1,
    "log.samples": 0,
}
_ABOVE_ZERO = ("sft.sharpness", "rl.length_ref", "rl.hazard_temperature", "optim.clip_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. `steps` counts optimiser batches; `batch_size` counts sequences (RL: prompts)."""

    command: Literal["pretrain", "sft", "rl", "eval", "generate"]
    preset: str = TINY_PRESET
    seed: int = 0
    steps: int = 100
    batch_size: int = 32
    model: ModelConfig = ModelConfig()
    exits: ExitsConfig = ExitsConfig()
    exit_head: ExitHeadConfig = ExitHeadConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | ConfigDict) -> Config:
        """Builds and checks the config; raises ValueError with key, value, rule and remedy."""
        plain = values.to_dict() if isinstance(values, ConfigDict) else values
        config = _build(cls, plain, "config")
        config.validate()
        return config

    def validate(self) -> None:
        """Checks what can be known before the model is read (`check_exits` does the rest)."""
        for key, least in _LEAST.items():
            value = operator.attrgetter(key)(self)
            if not value >= least:  # NaN is refused too
                raise ValueError(f"config.{key} is {value}; it must be at least {least}")
        for key in _ABOVE_ZERO:
            value = operator.attrgetter(key)(self)
            if not value > 0:
                raise ValueError(f"config.{key} is {value}; it must be above 0")
        unknown = [target for target in self.lora.targets if target not in PROJECTIONS]
        if unknown:
            raise ValueError(
                f"config.lora.targets names {unknown[0]!r}; choose among {', '.join(PROJECTIONS)}"
            )
        if not 0.0 <= self.lora.dropout < 1.0:
            raise ValueError(
                f"config.lora.dropout is {self.lora.dropout}; it is a probability below 1"
            )
        layers = self.exits.layers
        if list(layers) != sorted(set(layers)) or (layers and layers[0] < 1):
            raise ValueError(
                f"config.exits.layers is {layers}; exits are distinct layer numbers from 1 upwards "
                "in rising order, such as (5,10,15)"
            )
        mesh = self.mesh
        if (mesh.data, mesh.fsdp, mesh.tensor) != (1, 1, 1):
            raise ValueError(
                f"config.mesh asks for data {mesh.data} × fsdp {mesh.fsdp} × tensor {mesh.tensor} "
                "devices; this version runs on one, so leave all three at 1"
            )
        if self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"config.batch_size {self.batch_size} does not divide into optim.accumulate "
                f"{self.optim.accumulate} micro-batches; make it a multiple"
            )
        if not 0.0 <= self.sft.explore <= 1.0:
            raise ValueError(
                f"config.sft.explore is {self.sft.explore}; it is a probability, 0 to 1"
            )
        if self.command == "rl":
            self._validate_rl()
        for policy in (*self.eval.policies, self.generate.policy):
            parse_policy(policy)

    def _validate_rl(self) -> None:
        if self.rl.rollouts < 2:
            raise ValueError(
                f"RLOO needs at least 2 rollouts per prompt, got {self.rl.rollouts}; "
                "raise config.rl.rollouts"
            )
        if self.rl.temperature <= 0:
            raise ValueError(
                f"config.rl.temperature is {self.rl.temperature}; rollouts are sampled, so it must "
                "be above 0"
            )
        if not 0.0 <= self.rl.min_hazard < 1.0:
            raise ValueError(
                f"config.rl.min_hazard is {self.rl.min_hazard}; it is a probability below 1"
            )
        if self.rl.dual_ascent and self.rl.accuracy_floor <= 0:
            raise ValueError(
                "config.rl.dual_ascent needs a floor to hold; set config.rl.accuracy_floor above 0"
            )


def check_exits(exits: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The exits to use in a model of `layers` layers: those given, else every 5th.

    Raises ValueError when an exit lies at or beyond the last layer, or none is left.
    """
    exits = tuple(exits) or tuple(range(5, layers, 5))
    if not exits:
        raise ValueError(
            f"a model of {layers} layers has no exit at every 5th layer; set config.exits.layers"
        )
    if exits[-1] >= layers:
        raise ValueError(
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
    raise ValueError(
        f"policy {text!r} is not known; use full, sample, threshold:X with 0 < X < 1, or fixed:N "
        "with N layers"
    )


def config_dict(command: str, preset: str = TINY_PRESET) -> ConfigDict:
    """The defaults of a command for a preset, as a locked, type-checked ConfigDict."""
    if command not in COMMANDS:
        raise ValueError(f"command {command!r} is not one of {', '.join(COMMANDS)}")
    config = ConfigDict(Config(command=command, preset=preset or TINY_PRESET).to_dict())
    if config.preset == TINY_PRESET:
        config.exits.layers = (1, 2, 3, 4, 6)
        config.lora.rank, config.lora.alpha = 16, 32.0
        config.lora.targets = PROJECTIONS
        return config.lock()
    if config.preset not in PRESETS:
        names = ", ".join((TINY_PRESET, *PRESETS))
        raise ValueError(f"preset {preset!r} is not known; choose one of {names}")
    known = PRESETS[config.preset]
    config.model.path = f"models/{config.preset}"
    config.exits.layers = tuple(range(5, known.architecture.layers, 5))
    config.task.max_prompt_tokens = 512
    config.lora.rank = known.lora_rank
    config.lora.alpha = 2.0 * known.lora_rank
    config.lora.dropout = 0.05
    return config.lock()


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it holds settings: set {where}.KEY instead")
    for key in values:
        if key not in hints:
            near = ", ".join(sorted(hints))
            raise ValueError(f"{where}.{key} does not exist; {where} has {near}")
    built = {}
    for key, value in values.items():
        hint, path = hints[key], f"{where}.{key}"
        if dataclasses.is_dataclass(hint):
            built[key] = _build(hint, value, path)
        else:
            built[key] = _checked(hint, value, path)
    if cls is Config and "command" not in built:
        raise ValueError(f"config.command is missing; choose one of {', '.join(COMMANDS)}")
    return cls(**built)


def _checked(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_checked(args[0], item, path) for item in items)
    if origin is types.UnionType:
        return None if value is None else _checked(args[0], value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r}; it must be of type {hint.__name__}")
    return value

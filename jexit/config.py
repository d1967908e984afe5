"""Every setting of jexit, its default and the rules that hold between settings.

A file in `configs/` starts from `config_dict(command, preset)` and only says what differs. `main`
turns the parsed `ConfigDict` into the frozen `Config` below with `Config.from_dict`, which checks.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import types
import typing
from typing import Any, Literal

from ml_collections import ConfigDict

from jexit.presets import PRESETS
from jexit.sections import (
    BLENDABLE,
    STEPS,
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    ExitHeadConfig,
    ExitsConfig,
    GenerateConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RLConfig,
    SFTConfig,
    TaskConfig,
)

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COMMANDS = ("pretrain", "sft", "rl", "eval", "generate")
TINY_PRESET = "tiny"
TINY_CALIBRATED_PATH = "jexit/assets/tiny-calibrated"


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "lora.rank": 0,
    "task.max_prompt_tokens": 1,
    "task.shots": 0,
    "optim.lora_lr": 0,
    "optim.exit_lr": 0,
    "optim.full_lr": 0,
    "optim.warmup_steps": 0,
    "optim.accumulate": 1,
    "optim.max_skipped": 1,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "sft.samples": 1,
    "sft.pool": 1,
    "sft.generate_batch": 1,
    "sft.max_new_tokens": 1,
    "rl.updates_per_batch": 1,
    "rl.warmup_steps": 0,
    "rl.depth_coef": 0,
    "rl.length_coef": 0,
    "rl.kl_loss_coef": 0,
    "rl.importance_cap": 0,
    "rl.accuracy_floor": 0,
    "rl.dual_rate": 0,
    "sft.exit_coef": 0,
    "sft.temperature": 0,
    "pretrain.exit_loss": 0,
    "rl.max_new_tokens": 1,
    "eval.problems": 1,
    "engine.rows": 0,
    "engine.places": 0,
    "eval.max_new_tokens": 1,
    "eval.temperature": 0,
    "generate.max_new_tokens": 1,
    "generate.temperature": 0,
    "generate.top_k": 0,
    "generate.min_p": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "log.samples_every": 1,
    "log.samples": 0,
}
_ABOVE_ZERO = (
    "sft.sharpness",
    "rl.length_ref",
    "rl.hazard_temperature",
    "rl.clip",
    "optim.clip_norm",
)


EVAL_MEASURES = (
    "hazards",
    "capacity",
    "early_answering",
    "no_chain",
    "filler",
    "corrupted_step",
    "hint",
)

# Metrics by which a checkpoint can be the best, of each command that trains.
BEST_METRICS = {
    "pretrain": ("loss", "loss/text"),
    "sft": ("loss", "loss/exit", "kl/teacher", "depth/fraction"),
    "rl": ("reward/mean", "reward/verifier", "accuracy", "loss", "kl/teacher", "depth/fraction"),
}


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
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def best_metric(self) -> str:
        """The metric that the best checkpoint has most of; of "-NAME", least."""
        return self.checkpoint.best_metric or ("reward/mean" if self.command == "rl" else "-loss")

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
        if self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"config.batch_size {self.batch_size} does not divide into optim.accumulate "
                f"{self.optim.accumulate} micro-batches; make it a multiple"
            )
        shares = self.mesh.data * self.mesh.fsdp
        rows = self.batch_size * (self.rl.rollouts if self.command == "rl" else 1)
        trains = self.command in ("pretrain", "sft", "rl")
        if trains and rows // self.optim.accumulate % shares:
            raise ValueError(
                f"a micro-batch has {rows // self.optim.accumulate} rows, which do not divide over "
                f"config.mesh.data {self.mesh.data} × fsdp {self.mesh.fsdp}; make "
                f"config.batch_size a multiple of {shares * self.optim.accumulate}"
            )
        if not 0.0 <= self.sft.explore <= 1.0:
            raise ValueError(
                f"config.sft.explore is {self.sft.explore}; it is a probability, 0 to 1"
            )
        self._validate_tasks()
        if self.command == "sft" and self.lora.rank == 0 and self.sft.target == "student":
            raise ValueError(
                "config.sft.target=student measures exits with the teacher's output head, which "
                "config.lora.rank=0 trains; set config.sft.target=teacher or a rank above 0"
            )
        measured = BEST_METRICS.get(self.command, ())
        if measured and self.best_metric.removeprefix("-") not in measured:
            raise ValueError(
                f"config.checkpoint.best_metric is {self.checkpoint.best_metric!r}; choose among "
                f"{', '.join(measured)}, with a '-' before what is best when lowest"
            )
        if self.checkpoint.final == "best" and self.checkpoint.keep_best == 0:
            raise ValueError(
                "config.checkpoint.final=best needs a checkpoint that is kept for being the best; "
                "set config.checkpoint.keep_best=1"
            )
        if self.command == "rl":
            self._validate_rl()
        self._validate_eval()

    def _validate_eval(self) -> None:
        if self.command == "eval" and not self.eval.policies:
            raise ValueError(
                "config.eval.policies is empty; name at least one policy, such as full"
            )
        for index, policy in enumerate(self.eval.policies):
            of = control_of(policy)
            parse_policy(policy if of is None else of)
            if of is not None and of not in self.eval.policies[:index]:
                raise ValueError(
                    f"policy {policy!r} is a control for {of!r}; put that before it in "
                    "config.eval.policies"
                )
        parse_policy(self.generate.policy)
        parse_policy(self.eval.measured)
        unknown = [name for name in self.eval.measures if name not in EVAL_MEASURES]
        if unknown:
            raise ValueError(
                f"config.eval.measures names {unknown[0]!r}; choose among "
                f"{', '.join(EVAL_MEASURES)}"
            )

    def _validate_tasks(self) -> None:
        name = self.task.name
        from_files = name == "tom" and self.task.path
        known = ("free",) if from_files else STEPS.get(name, ("free",))
        if self.task.steps not in known:
            raise ValueError(
                f"config.task.steps is {self.task.steps!r}; task {name!r} "
                f"{'with a path ' if from_files else ''}knows {', '.join(known)}"
            )
        unknown = [part for part in self.task.parts if part not in BLENDABLE]
        if unknown:
            raise ValueError(
                f"config.task.parts names {unknown[0]!r}; a blend is of {', '.join(BLENDABLE)}"
            )
        for key in ("word_problems", "tom"):
            share = getattr(self.pretrain, key)
            if not 0.0 <= share <= 1.0:
                raise ValueError(
                    f"config.pretrain.{key} is {share}; it is a share of the text, 0 to 1"
                )
        both = self.pretrain.word_problems + self.pretrain.tom
        if both > 1.0:
            raise ValueError(
                f"config.pretrain.word_problems and tom add up to {both:g}; they are shares of the "
                "text, together at most 1"
            )

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
        if self.rl.updates_per_batch > 1 and self.rl.importance_cap > 0:
            raise ValueError(
                "config.rl.importance_cap weights single updates, and config.rl.updates_per_batch "
                f"is {self.rl.updates_per_batch}, which clips ratios instead; set one of the two"
            )
        if self.rl.dual_ascent and self.rl.warmup_steps > 0:
            raise ValueError(
                "config.rl.dual_ascent sets the prices itself; set config.rl.warmup_steps to 0"
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
        raise ValueError(f"command {command!r} is not one of {', '.join(COMMANDS)}")
    config = ConfigDict(Config(command=command, preset=preset or TINY_PRESET).to_dict())
    if config.preset == TINY_PRESET:
        config.exits.layers = (1, 2, 3, 4, 6)
        config.lora.rank, config.lora.alpha = 16, 32.0
        config.lora.targets = PROJECTIONS
        # The stories that the shipped model has learnt.
        config.task.people_max = 3
        config.task.moves_min = config.task.moves_max = 3
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


def check_key(key: str) -> None:
    """Raises ValueError unless `key`, such as `config.rl.rollouts`, is a setting."""
    owner, where = Config, "config"
    for name in key.split(".")[1:]:
        hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            meant = f"did you mean {where}.{near[0]}? " if near else ""
            has = f"{where} has {', '.join(sorted(hints))}" if hints else f"{where} is one value"
            raise ValueError(f"{where}.{name} does not exist; {meant}{has}")
        owner, where = hints[name], f"{where}.{name}"


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

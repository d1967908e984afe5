"""Every setting of jexit, its default and the rules that hold between settings.

A file in `configs/` starts from `config_dict(command, preset)` and only says what differs. `main`
turns the parsed `ConfigDict` into the frozen `Config` below with `Config.from_dict`, which checks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import typing
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from jexit.bounds import Bounds, Name, Seed, StepsOrZero, shown
from jexit.presets import PRESETS
from jexit.sections import (
    BLENDABLE,
    STEPS,
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    ExitHeadConfig,
    ExitsConfig,
    FinetuneConfig,
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
TRAINING = ("pretrain", "finetune", "sft", "rl")
COMMANDS = (*TRAINING, "eval", "generate")
TINY_PRESET = "tiny"
TINY_CALIBRATED_PATH = "jexit/assets/tiny-calibrated"


EVAL_MEASURES = (
    "exits",
    "hazards",
    "capacity",
    "early_answering",
    "no_chain",
    "filler",
    "corrupted_step",
    "hint",
)

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
class Config:
    """One run. `steps` counts optimiser batches; `batch_size` counts sequences (RL: prompts)."""

    command: Literal["pretrain", "finetune", "sft", "rl", "eval", "generate"]
    preset: Name = TINY_PRESET
    seed: Seed = 0
    steps: StepsOrZero = 100  # 0: in sft with lens_steps, those alone
    batch_size: Annotated[int, Bounds(1, 100_000)] = 32
    model: ModelConfig = ModelConfig()
    exits: ExitsConfig = ExitsConfig()
    exit_head: ExitHeadConfig = ExitHeadConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
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
        return self.checkpoint.best_metric or ("val/reward" if self.command == "rl" else "-loss")

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
        _check_preset(self.preset)
        unknown = [target for target in self.lora.targets if target not in PROJECTIONS]
        if unknown:
            raise ValueError(
                f"config.lora.targets names {unknown[0]!r}; choose among {', '.join(PROJECTIONS)}"
            )
        layers = self.exits.layers
        if list(layers) != sorted(set(layers)):
            raise ValueError(
                f"config.exits.layers is {shown(layers)}; exits are distinct layer numbers in "
                "rising order, such as (5,10,15)"
            )
        if self.exits.continuation_rank and self.exits.continuation == "frozen":
            raise ValueError(
                f"config.exits.continuation_rank is {self.exits.continuation_rank} and "
                "config.exits.continuation is frozen, which has no matrices; set "
                "config.exits.continuation=linear or the rank to 0"
            )
        together = self.sft.completions if self.command == "sft" else 1  # sequences of a row
        if self.batch_size % (self.optim.accumulate * together):
            raise ValueError(
                f"config.batch_size {self.batch_size} does not divide into optim.accumulate "
                f"{self.optim.accumulate} micro-batches"
                + (f" of prompts with sft.completions {together} each" if together > 1 else "")
                + "; make it a multiple"
            )
        shares = self.mesh.data * self.mesh.fsdp
        rows = self.batch_size * (self.rl.rollouts if self.command == "rl" else 1) // together
        if self.command in TRAINING and rows // self.optim.accumulate % shares:
            raise ValueError(
                f"a micro-batch has {rows // self.optim.accumulate} rows, which do not divide over "
                f"config.mesh.data {self.mesh.data} × fsdp {self.mesh.fsdp}; make "
                f"config.batch_size a multiple of {shares * self.optim.accumulate * together}"
            )
        if together > 1 and self.sft.generate_batch % together:
            raise ValueError(
                f"config.sft.generate_batch {self.sft.generate_batch} does not divide into prompts "
                f"with sft.completions {together} each; make it a multiple"
            )
        if together > 1 and self.sft.trajectories == "dataset":
            raise ValueError(
                f"config.sft.completions={together} is for completions that the teacher generates, "
                "and a data set has one of each prompt; set it to 1, or "
                "config.sft.trajectories=generate"
            )
        if self.steps == 0 and not (self.command == "sft" and self.sft.lens_steps):
            raise ValueError(
                "config.steps is 0, which only calibration with config.sft.lens_steps can have; it "
                "must be at least 1"
            )
        self._validate_sizes()
        self._validate_tasks()
        if self.command == "sft" and self.sft.explore > 0 and self.sft.exit_loss == "sampled":
            raise ValueError(
                f"config.sft.explore is {self.sft.explore:g} and config.sft.exit_loss is sampled, "
                "which would teach the heads the explored depths in place of the targets; set "
                "config.sft.exit_loss=expected or config.sft.explore=0"
            )
        if self.command == "sft" and self.sft.stay_weight != 1 and self.sft.exit_loss == "sampled":
            raise ValueError(
                f"config.sft.stay_weight is {self.sft.stay_weight:g} and config.sft.exit_loss is "
                "sampled, which scores the drawn depths and has no such weight; set "
                "config.sft.exit_loss=expected or config.sft.stay_weight=1"
            )
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

    def _validate_sizes(self) -> None:
        """Refuses what is too large only together: it would fill the memory before it began."""
        for keys, most in MOST_TOGETHER[self.command].items():
            sizes = [operator.attrgetter(key)(self) for key in keys]
            if math.prod(sizes) > most:
                raise ValueError(
                    f"config.{' × '.join(keys)} is {' × '.join(map(str, sizes))} = "
                    f"{math.prod(sizes)}; together it must be at most {most}: lower one of them"
                )
        p = self.pretrain
        heads = 2 * p.head_dim * (p.query_heads + p.kv_heads)
        parameters = p.layers * p.width * (heads + 3 * p.mlp_width)
        if self.command == "pretrain" and parameters > MOST_PARAMETERS:
            raise ValueError(
                f"config.pretrain asks for {parameters} parameters in the blocks; it must be at "
                f"most {MOST_PARAMETERS}: lower width, layers, mlp_width or the heads"
            )

    def _validate_eval(self) -> None:
        if self.command in TRAINING and self.eval.split == "test":
            raise ValueError(
                "config.eval.split is 'test' in a run that trains, which no choice may see; set it "
                "to val here and measure test with configs/eval.py"
            )
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
        if self.task.people_min == 2 and self.task.moves_max > 6:
            raise ValueError(
                f"config.task.moves_max is {self.task.moves_max} with people_min 2; so few people "
                "rarely make so long a story: set people_min to 3 or moves_max to at most 6"
            )
        unknown = [part for part in self.task.parts if part not in BLENDABLE]
        if unknown:
            raise ValueError(
                f"config.task.parts names {unknown[0]!r}; a blend is of {', '.join(BLENDABLE)}"
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
        if self.rl.updates_per_batch > 1 and self.rl.importance_cap > 0:
            raise ValueError(
                "config.rl.importance_cap weights single updates, and config.rl.updates_per_batch "
                f"is {self.rl.updates_per_batch}, which clips ratios instead; set one of the two"
            )
        if self.rl.dual_ascent and self.rl.warmup_steps > 0:
            raise ValueError(
                "config.rl.dual_ascent sets λ and μ itself; set config.rl.warmup_steps to 0"
            )
        if self.rl.floor_of == "initial" and self.rl.accuracy_floor <= 0:
            raise ValueError(
                "config.rl.floor_of=initial makes the floor a share of the initial model's "
                f"accuracy, and config.rl.accuracy_floor is {self.rl.accuracy_floor:g}; set it "
                "above 0, 0.9 say"
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
    if command == "eval":
        config.eval.split = "test"
    if config.preset == TINY_PRESET:
        config.exits.layers = (1, 2, 3, 4, 6)
        config.lora.rank, config.lora.alpha = 16, 32.0
        config.lora.targets = PROJECTIONS
        # The stories that the shipped model has learnt.
        config.task.people_max = 3
        config.task.moves_min = config.task.moves_max = 3
        return config.lock()
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
    return config.lock()


def _check_preset(preset: str) -> None:
    if preset not in (TINY_PRESET, *PRESETS):
        names = ", ".join((TINY_PRESET, *PRESETS))
        raise ValueError(f"preset {shown(preset)} is not known; choose one of {names}")


def check_key(key: str) -> type:
    """The type of a setting or section such as `config.rl.rollouts`; ValueError if it is none."""
    owner, where = Config, "config"
    for name in key.split(".")[1:]:
        hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            meant = f"did you mean {where}.{near[0]}? " if near else ""
            has = f"{where} has {', '.join(sorted(hints))}" if hints else f"{where} is one value"
            raise ValueError(f"{where}.{name} does not exist; {meant}{has}")
        owner, where = hints[name], f"{where}.{name}"
    return owner


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values)}; it holds settings: set {where}.KEY instead")
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
    if origin is Annotated:
        value = _checked(args[0], value, path)
        args[1].check(value, path)
        return value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} is {shown(value)}; choose one of {', '.join(args)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_checked(args[0], item, path) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{path} is {shown(value)}; it is too large for a number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {shown(value)}; it must be of type {hint.__name__}")
    if hint is str and ("\0" in value or not _is_unicode(value)):
        raise ValueError(f"{path} is {shown(value)}; it must be text, in UTF-8 and without NUL")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

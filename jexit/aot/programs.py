"""Every jitted step that a config's command runs, with abstract arguments of the largest shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jexit.config import Config, check_exits
from jexit.data.tokenizer import Tokenizer
from jexit.dist.rules import names_of, parameter_axes, spec
from jexit.io.model_source import open_model
from jexit.loops.pretrain import RESULT_GROUPS, new_model
from jexit.loops.setup import (
    adapter_settings,
    execution_of,
    head_settings,
    make_policy,
    sampling_law,
)
from jexit.model.cache import cache_bucket, prompt_bucket
from jexit.model.policies import Full, Policy
from jexit.model.transformer import Transformer
from jexit.presets import PRESETS, Architecture
from jexit.rollout import decode
from jexit.rollout.sampling import Sampling
from jexit.steps.completions import Completions, bucket_length
from jexit.steps.optim import make_optimizer
from jexit.steps.pretrain import PretrainBatch, make_pretrain_step
from jexit.steps.rl import Prices, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import Fixed, SplitModel, new_state, parameter_labels, split_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One jitted step: how to lower it, and what lies on the devices while it runs.

    `inputs` are its arguments by name; `beside` is what the run keeps there that is none of them;
    `exit_share` is the share of the layers that have an exit before them; `loops` has the rounds of
    loops that the compiled module does not tell, by their scope.
    `compiled` hears of the result, for a program that takes what this one returns.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    inputs: dict[str, Any]
    exit_share: float
    loops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    beside: Any = None
    note: str = ""
    compiled: Callable[[jax.stages.Lowered, jax.stages.Compiled], None] | None = None


def device_bytes(tree: Any) -> int:
    """Bytes that arrays without values would take on each device, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if getattr(leaf, "sharding", None) is not None
    )


def rows_of(config: Config) -> int:
    """Rows that must divide over the data axes: of a micro-batch, or of a batch of prompts."""
    if config.command in ("pretrain", "sft", "rl"):
        samples = config.rl.rollouts if config.command == "rl" else 1
        return config.batch_size * samples // config.optim.accumulate
    return _prompts(config)


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The programs of the config's command, in the order in which a run reaches them."""
    if config.command == "pretrain":
        yield _pretraining(config, mesh)
        return
    model = _abstract_model(config)
    split = split_model(model, full=config.lora.rank == 0)
    fixed = Fixed(*(_placed(part, mesh) for part in split.fixed))
    split = SplitModel(split.graphdef, _placed(split.trainable, mesh), fixed)
    layers, section = model.arch.layers, config.eval
    state = None
    if config.command in ("sft", "rl"):
        optimizer = make_optimizer(
            config.optim, config.steps, parameter_labels(model, full=config.lora.rank == 0)
        )
        state = _placed(jax.eval_shape(lambda: new_state(_zeros(split.trainable), optimizer)), mesh)
    rollouts = _Rollouts(config, mesh, split, state)
    if config.command == "sft":
        size = min(config.sft.generate_batch, config.sft.pool)
        if config.sft.trajectories == "generate":
            yield from rollouts.programs(
                "teacher", size, 1, config.sft.max_new_tokens, [("", Full())], adapters=False
            )
        yield _calibration(config, mesh, split, state, optimizer)
    if config.command == "rl":
        yield from rollouts.programs(
            "rollout",
            config.batch_size,
            config.rl.rollouts,
            config.rl.max_new_tokens,
            [("", _policy(config, "sample", 1, 1, layers))],
        )
        yield _update(config, mesh, split, state, optimizer)
    names: tuple[str, ...] = ("sample",)
    if config.command in ("eval", "generate"):
        section = getattr(config, config.command)
        names = config.eval.policies if config.command == "eval" else (config.generate.policy,)
    prompts, new = _prompts(config), section.max_new_tokens
    policies = {
        # Thresholds and prescribed depths are arguments: one program serves all of them.
        f" ({name.partition(':')[0]})": _policy(config, name, prompts, new, layers)
        for name in names
    }
    kind = "generation" if config.command == "generate" else "evaluation"
    yield from rollouts.programs(kind, prompts, 1, new, list(policies.items()))


def _policy(config: Config, name: str, rows: int, columns: int, layers: int) -> Policy:
    """A policy whose arrays have no values: nothing here may run on devices that are not there."""
    return jax.eval_shape(lambda: make_policy(name, rows, columns, layers, sampling_law(config)))


def _prompts(config: Config) -> int:
    """Prompts decoded at once: of the evaluation, or those that `generate` is given."""
    if config.command == "generate":
        return min(64, max(1, len(config.generate.prompts)))
    return min(config.eval.batch_size, config.eval.problems)


def _architecture(config: Config) -> Architecture:
    """Of the preset; the shipped model's comes from its files, which are always there."""
    if config.preset in PRESETS:
        return PRESETS[config.preset].architecture
    return open_model(config.model.path).architecture


def _abstract_model(config: Config) -> Transformer:
    """The config's model without values; the base weights as an accelerator would hold them."""
    arch = _architecture(config)
    dtype = jnp.bfloat16 if config.model.dtype == "auto" else jnp.dtype(config.model.dtype)

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=check_exits(config.exits.layers, arch.layers),
            exit_head=head_settings(config),
            lora=adapter_settings(config),
            dtype=dtype,
            execution=execution_of(config),
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(build)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that the rules give parameters, moments and counters."""

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        axes = parameter_axes(names_of(path), leaf.ndim)
        sharding = NamedSharding(mesh, spec(axes, leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array with rows on its first axis, spread over the data axes."""
    sharding = NamedSharding(mesh, spec("B" + "." * (len(shape) - 1), shape))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _exit_share(split: SplitModel) -> float:
    model = split.student(split.trainable)
    return len(model.exit_layers) / model.arch.layers


def _pretraining(config: Config, mesh: Mesh) -> Program:
    tokenizer = Tokenizer.load(config.model.path)
    model = nnx.eval_shape(lambda: new_model(config, tokenizer))
    split = split_model(model, full=True, keep_teacher=False)
    split = SplitModel(split.graphdef, _placed(split.trainable, mesh), split.fixed)
    optimizer = make_optimizer(config.optim, config.steps, parameter_labels(model, full=True))
    state = _placed(jax.eval_shape(lambda: new_state(_zeros(split.trainable), optimizer)), mesh)
    step = make_pretrain_step(
        split,
        optimizer,
        exit_loss=config.pretrain.exit_loss,
        groups=tuple(RESULT_GROUPS),
        micro_batches=config.optim.accumulate,
    )
    shape = (config.batch_size, config.pretrain.length)
    tokens_BT, weight_BT = _rows(mesh, *shape), _rows(mesh, *shape, dtype=jnp.float32)
    batch = PretrainBatch(tokens_BT, weight_BT, tokens_BT)
    return Program(
        name="pretraining step",
        lower=lambda: step.lower(state, batch, _key()),
        inputs={"state": state, "batch": batch},
        exit_share=_exit_share(split),
    )


def _completions(config: Config, mesh: Mesh, rows: int, new: int) -> Completions:
    """Rows as long as a prompt at the limit with a completion at its own makes them."""
    total = bucket_length(config.task.max_prompt_tokens + new)
    width = bucket_length(new)
    return Completions(
        _rows(mesh, rows, total), _rows(mesh, rows), _rows(mesh, rows, width), _rows(mesh, rows)
    )


def _calibration(
    config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any
) -> Program:
    step = make_sft_step(split, optimizer, config.sft, micro_batches=config.optim.accumulate)
    batch = _completions(config, mesh, config.batch_size, config.sft.max_new_tokens)
    return Program(
        name="calibration step",
        lower=lambda: step.lower(state, split.fixed, batch, _key()),
        inputs={"state": state, "fixed": split.fixed, "batch": batch},
        exit_share=_exit_share(split),
        note="teacher scoring (final distribution, exits' KL) is part of the calibration step: one "
        f"pass a micro-batch serves its {config.sft.samples} students",
    )


def _update(config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any) -> Program:
    step = make_rl_step(split, optimizer, config.rl, micro_batches=config.optim.accumulate)
    rows = config.batch_size * config.rl.rollouts
    completions = _completions(config, mesh, rows, config.rl.max_new_tokens)
    depth_BC = completions.completion_tokens_BC
    floats_BC = _rows(mesh, *depth_BC.shape, dtype=jnp.float32)
    batch = RLBatch(
        completions,
        depth_BC,
        floats_BC,
        floats_BC,
        _rows(mesh, rows, dtype=jnp.float32),
        _rows(mesh, rows, dtype=jnp.bool),
    )
    return Program(
        name="RL update",
        lower=lambda: step.lower(state, split.fixed, batch, Prices(0.5, 0.0), _key()),
        inputs={"state": state, "fixed": split.fixed, "batch": batch},
        exit_share=_exit_share(split),
        note="teacher scoring (log-probabilities of the rollouts' tokens) is part of the RL update",
    )


class _Rollouts:
    """Programs of the decoding engine: prefill, larger caches, and the loop over tokens."""

    def __init__(self, config: Config, mesh: Mesh, split: SplitModel, state: Any) -> None:
        self._mesh, self._split, self._state = mesh, split, state
        self._prompt = prompt_bucket(config.task.max_prompt_tokens)

    def programs(
        self,
        name: str,
        prompts: int,
        samples: int,
        new: int,
        policies: list[tuple[str, Policy]],
        *,
        adapters: bool = True,
    ) -> Iterator[Program]:
        """One prefill, and a decode with the largest cache for each policy."""
        split, mesh = self._split, self._mesh
        layers = split.student(split.trainable).arch.layers
        own_teacher = split.fixed.teacher is not None and not adapters
        trunk = split.fixed.teacher if own_teacher else split.trainable
        states = (trunk, split.fixed.frozen)
        beside = {"state": self._state, "fixed": split.fixed}
        most = self._prompt + new - 1
        slots = cache_bucket(most, most)
        options = {"adapters": adapters, "hazards": False}
        sampling = Sampling.of(1.0, 1.0)
        tokens_BT, lengths_B = _rows(mesh, prompts, self._prompt), _rows(mesh, prompts)
        eos_N = jax.ShapeDtypeStruct((2,), jnp.int32)
        made: dict[str, Any] = {}

        def prefill() -> jax.stages.Lowered:
            arguments = (tokens_BT, lengths_B, eos_N, _key(), np.int32(0), sampling)
            static = {"samples": samples, "slots": slots, "max_new_tokens": new}
            return decode.prefill.lower(split.graphdef, states, *arguments, **static, **options)

        def prefilled(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
            made["rows"], made["state"] = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                lowered.out_info,
                compiled.output_shardings,
            )

        yield Program(
            name=f"{name} prefill",
            lower=prefill,
            inputs={"states": states, "prompts": tokens_BT},
            exit_share=_exit_share(split),
            beside=beside,
            compiled=prefilled,
        )
        if new == 1 or not made:  # the prefill has drawn it, or was not compiled
            return
        for label, policy in policies:
            yield Program(
                name=f"{name} decode{label}, a token",
                lower=lambda policy=policy: decode.decode.lower(
                    split.graphdef, states, made["rows"], made["state"], policy, sampling, **options
                ),
                inputs={"states": states, "decoding": made["state"]},
                exit_share=_exit_share(split),
                loops={decode.LAYERS_SCOPE: layers, decode.FILL_SCOPE: 0},
                beside=beside,
            )
        yield from self._growth(name, new, slots, made["state"], beside)

    def _growth(
        self, name: str, new: int, slots: int, state: decode.Decoding, beside: Any
    ) -> Iterator[Program]:
        """The last of the copies into a larger cache, if decoding starts with a smaller one."""
        most = self._prompt + new - 1
        smaller = cache_bucket(min(self._prompt + max(16, self._prompt // 8), most), most)
        if smaller >= slots:
            return
        while (larger := cache_bucket(smaller + 1, most)) < slots:
            smaller = larger

        def with_slots(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*part.shape[:3], smaller, part.shape[4])
            return jax.ShapeDtypeStruct(shape, part.dtype, sharding=part.sharding)

        cache = jax.tree.map(with_slots, state.cache)
        yield Program(
            name=f"{name} cache, {smaller} → {slots} slots",
            lower=lambda: decode.grown.lower(cache, slots=slots),
            inputs={"cache": cache},
            exit_share=_exit_share(self._split),
            beside=beside,
        )

"""Every jitted step that a config's command runs, with abstract arguments of the largest shapes.

Abstract arguments have no values, so the steps can be compiled for absent devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jexit.aot.engine import EnginePrograms
from jexit.aot.program import Program, abstract_key, placed, placed_parameters, rows
from jexit.config import Config, ExitSettings, check_exits, control_of
from jexit.data.tokenizer import Tokenizer
from jexit.dist import data_shards
from jexit.errors import UserError
from jexit.evaluation.exits import compare_exits
from jexit.evaluation.faithfulness import LIKELIHOODS, MEASURES
from jexit.evaluation.hazards import decisions_and_targets
from jexit.evaluation.loglikelihood import token_scores
from jexit.evaluation.planning import residuals_at
from jexit.evaluation.replay import batch_rows
from jexit.io.model_source import find_model, open_model
from jexit.loops.continuation import rows_at_a_time
from jexit.loops.pretrain import GROUPS, new_model
from jexit.loops.setup import execution_of, sample_policy
from jexit.loops.sft import HEADS_TOKENS
from jexit.loops.stage import trained_parts
from jexit.loops.trajectories import rows_of_batch
from jexit.model.attention import choose_attention
from jexit.model.policies import Full, Policy, Prescribed, policy_of
from jexit.model.transformer import Transformer
from jexit.presets import PRESETS, Architecture
from jexit.steps.completions import Completions, bucket_length
from jexit.steps.exit_heads import ExitStates, make_exit_states, make_lens_step
from jexit.steps.finetune import make_finetune_step
from jexit.steps.optim import make_optimizer
from jexit.steps.pretrain import PretrainBatch, make_pretrain_step
from jexit.steps.ridge import RidgeSums, make_sums_step
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.sft import make_sft_step
from jexit.steps.state import FixedParams, SplitModel, new_state, parameter_labels, split_model


def exit_share(config: Config) -> float:
    """Returns the fraction of the model's layers that have an exit, a number from 0 to 1."""
    if config.command == "pretrain":
        layers = config.pretrain.layers
        return len(check_exits(config.exits.layers, layers)) / layers
    return len(_exits(config)[0]) / architecture(config).layers


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """Yields the jitted steps of the config's command, in the order in which a run reaches them."""
    if config.command == "pretrain":
        yield _pretraining(config, mesh)
        return
    model = _abstract_model(config)
    section = config.eval
    state, optimizer = None, None
    if config.command in ("finetune", "sft", "rl"):
        split, _, optimizer = trained_parts(model, config, config.steps)
        state = _state(mesh, split, optimizer)
    else:
        split = split_model(model, full=False)
    fixed = FixedParams(*(placed_parameters(part, mesh) for part in split.fixed))
    trainable = placed_parameters(split.trainable, mesh)
    split = split._replace(trainable=trainable, fixed=fixed)
    rollouts = EnginePrograms(config, mesh, split, state)
    if config.command == "finetune":
        yield _finetuning(config, mesh, split, state, optimizer)
    if config.command == "sft":
        size = min(config.sft.generate_batch, config.sft.pool)
        if config.sft.trajectories == "generate":
            yield from rollouts.programs(
                "teacher", size, 1, config.sft.max_new_tokens, [("", Full())], adapters=False
            )
        if config.exits.continuation == "linear":
            yield _fit(config, mesh, split, state)
        if config.steps:
            yield _calibration(config, mesh, split, state, optimizer)
        if config.sft.lens_steps:
            yield from _heads(config, mesh, split, state, optimizer)
    if config.command == "rl":
        yield from rollouts.programs(
            "rollout",
            config.batch_size,
            config.rl.rollouts,
            config.rl.max_new_tokens,
            [("", _policy(config, "sample"))],
        )
        yield _update(config, mesh, split, state, optimizer)
    names: tuple[str, ...] = (
        (config.finetune.policy,) if config.command == "finetune" else ("sample",)
    )
    if config.command in ("eval", "generate"):
        section = getattr(config, config.command)
        names = config.eval.policies if config.command == "eval" else (config.generate.policy,)
    prompts, new = _prompts(config), section.max_new_tokens
    # Thresholds and prescribed depths are arguments: one program serves all of them.
    policies = dict(_labelled(config, name, prompts, new) for name in names)
    kind = "generation" if config.command == "generate" else "evaluation"
    yield from rollouts.programs(kind, prompts, 1, new, list(policies.items()))
    if config.command == "eval":
        yield from _measurements(config, mesh, split, rollouts)


def _measurements(
    config: Config, mesh: Mesh, split: SplitModel, rollouts: EnginePrograms
) -> Iterator[Program]:
    """Yields the jitted steps of the evaluation measures in `config.eval.measures`."""
    prompts, new = config.eval.problems, config.eval.max_new_tokens
    layers = split.student(split.trainable).arch.layers
    measures = set(config.eval.measures)
    if measures & (set(MEASURES) - set(LIKELIHOODS)):
        both = 2 * prompts  # a measure's two arms share a decode
        label, policy = _labelled(config, config.eval.measured, both, new)
        policies = {label: policy, " (full)": Full()}
        yield from rollouts.programs(
            "measurement", both, 1, new, list(policies.items()), forced=new
        )
    if not measures & {"exits", "hazards", "planning", *LIKELIHOODS}:
        return
    length = bucket_length(config.task.max_prompt_tokens + new)
    with jax.set_mesh(mesh):
        count = batch_rows(prompts, length)
    batch = _completions(config, mesh, count, new)
    student = split.decodable(split.trainable)
    if measures & set(LIKELIHOODS):
        label, policy = _labelled(config, config.eval.measured, count, new)
        yield Program(
            name=f"likelihoods of answers{label}",
            function=token_scores,
            arguments=(student[0], student[1:], batch, policy, abstract_key()),
        )
    if "planning" in measures:
        exits = split.student(split.trainable).exit_layers
        yield Program(
            name="residuals for probes",
            function=residuals_at,
            arguments=(student[0], student[1:], batch, batch.completion_tokens_BC),
            options={"layers": (0, *exits, layers)},
        )
    if "exits" in measures:
        yield Program(
            name="exits against the last layer",
            function=compare_exits,
            arguments=(student[0], student[1:], batch),
            resident=split.fixed,
        )
    if "hazards" in measures:
        teacher = split.decodable_teacher(split.trainable)
        sharpness = jax.ShapeDtypeStruct((), jnp.float32)
        yield Program(
            name="hazards and their targets",
            function=decisions_and_targets,
            arguments=(
                student[0], student[1:], teacher[0], teacher[1:], batch,
                batch.completion_tokens_BC, sharpness, sample_policy(config),
            ),
            options={"target": config.sft.target},
        )  # fmt: skip


def _labelled(config: Config, name: str, rows: int, columns: int) -> tuple[str, Policy]:
    """Returns (label, policy) for the policy called `name`; step names contain the label.

    The policy has abstract arrays. A control, which prescribes the depth of every token, gets
    abstract depths [rows, columns]. Raises UserError for `confidence:X`, which replaces the exit
    heads of the config's model, and for `speculate:N`, which has a decoder of its own.
    """
    if control_of(name) is not None:
        return " (prescribed)", Prescribed(jax.ShapeDtypeStruct((rows, columns), jnp.int32))
    if name.partition(":")[0] in ("confidence", "speculate"):
        raise UserError(
            f"policy {name!r} cannot be compiled ahead of time; leave it out, or use another one, "
            "such as threshold:0.5"
        )
    return f" ({name.partition(':')[0]})", _policy(config, name)


def _policy(config: Config, name: str) -> Policy:
    """Returns the policy `name` with abstract arrays, as absent devices cannot hold values."""
    return jax.eval_shape(lambda: policy_of(name, sample_policy(config)))


def _prompts(config: Config) -> int:
    """Returns the number of prompts that the command `generate` or the evaluation decodes."""
    if config.command == "generate":
        return max(1, len(config.generate.prompts))
    return config.eval.problems


def architecture(config: Config) -> Architecture:
    """Returns the architecture of the config's preset or, if it has none, of the config's model.

    Raises UserError if the model's weights do not fit its architecture.
    """
    if config.preset in PRESETS:
        return PRESETS[config.preset].architecture
    source = open_model(config.model.path)
    source.weights()  # raises if the weights do not fit the architecture
    return source.architecture


def _exits(config: Config) -> tuple[tuple[int, ...], ExitSettings]:
    """Returns the exit layers and the exits' settings of the config's model.

    They are those of the model directory, if the config has no preset and does not train exits.
    """
    if config.preset not in PRESETS and config.command not in ("sft", "rl"):
        source = open_model(config.model.path)
        if source.exit_layers:
            return source.exit_layers, source.exit_head
    settings = ExitSettings() if config.command == "finetune" else config.exit_settings
    return check_exits(config.exits.layers, architecture(config).layers), settings


def _abstract_model(config: Config) -> Transformer:
    """Returns the config's model with abstract arrays; `auto` as the dtype means bfloat16."""
    arch = architecture(config)
    exit_layers, exit_head = _exits(config)
    dtype = jnp.bfloat16 if config.dtype == "auto" else jnp.dtype(config.dtype)

    def build() -> Transformer:
        return Transformer(
            arch,
            exit_layers=exit_layers,
            exit_head=exit_head,
            lora=config.adapters,
            dtype=dtype,
            execution=execution_of(config),
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(build)


def _state(mesh: Mesh, split: SplitModel, optimizer: Any) -> Any:
    """Returns a run's training state, with abstract arrays."""

    def begun() -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), split.trainable)
        return new_state(zeros, optimizer)

    return placed_parameters(jax.eval_shape(begun), mesh)


def _pretraining(config: Config, mesh: Mesh) -> Program:
    tokenizer = Tokenizer.load(find_model(config.model.path))
    model = nnx.eval_shape(lambda: new_model(config, tokenizer))
    split = split_model(model, full=True, keep_teacher=False)
    split = SplitModel(split.graphdef, placed_parameters(split.trainable, mesh), split.fixed)
    optimizer = make_optimizer(config.optim, config.steps, parameter_labels(model, full=True))
    state = _state(mesh, split, optimizer)
    step = make_pretrain_step(
        split,
        optimizer,
        exit_loss=config.pretrain.exit_loss,
        groups=tuple(GROUPS),
        micro_batches=config.optim.accumulate,
    )
    shape = (config.batch_size, config.pretrain.length)
    ids_BT, weight_BT = rows(mesh, *shape), rows(mesh, *shape, dtype=jnp.float32)
    batch = PretrainBatch(ids_BT, weight_BT, ids_BT, ids_BT, ids_BT)
    return Program(name="pretraining step", function=step, arguments=(state, batch, abstract_key()))


def _completions(
    config: Config, mesh: Mesh, count: int, new: int, *, shared: bool = False
) -> Completions:
    """Returns abstract `Completions` (shapes without values) of `count` rows.

    Each row has room for a prompt of the maximum length and `new` tokens. If `shared`, the
    completions of a row share one copy of their prompt, unless the attention is `splash`.
    """
    length = bucket_length(config.task.max_prompt_tokens + new)
    branches = shared and choose_attention(config.model.attention, length) != "splash"
    input_BT, window_BC = rows(mesh, count, length), rows(mesh, count, bucket_length(new))
    return Completions(*[input_BT] * 3, *[window_BC] * 4, branches=branches)


def _trajectories(config: Config, mesh: Mesh, count: int) -> Completions:
    together = config.sft.completions
    new = together * config.sft.max_new_tokens
    return _completions(config, mesh, count, new, shared=together > 1)


def _fit(config: Config, mesh: Mesh, split: SplitModel, state: Any) -> Program:
    step, model = make_sums_step(split), split.student(split.trainable)
    with jax.set_mesh(mesh):
        size = rows_at_a_time(config, config.sft.pool // config.sft.completions)
        shape = (model.exit_layers, model.arch.layers, model.arch.width)
        sums = jax.eval_shape(jax.jit(RidgeSums.zero, static_argnums=(0, 1, 2)), *shape)
    sums = jax.tree.map(
        lambda leaf: placed(leaf, mesh, "LDF" if leaf.ndim == 3 else "." * leaf.ndim), sums
    )
    batch = _trajectories(config, mesh, size)
    return Program(
        name="fit of the continuation",
        function=step,
        arguments=(sums, state.trainable, split.fixed, batch),
        resident=(state, sums),  # the sums of the batches that are held back
    )


def _heads(
    config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any
) -> Iterator[Program]:
    """Yields the steps that store residuals and KLs at the exits and train only the exit heads."""
    with jax.set_mesh(mesh):
        size = rows_at_a_time(config, config.sft.pool // config.sft.completions)
    batch = _trajectories(config, mesh, size)
    add = make_exit_states(split, config.sft.sharpness)
    with jax.set_mesh(mesh):
        states = jax.eval_shape(jax.jit(lambda: ExitStates.empty(split, config.sft.lens_tokens)))
    states = jax.tree.map(lambda leaf: rows(mesh, *leaf.shape, dtype=leaf.dtype), states)
    place_M = jax.ShapeDtypeStruct((batch.completion_tokens_BC.size,), jnp.int32)
    yield Program(
        name="states at the exits",
        function=add,
        arguments=(states, state.trainable, split.fixed, batch, place_M, abstract_key()),
        resident=state,
    )
    step = make_lens_step(split, optimizer, config.sft)
    position_M = jax.ShapeDtypeStruct((HEADS_TOKENS,), jnp.int32)
    yield Program(
        name="calibration step of the heads",
        function=step,
        arguments=(state, split.fixed, states, position_M),
    )


def _calibration(
    config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any
) -> Program:
    step = make_sft_step(split, optimizer, config.sft, micro_batches=config.optim.accumulate)
    batch = _trajectories(config, mesh, rows_of_batch(config))
    return Program(
        name="calibration step",
        function=step,
        arguments=(state, split.fixed, batch, abstract_key()),
        note="teacher scoring (final distribution, exits' KL) is part of the calibration step: one "
        f"pass per micro-batch serves its {config.sft.samples} students",
    )


def _packed(config: Config, mesh: Mesh, count: int, new: int, *, shared: bool) -> Completions:
    """Returns abstract `Completions` with enough rows for `count` completions in any packing.

    Each row has room for a prompt of the maximum length and `new` tokens. The number of rows is
    `count`, rounded up to a multiple of the data shards × `config.optim.accumulate`. See
    `_completions` for `shared`.
    """
    with jax.set_mesh(mesh):
        unit = data_shards() * config.optim.accumulate
    return _completions(config, mesh, -(-count // unit) * unit, new, shared=shared)


def _finetuning(
    config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any
) -> Program:
    policy = sample_policy(config) if config.finetune.policy == "sample" else Full()
    step = make_finetune_step(
        split, optimizer, policy=policy, micro_batches=config.optim.accumulate
    )
    new = config.finetune.max_new_tokens
    batch = _packed(config, mesh, config.batch_size, new, shared=False)
    return Program(
        name="fine-tuning step",
        function=step,
        arguments=(state, split.fixed, batch, abstract_key()),
    )


def _update(config: Config, mesh: Mesh, split: SplitModel, state: Any, optimizer: Any) -> Program:
    step = make_rl_step(split, optimizer, config.rl, micro_batches=config.optim.accumulate)
    count, new = config.batch_size * config.rl.rollouts, config.rl.max_new_tokens
    depth_JW = rows(mesh, count, new)
    floats_JW = rows(mesh, count, new, dtype=jnp.float32)
    batch = RLBatch(
        _packed(config, mesh, count, new, shared=True),
        rows(mesh, count),
        depth_JW,
        floats_JW,
        floats_JW,
        rows(mesh, count, dtype=jnp.float32),
        rows(mesh, count, dtype=jnp.bool),
    )
    return Program(
        name="RL update",
        function=step,
        arguments=(state, split.fixed, batch, Penalties(0.5, 0.0), abstract_key()),
        note="teacher scoring (log-probabilities of the rollouts' tokens) is part of the RL update",
    )

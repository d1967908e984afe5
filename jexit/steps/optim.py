"""AdamW with a learning rate per kind of parameter, gradient accumulation and clipping.

A step is skipped if its loss, its gradients or the updated values are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, PRNGKey
from jexit.config import OptimConfig
from jexit.dist import constrain_parameters
from jexit.model.transformer import Transformer
from jexit.steps.state import Params, SplitModel, TrainState, parameter_labels, split_model

STILL = "still"  # the label of parameters that do not train

Metrics = dict[str, Array]
# (params, micro-batch, key) → (its share of the loss, its share of the metrics)
LossFn = Callable[[Params, Any, PRNGKey], tuple[Array, Metrics]]


def schedule(config: OptimConfig, peak: float, steps: int) -> optax.Schedule:
    """Returns a learning-rate schedule: a linear warm-up to `peak`, then `config.schedule`.

    After the `config.warmup_steps` (0: no warm-up), the rate stays at `peak` ("constant"), or falls
    to `config.final_fraction` · `peak` by step `steps`, linearly or along a cosine.
    """
    warmup, end = config.warmup_steps, config.final_fraction * peak
    rest = max(steps - warmup, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }[config.schedule]()
    if warmup == 0:
        return decay
    # The ramp starts above zero, so that step 0 already changes the parameters.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int, labels: Params) -> optax.GradientTransformation:
    """Returns an optimiser that clips gradients by their global norm and then applies AdamW.

    `labels` is a tree with the kind of each parameter (see `parameter_labels`). Each kind has its
    own peak learning rate, scheduled over `steps` steps; parameters labelled `STILL` have no
    gradient (None) and no optimiser state. Weight decay applies to matrices only. The gradient of
    the continuation is clipped separately: because the continuation reads unnormalised residuals,
    its gradient is a hundred times that of all other parameters in real models.
    """
    peaks = {
        "lora": config.lora_lr,
        "exit": config.exit_lr,
        "exit_bias": config.exit_bias * config.exit_lr,
        "exit_hidden": config.exit_hidden * config.exit_lr,
        "continuation": config.continuation_lr,
        "base": config.full_lr,
    }

    def matrices(params: Params) -> Params:
        def decays(path: tuple, _: Array) -> bool:
            return path[-1].key in ("kernel", "embedding", "lora_a", "lora_b", "w1", "w2")

        return jax.tree_util.tree_map_with_path(decays, params)

    adamw = {
        label: optax.adamw(
            schedule(config, peak, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=matrices,
        )
        for label, peak in peaks.items()
    }
    clip = optax.clip_by_global_norm(config.clip_norm)
    own = jax.tree.map(lambda label: "own" if label == "continuation" else "common", labels)
    clipped = optax.partition({"own": clip, "common": clip}, own)
    return optax.chain(clipped, optax.partition(adamw | {STILL: optax.set_to_zero()}, labels))


def split_for_training(
    model: Transformer, config: OptimConfig, *, full: bool, keep_teacher: bool = True
) -> tuple[SplitModel, Params]:
    """Splits a model (see `split_model`); returns it and the labels for `make_optimizer`.

    Exit heads and a continuation whose learning rate is 0 are labelled `STILL`, and have no
    gradient.
    """
    labels = parameter_labels(model, full=full)
    still = () if config.continuation_lr else ("continuation",)
    still += () if config.exit_lr else ("exit", "exit_bias", "exit_hidden")
    labels = jax.tree.map(lambda kind: STILL if kind in still else kind, labels)
    trains = jax.tree.map(lambda label: label != STILL, labels)
    split = split_model(model, full=full, keep_teacher=keep_teacher)
    return split._replace(trains=trains), labels


def micro_batch(batch: Any, index: Array, micro_batches: int) -> Any:
    """Returns micro-batch `index` of a batch: rows `index`, `index` + `micro_batches`, …

    `batch` is a pytree of arrays. Each micro-batch contains an equal share of the rows of each
    device, so no row moves between devices.
    """

    def cut(rows: Array) -> Array:
        groups = rows.reshape(-1, micro_batches, *rows.shape[1:])
        return jax.lax.dynamic_index_in_dim(groups, index, axis=1, keepdims=False)

    return batch if micro_batches == 1 else jax.tree.map(cut, batch)


def joined(parts: Any) -> Any:
    """Joins the stacked parts [micro_batches, rows, …] of each array into one batch.

    The rows [micro_batches · rows, …] are in the order of the batch that `micro_batch` divided.
    """
    return jax.tree.map(lambda rows: jnp.swapaxes(rows, 0, 1).reshape(-1, *rows.shape[2:]), parts)


def gradient_step(
    split: SplitModel,
    loss_fn: LossFn,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batch: Any,
    micro_batches: int,
    key: PRNGKey,
) -> tuple[TrainState, Metrics]:
    """Takes one optimiser step on the sum of `loss_fn` over the micro-batches of `batch`.

    Returns the new state, and the metrics of `loss_fn` (summed) and of `apply_gradients`.
    """
    loss, metrics, gradients = accumulated_gradients(
        split.value_and_grad(loss_fn),
        state.trainable,
        lambda index: micro_batch(batch, index, micro_batches),
        micro_batches,
        key,
    )
    state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
    return state, metrics | update_metrics


def accumulated_gradients(
    value_and_grad: Callable[..., tuple[tuple[Array, Metrics], Params]],
    params: Params,
    take: Callable[[Array], Any],
    count: int,
    key: PRNGKey,
) -> tuple[Array, Metrics, Params]:
    """Returns loss, metrics and gradients, summed over micro-batches `take(0)` … `take(count − 1)`.

    `value_and_grad` is that of a `LossFn`, which must divide by denominators of the whole batch,
    such as its number of tokens. The sums then equal the results of one pass over the whole batch,
    even if rows have different lengths.
    """

    def one(index: Array) -> tuple[Array, Metrics, Params]:
        rows = take(index)
        (loss, metrics), gradients = value_and_grad(params, rows, jax.random.fold_in(key, index))
        return loss, metrics, gradients

    return summed(one, count)


def summed(one: Callable[[Array], Any], count: int) -> Any:
    """Returns the sum one(0) + … + one(count − 1) of pytrees; a `scan` compiles `one` only once."""
    if count == 1:
        return one(jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.int32(0)))
    total, _ = jax.lax.scan(
        lambda total, index: (jax.tree.map(jnp.add, total, one(index)), None),
        zeros,
        jnp.arange(count),
    )
    return total


def _all_finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def _is_schedule(part: Any) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)


def apply_gradients(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradients: Params,
    loss: Array,
) -> tuple[TrainState, Metrics]:
    """Takes one optimiser step, or skips it; returns the new state and metrics.

    A step is skipped if the loss, the gradients, the new parameters or the new optimiser state are
    not finite. A skipped step changes only the counters, those of the learning rates included.
    Parameters with None as their gradient stay as they are. The metrics are `grad_norm`, before
    clipping, and `skipped`, the number of consecutive skipped steps up to this one.
    """
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    trainable = jax.tree.map(
        lambda update, leaf: leaf if update is None else optax.apply_updates(leaf, update),
        updates,
        state.trainable,
        is_leaf=lambda update: update is None,
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite((trainable, opt_state))
    trainable, opt_state = jax.tree.map(
        lambda new, old: new if _is_schedule(new) else jnp.where(finite, new, old),
        (trainable, opt_state),
        (state.trainable, state.opt_state),
        is_leaf=_is_schedule,
    )
    trainable, opt_state = constrain_parameters((trainable, opt_state))
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics = {"grad_norm": norm, "skipped": skipped.astype(jnp.float32)}
    return TrainState(state.step + 1, trainable, opt_state, skipped), metrics

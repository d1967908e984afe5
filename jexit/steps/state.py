"""The state of a training run, and the split of a model into trainable and fixed parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from jexit.axes import Array, Int, PRNGKey
from jexit.model.exits import ContinuationParam, ExitParam
from jexit.model.lora import LoRAParam
from jexit.model.transformer import Transformer

Params = Any  # nested nnx.State of arrays


@struct.dataclass
class TrainState:
    """The trainable parameters, the optimiser state and two counters.

    Batches and PRNG keys derive from the seed and `step`. `skipped` is the number of consecutive
    steps, up to the latest one, that were skipped because of NaN or infinity.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: optax.OptState
    skipped: Int[Array, ""]


class FixedParams(NamedTuple):
    """The parameters that a run does not train.

    `frozen` are the student's fixed parameters. `teacher` is a copy of the initial trainable
    parameters, or None if the base weights stay fixed or no teacher is needed. Jitted steps take a
    `FixedParams` as an argument, because arrays in a closure would be compiled into the program as
    constants.
    """

    frozen: Params
    teacher: Params | None


class SplitModel(NamedTuple):
    """A model split into structure and parameters, so that steps can be pure functions.

    `trains` says for each array of `trainable` whether it has a gradient (None: all do). The others
    belong to the state of a run, which may set them, such as a continuation that keeps its fit.
    """

    graphdef: nnx.GraphDef
    trainable: Params
    fixed: FixedParams
    trains: Params | None = None

    def student(self, trainable: Params, fixed: FixedParams | None = None) -> Transformer:
        """Returns the model with the parameters `trainable` and `fixed` (None: `self.fixed`)."""
        fixed = self.fixed if fixed is None else fixed
        return nnx.merge(self.graphdef, trainable, fixed.frozen)

    def teacher(self, trainable: Params, fixed: FixedParams | None = None) -> Transformer:
        """Returns the teacher, without gradient; run it with `adapters=False`.

        The teacher's parameters are the copy in `fixed`, or `trainable` if there is no such copy.
        """
        fixed = self.fixed if fixed is None else fixed
        if fixed.teacher is not None:
            trainable = fixed.teacher
        return nnx.merge(self.graphdef, jax.lax.stop_gradient(trainable), fixed.frozen)

    def value_and_grad(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `jax.value_and_grad(loss_fn, has_aux=True)` for the parameters that train.

        The gradient has None in place of the others.
        """
        if self.trains is None:
            return jax.value_and_grad(loss_fn, has_aux=True)

        def of_all(params: Params, *arguments: Any) -> Any:
            def of_trained(trained: Params) -> Any:
                whole = jax.tree.map(
                    lambda trains, leaf, still: leaf if trains else still,
                    self.trains,
                    trained,
                    params,
                )
                return loss_fn(whole, *arguments)

            trained = jax.tree.map(
                lambda trains, leaf: leaf if trains else None, self.trains, params
            )
            return jax.value_and_grad(of_trained, has_aux=True)(trained)

        return of_all

    @property
    def teacher_has_own_head(self) -> bool:
        return self.fixed.teacher is not None

    def decodable(self, trainable: Params) -> tuple:
        """Returns (graphdef, trainable, frozen), the form in which `jexit.rollout` takes models."""
        return (self.graphdef, trainable, self.fixed.frozen)

    def decodable_teacher(self, trainable: Params) -> tuple:
        """Returns the teacher in the form of `decodable`; decode it with `adapters=False`."""
        return self.decodable(self.fixed.teacher if self.teacher_has_own_head else trainable)


def split_model(model: Transformer, *, full: bool, keep_teacher: bool = True) -> SplitModel:
    """Splits a model into trainable and fixed parameters.

    Without `full`, the adapters, exit heads and continuation are trainable. With `full`, all
    parameters are trainable, and the teacher is a second copy of them, unless `keep_teacher` is
    False.
    """
    graphdef, trainable, frozen = nnx.split(model, _trains(full), ...)
    trainable, frozen = nnx.as_pure(trainable), nnx.as_pure(frozen)
    teacher = None
    if full and keep_teacher:  # shapes without values need no copy
        teacher = jax.tree.map(
            lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, trainable
        )
    return SplitModel(graphdef, trainable, FixedParams(frozen, teacher))


def parameter_labels(model: Transformer, *, full: bool) -> Params:
    """Returns the kind of each trainable parameter, in a tree with the structure of the parameters.

    The kinds are `lora`, `exit` (output weights of the exit heads), `exit_bias` (output biases),
    `exit_hidden` (norms and hidden layers of the heads), `continuation` and `base` (all others).
    See `split_model` for `full`.
    """

    def label(path: tuple, variable: nnx.Variable) -> str:
        if isinstance(variable, ContinuationParam):
            return "continuation"
        if isinstance(variable, ExitParam):
            return {"w2": "exit", "b2": "exit_bias"}.get(path[-1].key, "exit_hidden")
        return "lora" if isinstance(variable, LoRAParam) else "base"

    return jax.tree_util.tree_map_with_path(
        label, nnx.state(model, _trains(full)), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _trains(full: bool) -> Any:
    return nnx.Param if full else nnx.Any(LoRAParam, ExitParam)


def new_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32)
    )


def step_key(seed: int, step: int | Array, stream: int = 0) -> PRNGKey:
    """Returns the PRNG key of training step `step`, from `seed`; each `stream` has its own keys."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.random.fold_in(key, step)

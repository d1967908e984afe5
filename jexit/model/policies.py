"""Halting policies: rules, passed to the model as data, that decide when a token leaves.

Before any layer runs, `Policy.start` returns the depth of each token, which is the number of layers
if the exits decide. At an exit, `Policy.leaves` decides from the hazard logits which tokens leave.
Afterwards, `Policy.log_prob` returns the log-probability of the chosen depths. Scalars in a policy
apply to all tokens; arrays have one row per completion. `Policy.at` selects the array entries of
single tokens, and `Policy.map_rows` transforms the arrays.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jexit.axes import Array, Bool, Float, Int, Key, PRNGKey
from jexit.config import ExitSettings, parse_policy
from jexit.errors import UserError
from jexit.model.exits import depth_log_prob, log_hazards


class Policy:
    """The base class of halting policies; by default, no token leaves and every check passes.

    Arrays over tokens have shape [B, T] or [B]. The argument `depths` of the methods contains the
    depths that a token can have: the model's exit layers and, last, the number of layers.
    """

    reads_hazards: ClassVar[bool] = False  # True: decides at the exits
    leaves_early: ClassVar[bool] = True  # False: every token runs all layers
    draws: ClassVar[bool] = False  # True: decides at random
    drafts: ClassVar[bool] = False  # True: an exit drafts tokens, which all layers verify

    @property
    def name(self) -> str:
        """The policy's name in config files, such as `threshold:0.5`."""
        return type(self).__name__.lower()

    def check(self, depths: tuple[int, ...]) -> None:
        """Raises UserError if a setting is invalid for a model with `depths`.

        Settings whose values are not known yet (JAX tracers) are not checked.
        """

    def check_rows(self, rows: int, columns: int) -> None:
        """Raises UserError unless per-token arrays have `rows` rows and at least `columns` columns.

        A row is a completion, and a column one of its tokens.
        """

    def start(self, shape: tuple[int, ...], layers: int) -> Int[Array, "*A"]:
        """Returns each token's depth before any layer runs, int32 of the shape `shape`.

        The depth is `layers`, the number of layers, if the exits decide.
        """
        return jnp.full(shape, layers, jnp.int32)

    def leaves(self, hazard_logits: Float[Array, "*A"], key: PRNGKey | None) -> Bool[Array, "*A"]:
        """Returns whether each token leaves at the exit; a policy that draws needs a PRNG `key`."""
        return jnp.zeros(hazard_logits.shape, bool)

    def log_prob(
        self, depth: Int[Array, "*A"], hazard_logits: Float[Array, "*A E"], depths: tuple[int, ...]
    ) -> Float[Array, "*A"]:
        """Returns the log-probability of each depth (in layers); 0 if the policy does not draw."""
        return jnp.zeros(depth.shape)

    @property
    def by_row(self) -> bool:
        """Whether the policy contains arrays with one row per completion."""
        return any(np.ndim(leaf) for leaf in jax.tree.leaves(self))

    def at(self, row: Int[Array, "*A"], column: Int[Array, "*A"]) -> Policy:
        """Returns the policy for single tokens, each given by its completion (`row`) and column.

        The column is the token's index in the completion. Without per-row arrays, returns `self`.
        """
        return self

    def map_rows(self, function: Callable[[Any], Any]) -> Self:
        """Returns a copy with `function` applied to the arrays that have one row per completion."""
        return jax.tree.map(lambda leaf: function(leaf) if np.ndim(leaf) else leaf, self)

    def leaves_by_row(
        self, hazard_logits_B: Float[Array, "B"], keys_B: Key[Array, "B"]
    ) -> Bool[Array, "B"]:
        """Returns whether each row's token leaves; like `leaves`, but with one PRNG key per row."""
        axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, self)
        return jax.vmap(type(self).leaves, in_axes=(axes, 0, 0))(self, hazard_logits_B, keys_B)

    @property
    def setting(self) -> dict[str, Any]:
        """The fields that a row of `Mixed` needs to behave like this policy, named without `_B`.

        Fields that are left out keep the values with which every layer runs.
        """
        return {}


@struct.dataclass
class Full(Policy):
    """Every token runs all layers."""

    leaves_early: ClassVar[bool] = False


@struct.dataclass
class Fixed(Policy):
    """Every token runs the first `layer` layers; `layer` is an exit or the number of all layers."""

    layer: Int[Array, ""] | int

    @property
    def name(self) -> str:
        return f"fixed:{int(self.layer)}"

    def check(self, depths: tuple[int, ...]) -> None:
        _check_depths("Fixed", self.layer, depths)

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        return jnp.broadcast_to(jnp.clip(jnp.asarray(self.layer, jnp.int32), 1, layers), shape)

    @property
    def setting(self) -> dict[str, Any]:
        return {"depth": self.layer}


@struct.dataclass
class Speculate(Policy):
    """Self-speculative decoding: exit `layer` drafts tokens, and the full model verifies them.

    Samples have the distribution of `Full`, and greedy decoding gives the same tokens; only the
    speed differs. `generate`, `stream` and the server speculate; elsewhere this acts like `Full`.
    """

    layer: int = struct.field(pytree_node=False)
    leaves_early: ClassVar[bool] = False
    drafts: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"speculate:{self.layer}"

    def check(self, depths: tuple[int, ...]) -> None:
        if self.layer not in depths[:-1]:
            raise UserError(
                f"Speculate has layer {self.layer}, but tokens can be drafted only at the exits "
                f"{depths[:-1]}; give one of these layers"
            )


@struct.dataclass
class Prescribed(Policy):
    """Each token runs the number of layers given in `depth_BT`: up to an exit, or all layers.

    In `forward`, `depth_BT` has one column per input position. In `generate`, column i is for the
    pass that produces generated token i; column 0 is ignored, because the prefill produces the
    first token, with all layers.
    """

    depth_BT: Int[Array, "B T"]

    def __post_init__(self) -> None:
        if isinstance(self.depth_BT, list | tuple):  # else its numbers would be pytree leaves
            object.__setattr__(self, "depth_BT", np.asarray(self.depth_BT, np.int32))

    def check(self, depths: tuple[int, ...]) -> None:
        _check_depths("Prescribed", self.depth_BT, depths)

    def check_rows(self, rows: int, columns: int) -> None:
        shape = np.shape(self.depth_BT)
        if len(shape) != 2 or shape[0] != rows or shape[1] < columns:
            raise UserError(
                f"Prescribed has depths of shape {shape}, but it needs the shape ({rows}, N) with "
                f"N of at least {columns}: a row per completion and a column per token; change the "
                "shape, or use Fixed(depth) for the same depth everywhere"
            )

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        depth = jnp.asarray(self.depth_BT, jnp.int32)
        if depth.shape != shape:
            raise UserError(
                f"Prescribed has depths of shape {depth.shape}, but the tokens have shape {shape}; "
                "give one depth per token, or use Fixed(depth) for the same depth everywhere"
            )
        return jnp.clip(depth, 1, layers)

    def at(self, row: Array, column: Array) -> Prescribed:
        return Prescribed(jnp.asarray(self.depth_BT).at[row, column].get(mode="clip"))

    @property
    def setting(self) -> dict[str, Any]:
        raise UserError(
            "Prescribed sets a depth for each token, but a request that joins a running pool has "
            "one policy for all of its tokens; decode this request with jexit.rollout.rollout"
        )


@struct.dataclass
class Sample(Policy):
    """A token that reaches an exit leaves there with a probability equal to the exit's hazard.

    The hazard is min_hazard + (1 − min_hazard)·σ(z / temperature), where z is the hazard logit. The
    depths then follow `jexit.model.exits.depth_log_distribution`.
    """

    reads_hazards: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    temperature: Float[Array, ""] | float = 1.0
    min_hazard: Float[Array, ""] | float = 0.0

    @classmethod
    def trained(cls, exits: ExitSettings) -> Sample:
        """Returns the policy with the settings under which a model's exits were trained.

        An unknown temperature becomes 1, and an unknown `min_hazard` 0.
        """
        # NumPy numbers: to read an array on a device, the host would wait for the running step.
        temperature = 1.0 if exits.hazard_temperature is None else exits.hazard_temperature
        return cls(np.float32(temperature), np.float32(exits.min_hazard or 0.0))

    def check(self, depths: tuple[int, ...]) -> None:
        temperature, floor = _known(self.temperature), _known(self.min_hazard)
        if temperature is not None and not 0.0 < temperature < math.inf:
            raise UserError(
                f"Sample has temperature {float(temperature)}, but it must be finite and above 0, "
                "because hazards are σ(z / temperature); give one such as 1"
            )
        if floor is not None and not 0.0 <= floor <= 1.0:
            raise UserError(
                f"Sample has min_hazard {float(floor)}, but it must be a probability from 0 to 1; "
                "give 0 if hazards need no lower limit"
            )

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        if key is None:
            raise UserError(
                "Sample draws depths at random, so it needs a PRNG key; pass key=, such as "
                "key=jax.random.key(0)"
            )
        log_leave, _ = log_hazards(hazard_logits, **self.setting)
        uniform = jax.random.uniform(key, hazard_logits.shape, minval=1e-12)
        return jnp.log(uniform) < log_leave

    def log_prob(self, depth: Array, hazard_logits: Array, depths: tuple[int, ...]) -> Array:
        return depth_log_prob(depth, hazard_logits, depths[:-1], depths[-1], **self.setting)

    @property
    def setting(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "min_hazard": self.min_hazard}


@struct.dataclass
class Threshold(Policy):
    """A token leaves at the first exit where σ(z) > `hazard`; z is that exit's hazard logit."""

    reads_hazards: ClassVar[bool] = True

    hazard: Float[Array, ""] | float = 0.5

    @property
    def name(self) -> str:
        return f"threshold:{float(self.hazard):g}"

    def check(self, depths: tuple[int, ...]) -> None:
        hazard = _known(self.hazard)
        if hazard is not None and not 0.0 <= hazard <= 1.0:
            raise UserError(
                f"Threshold has hazard {float(hazard)}, but it must be from 0 (tokens leave at the "
                "first exit) to 1 (they never leave); give the probability above which they leave"
            )

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        return jax.nn.sigmoid(hazard_logits) > self.hazard

    @property
    def setting(self) -> dict[str, Any]:
        return {"hazard": self.hazard}


@struct.dataclass
class Mixed(Policy):
    """A separate policy for each completion, stored as arrays, so one compiled program runs all.

    It is for decoding only, where arrays have one entry per completion. A completion leaves at
    random (as under `Sample`), at a threshold, or at a fixed depth.
    """

    reads_hazards: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    depth_B: Int[Array, "B"]  # the depth where no exit decides
    hazard_B: Float[Array, "B"]  # the threshold of rows that do not draw; at 1 they never leave
    temperature_B: Float[Array, "B"]
    min_hazard_B: Float[Array, "B"]
    draws_B: Bool[Array, "B"]

    @classmethod
    def of(cls, policies: Sequence[Policy]) -> Mixed:
        full = {"depth": np.iinfo(np.int32).max, "hazard": 1, "temperature": 1, "min_hazard": 0}
        rows = [full | policy.setting for policy in policies]
        dtypes = (np.int32, np.float32, np.float32, np.float32)
        settings = (
            np.asarray([row[name] for row in rows], dtype)
            for name, dtype in zip(full, dtypes, strict=True)
        )
        return cls(*settings, np.asarray([policy.draws for policy in policies]))

    def start(self, shape: tuple[int, ...], layers: int) -> Array:
        return jnp.broadcast_to(jnp.minimum(self.depth_B, layers), shape)

    def leaves(self, hazard_logits: Array, key: PRNGKey | None) -> Array:
        drawn = Sample(self.temperature_B, self.min_hazard_B).leaves(hazard_logits, key)
        return jnp.where(self.draws_B, drawn, jax.nn.sigmoid(hazard_logits) > self.hazard_B)

    def log_prob(self, depth: Array, hazard_logits: Array, depths: tuple[int, ...]) -> Array:
        drawn = Sample(self.temperature_B[:, None], self.min_hazard_B[:, None])
        return jnp.where(self.draws_B, drawn.log_prob(depth, hazard_logits, depths), 0.0)

    def at(self, row: Array, column: Array) -> Mixed:
        return self.map_rows(lambda part_B: jnp.asarray(part_B)[row])


def policy_of(text: str, sample: Sample = Sample(), *further: str) -> Policy:
    """Returns the policy named `text`, such as `full`, `threshold:0.5` or `fixed:6`.

    For the name `sample`, returns the argument `sample`. With `speculate` in `further`,
    `speculate:N` is allowed too. With `confidence`, `confidence:X` is a `Threshold(X)` for a model
    whose exit heads are `ConfidenceHeads`. Raises UserError for another name.
    """
    kind, argument = parse_policy(text, *further)
    if argument is None:
        return sample if kind == "sample" else Full()
    kinds = {"fixed": Fixed, "speculate": Speculate}
    return kinds.get(kind, Threshold)(argument)


def check_policy(policy: Any, depths: tuple[int, ...]) -> None:
    """Raises UserError unless `policy` is a policy and is valid for a model with `depths`.

    `depths` are the model's exit layers and, last, the number of layers.
    """
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise UserError(
            f"policy is the class {policy.__name__}, but it must be an instance; give one such as "
            "jexit.Sample() or jexit.Threshold(0.5)"
        )
    if not isinstance(policy, Policy):
        raise UserError(
            f"policy is {policy!r}, but it must be a policy; give one such as jexit.Full(), "
            "jexit.Sample(), jexit.Threshold(0.5) or jexit.Fixed(6)"
        )
    policy.check(depths)


def warn_if_untrained(policy: Policy, model: Any) -> None:
    """Warns if `policy` reads untrained exit heads, at which tokens hardly ever leave.

    Heads count as untrained if all their biases still have the initial value. Tracers are skipped.
    """
    bias_E = _known(model.exits.b2[...]) if policy.reads_hazards else None
    if bias_E is not None and np.all(bias_E == np.float32(model.exit_head.bias)):
        warnings.warn(
            f"the exit heads of this model are untrained, so {policy.name} hardly ever leaves "
            "early; calibrate the heads (configs/sft.py) or load a model with trained exit heads",
            stacklevel=3,
        )


def _known(value: Any) -> np.ndarray | None:
    """Returns `value` as a NumPy array, or None if `value` is a JAX tracer."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _check_depths(name: str, depth: Any, depths: tuple[int, ...]) -> None:
    known = _known(depth)
    wrong = set() if known is None else {*known.ravel().tolist()} - {*depths}
    if wrong:
        raise UserError(
            f"{name} has depth {min(wrong)}, but a token of this model leaves at one of the exits "
            f"{depths[:-1]} or runs all {depths[-1]} layers; give one of these depths"
        )

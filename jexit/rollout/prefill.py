"""The compiled program that prefills prompts and draws the first token of each completion."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, Float, Int
from jexit.dist import constrain
from jexit.model.attention import KeysValues
from jexit.model.cache import Cache
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer, logits_of, run
from jexit.rollout.pool import Jobs, Records, by_shard, specs
from jexit.rollout.sampling import TOKEN_DRAW, Draws, fold_in

DEPTH_DRAW = 1  # number of the forced tokens' depth draws; 0 is the draw of the first new token


@struct.dataclass
class ForcedPrefix:
    """The number of forced tokens at the end of each prompt, and the policy under which they exit.

    `job_B` contains the first job (completion) of each prompt, numbered over all shards. The prompt
    before the forced tokens runs all layers, including its last position.
    """

    tokens_B: Int[Array, "B"]
    job_B: Int[Array, "B"]
    policy: Policy

    def exits(
        self, jobs: Jobs, draws: Draws, length_B: Int[Array, "B"], length: int
    ) -> dict[str, Any]:
        """Returns arguments of `jexit.model.transformer.run` with which forced tokens may leave.

        `length_B` are the lengths of the prompts, which are padded to `length`.
        """
        index_BT = jnp.arange(length) - (length_B - self.tokens_B)[:, None]
        # Column i of `Prescribed` is for the pass that produces token i of the completion.
        policy = self.policy.at(self.job_B[:, None], jnp.maximum(index_BT + 1, 0))
        keys_B = draws.keys(jobs, self.job_B, jnp.zeros_like(self.job_B))
        return {"policy": policy, "action_BT": index_BT >= 0, "key": fold_in(keys_B, DEPTH_DRAW)}


@struct.dataclass
class _Prefilled:
    """The keys and values of prompts, and the logits and depths at each prompt's last position."""

    keys_values: KeysValues
    job_BG: Int[Array, "B G"]
    logits_BV: Float[Array, "B V"]
    depth_B: Int[Array, "B"]
    depth_logprob_B: Float[Array, "B"]
    hazard_logits_BE: Float[Array, "B E"] | None


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "adapters"),
    donate_argnames=("prefixes", "records"),
)
def prefill(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    prefixes: Cache,
    records: Records,
    jobs: Jobs,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"],
    job_BG: Int[Array, "B G"],
    draws: Draws,
    forced: ForcedPrefix | None,
    *,
    adapters: bool,
) -> tuple[Cache, Records]:
    """Prefills right-padded prompts and draws the first token of each completion.

    `job_BG` contains the jobs (completions) of each prompt, numbered within the prompt's data
    shard; a number beyond the shard's jobs marks padding. Prompts run all layers, except for forced
    prefixes. Returns the updated prefix cache and records.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    length = tokens_BT.shape[1]
    valid_BT = jnp.arange(length) < length_B[:, None]
    keeps_hazards = records.hazard_logits_JTE is not None
    exits = {}
    if forced is not None:
        exits = forced.exits(jobs, draws, length_B, length) | {"hazards": keeps_hazards}
    result = run(model, tokens_BT, valid_BT=valid_BT, adapters=adapters, keys_values=True, **exits)

    def last(values_BTX: Array) -> Array:
        at = (length_B - 1).reshape(-1, *[1] * (values_BTX.ndim - 1))
        return jnp.take_along_axis(values_BTX, at, axis=1)[:, 0]

    logits_BV = constrain(logits_of(last(result.hidden_BTD), model.head_VD), "BV")
    depth_B, z_BE, depth_logprob_B = last(result.depth_BT), None, jnp.zeros(length_B.shape)
    if forced is not None and result.hazard_logits_BTE is not None:
        exits_B = forced.tokens_B > 0  # whether the last position may leave
        z_BE = last(result.hazard_logits_BTE)
        depths = (*model.exit_layers, model.arch.layers)
        drawn_B = forced.policy.log_prob(depth_B, z_BE, depths)
        depth_logprob_B = jnp.where(exits_B, drawn_B, 0.0)
        reached_BE = (jnp.asarray(model.exit_layers) <= depth_B[:, None]) & exits_B[:, None]
        z_BE = jnp.where(reached_BE, z_BE, jnp.nan) if keeps_hazards else None

    def record(
        prefixes: Cache, records: Records, jobs: Jobs, made: _Prefilled, draws: Draws
    ) -> tuple[Cache, Records]:
        count = records.length_J.shape[0]
        job_B, samples = made.job_BG.reshape(-1), made.job_BG.shape[1]
        real_B = job_B < count
        known_B = jnp.minimum(job_B, count - 1)
        keys_B = draws.keys(jobs, known_B, jnp.zeros_like(known_B))
        token_B, logprob_B = draws.sampling.at(known_B).draw(
            jnp.repeat(made.logits_BV, samples, axis=0), fold_in(keys_B, TOKEN_DRAW)
        )
        slot_B = jnp.where(real_B, jobs.slot_J[known_B], prefixes.keys_KLPSH.shape[2])
        prefixes = prefixes.with_prompts(slot_B[::samples], made.keys_values)

        depth_B, depth_logprob_B, z_BE = jax.tree.map(
            lambda of_prompt: jnp.repeat(of_prompt, samples, axis=0),
            (made.depth_B, made.depth_logprob_B, made.hazard_logits_BE),
        )
        ends_B = draws.ends(token_B)
        return prefixes, records.with_tokens(
            job_B, 0, token_B, depth_B, logprob_B, depth_logprob_B, z_BE, ends_B
        )

    made = _Prefilled(result.keys_values, job_BG, logits_BV, depth_B, depth_logprob_B, z_BE)
    stored = by_shard(
        record,
        in_specs=(*specs((prefixes, records, jobs, made)), P()),
        out_specs=specs((prefixes, records)),
    )
    return stored(prefixes, records, jobs, made, draws)

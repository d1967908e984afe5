"""The RL step: an RLOO update on rollouts.

An action is a token together with the depth of the pass that produced it. The reward contains a
penalty on depth.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jexit.axes import Array, Bool, Float, Int, PRNGKey
from jexit.config import RLConfig
from jexit.kernels import linear_kl
from jexit.losses.masked import masked_mean, masked_sum
from jexit.losses.rloo import (
    Reward,
    causal_depth_cost,
    depth_cost,
    depth_entropy_bonus,
    group_advantages,
    k2,
    k3,
    loss_weights,
    policy_loss_terms,
    reached_decision_entropy,
    rewards,
    zero_spread_groups,
)
from jexit.model.exits import depth_log_prob, exit_index_of_depth, log_hazards
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import Transformer, run
from jexit.steps.completions import Completions, flat, token_logprobs
from jexit.steps.optim import Metrics, gradient_step, joined, micro_batch
from jexit.steps.state import FixedParams, Params, SplitModel, TrainState


@struct.dataclass
class RLBatch:
    """A batch of J rollouts of up to W tokens for one RL step, with values from sampling.

    `rows` contains the rollouts with their prompts, packed into rows; rollouts of the same prompt
    are adjacent. `lengths_J` counts their tokens. For each token, `depth_JW` is the depth of the
    pass that produced the token. `logprobs_JW` is the token's log-probability under the tempered
    distribution from which it was drawn. `depth_logprobs_JW` is the log-probability of the depth
    under the halting policy (0 at position 0, where the depth is not chosen). `verifier_J` is the
    reward that the task gives, without penalties. `truncated_J` marks rollouts that reached the
    token limit.
    """

    rows: Completions
    lengths_J: Int[Array, "J"]
    depth_JW: Int[Array, "J W"]
    logprobs_JW: Float[Array, "J W"]
    depth_logprobs_JW: Float[Array, "J W"]
    verifier_J: Float[Array, "J"]
    truncated_J: Bool[Array, "J"]

    @property
    def token_JW(self) -> Bool[Array, "J W"]:
        """A mask that is True at generated tokens and False at padding."""
        return jnp.arange(self.depth_JW.shape[1]) < self.lengths_J[:, None]

    @property
    def action_JW(self) -> Bool[Array, "J W"]:
        """A mask of the tokens whose pass could leave early: all but the first of each rollout."""
        return self.token_JW & (jnp.arange(self.depth_JW.shape[1]) > 0)


@struct.dataclass
class Penalties:
    """The coefficients λ (depth) and μ (length) of one step, as arrays for the jitted step."""

    depth_coef: Float[Array, ""] | float
    length_coef: Float[Array, ""] | float


RLStep = Callable[
    [TrainState, FixedParams, RLBatch, Penalties, PRNGKey], tuple[TrainState, Metrics]
]
# The values of `config.kl_loss` that need whole distributions, and their direction in `linear_kl`.
EXACT_KL = {"exact": "student_teacher", "forward": "teacher_student"}


@struct.dataclass
class Scored:
    """A batch with teacher scores, advantages and weights, which all optimiser steps share."""

    rows: Completions
    depth_BC: Int[Array, "B C"]
    behaviour_BC: Float[Array, "B C"]  # log-probability of token and depth when they were drawn
    advantage_BC: Float[Array, "B C"]
    weight_BC: Float[Array, "B C"]  # loss weights: masked, normalised
    mean_BC: Float[Array, "B C"]  # weights of a mean over generated tokens
    teacher_BC: Float[Array, "B C"]  # log π_teacher of the tokens
    teacher_hidden_BCD: Array | None  # for the exact KL


def make_rl_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    config: RLConfig,
    *,
    micro_batches: int = 1,
) -> RLStep:
    """Returns the jitted RL step (state, fixed, batch, penalties, key) → (state, metrics).

    The step scores the rollouts with the teacher, computes rewards and advantages, and takes
    `config.updates_per_batch` optimiser steps on `policy_loss`, each over `micro_batches`
    micro-batches.
    """

    def step(
        state: TrainState, fixed: FixedParams, batch: RLBatch, penalties: Penalties, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        teacher = split.teacher(state.trainable, fixed)
        teacher_head_VD = teacher.head_VD if split.teacher_has_own_head else None
        scored, metrics = score(teacher, batch, penalties, config, micro_batches)
        metrics |= depth_metrics(batch, teacher.exit_layers, teacher.arch.layers)

        def loss_fn(params: Params, item: Scored, _: PRNGKey) -> tuple[Array, Metrics]:
            return policy_loss(split.student(params, fixed), item, config, teacher_head_VD)

        start = state.step
        for update in range(config.updates_per_batch):
            update_key = jax.random.fold_in(key, update)
            state, update_metrics = gradient_step(
                split, loss_fn, state, optimizer, scored, micro_batches, update_key
            )
            if update > 0:  # the gap to the sampler is meaningful only before the first update
                update_metrics.pop("sampler_gap")
            metrics |= update_metrics
        metrics["tokens"] = jnp.sum(batch.lengths_J).astype(jnp.float32)
        return state.replace(step=start + 1), metrics

    return jax.jit(step, donate_argnums=0)


def score(
    teacher: Transformer,
    batch: RLBatch,
    penalties: Penalties,
    config: RLConfig,
    micro_batches: int,
) -> tuple[Scored, Metrics]:
    """Returns the batch with teacher scores, advantages and loss weights, and reward metrics."""
    rows, token_JW = batch.rows, batch.token_JW.astype(jnp.float32)
    teacher_BC, teacher_hidden_BCD = teacher_scores(teacher, rows, config, micro_batches)
    log_ratio_JW = batch.logprobs_JW - rows.by_completion(teacher_BC, batch.depth_JW.shape)
    spent = depth_shares(batch, teacher.arch.layers)
    reward = rewards(
        batch.verifier_J,
        depth_cost(*spent, norm=config.depth_norm, length_ref=config.length_ref),
        log_ratio_JW,
        token_JW,
        depth_coef=penalties.depth_coef,
        kl_coef=config.kl_coef,
        length_coef=penalties.length_coef,
        length_ref=config.length_ref,
    )
    keep_J = ~batch.truncated_J if config.mask_truncated else None
    advantage_JW = advantages(reward, spent, keep_J, penalties.depth_coef, config)
    kept_JW = token_JW if keep_J is None else token_JW * keep_J[:, None]
    scored = Scored(
        rows,
        rows.by_row(batch.depth_JW),
        rows.by_row(batch.logprobs_JW + batch.depth_logprobs_JW),
        rows.by_row(advantage_JW),
        rows.by_row(loss_weights(kept_JW, config.norm, config.max_new_tokens)),
        rows.token_BC / jnp.maximum(jnp.sum(token_JW), 1.0),
        teacher_BC,
        teacher_hidden_BCD,
    )
    return scored, {
        "reward/mean": jnp.mean(reward.total_J),
        "reward/verifier": jnp.mean(batch.verifier_J),
        "reward/depth": jnp.mean(reward.depth_J),
        "reward/kl": jnp.mean(reward.kl_J),
        "reward/length": jnp.mean(reward.length_J),
        "advantage/std": jnp.std(advantage_JW[:, 0]),
        "groups/zero_std": zero_spread_groups(batch.verifier_J, config.rollouts),
        "kl/teacher": masked_mean(log_ratio_JW, token_JW),
        "completion/length": jnp.mean(batch.lengths_J.astype(jnp.float32)),
        "completion/truncated": jnp.mean(batch.truncated_J.astype(jnp.float32)),
    }


def teacher_scores(
    teacher: Transformer,
    rows: Completions,
    config: RLConfig,
    micro_batches: int,
) -> tuple[Float[Array, "B C"], Array | None]:
    """Returns log π_teacher of every token and the teacher's final hidden states [B, C, D].

    log π_teacher is at the sampling temperature. The states are None unless the loss contains a KL
    over the whole vocabulary.
    """
    wants_hidden = config.kl_loss_coef > 0 and config.kl_loss in EXACT_KL

    def one(index: Array) -> tuple[Array, Array | None]:
        part = micro_batch(rows, index, micro_batches)
        taught = run(teacher, part.tokens_BT, policy=Full(), **part.layout, adapters=False)
        hidden_BCD = part.window(taught.hidden_BTD)
        logprob_BC, _ = token_logprobs(
            teacher.head_VD, hidden_BCD, part.completion_tokens_BC, temperature=config.temperature
        )
        return logprob_BC, hidden_BCD if wants_hidden else None

    if micro_batches == 1:
        return one(jnp.zeros((), jnp.int32))
    return joined(jax.lax.map(one, jnp.arange(micro_batches)))


def depth_shares(batch: RLBatch, layers: int) -> tuple[Array, Array, Array]:
    """Returns (depth/L, action mask, token mask), each [J, W], as arguments for `depth_cost`.

    L is the number of `layers`; the masks are 1 at tokens whose pass could leave early, and at all
    tokens.
    """
    masks = (mask_JW.astype(jnp.float32) for mask_JW in (batch.action_JW, batch.token_JW))
    return batch.depth_JW / layers, *masks


def advantages(
    reward: Reward,
    spent: tuple[Array, Array, Array],
    keep_J: Bool[Array, "J"] | None,
    depth_coef: Array | float,
    config: RLConfig,
) -> Float[Array, "J W"]:
    """Returns the advantage of every (token, depth) pair; 0 where `keep_J` is False.

    `spent` is the result of `depth_shares`. With `config.causal_depth`, a token is charged only for
    the depths at and after this token; without it, all pairs of a rollout have the same advantage.
    """
    if not config.causal_depth:
        advantage_J = group_advantages(reward.total_J, config.rollouts, config.advantage, keep_J)
        return jnp.broadcast_to(advantage_J[:, None], spent[0].shape)
    cost_JW = depth_coef * causal_depth_cost(
        *spent, config.rollouts, keep_J, norm=config.depth_norm, length_ref=config.length_ref
    )
    rest_J = reward.total_J - reward.depth_J
    return group_advantages(rest_J[:, None] - cost_JW, config.rollouts, config.advantage, keep_J)


def policy_loss(
    student: Transformer, item: Scored, config: RLConfig, teacher_head_VD: Array | None
) -> tuple[Array, Metrics]:
    """Returns what the micro-batch `item` adds to the loss and metrics of the whole batch.

    The loss is −Σ w·A·[log π(y | d) + log P(d)] over tokens y and depths d (REINFORCE), with
    weights w and advantages A; with several updates per batch, PPO's clipped objective replaces
    this sum. The loss adds a KL to the teacher and subtracts a bonus on the entropy of depths, with
    the coefficients in `config`. `teacher_head_VD` is None if teacher and student have the same
    output head.
    """
    rows, depth_BC = item.rows, item.depth_BC
    exit_layers, layers = student.exit_layers, student.arch.layers
    hazards = {"temperature": config.hazard_temperature, "min_hazard": config.min_hazard}
    result = run(
        student,
        rows.tokens_BT,
        policy=Prescribed(rows.input_depths(depth_BC, layers)),
        **rows.layout,
        hazards=True,
    )
    hidden_BCD = rows.window(result.hidden_BTD)
    logprob_BC, entropy_BC = token_logprobs(
        student.head_VD, hidden_BCD, rows.completion_tokens_BC, temperature=config.temperature
    )
    z_BCE = rows.window(result.hazard_logits_BTE)
    depth_logprob_BC = jnp.where(
        rows.action_BC, depth_log_prob(depth_BC, z_BCE, exit_layers, layers, **hazards), 0.0
    )
    pair_BC = logprob_BC + depth_logprob_BC
    terms_BC = policy_loss_terms(
        pair_BC,
        item.behaviour_BC,
        item.advantage_BC,
        clip=config.clip if config.updates_per_batch > 1 else None,
        importance_cap=config.importance_cap,
    )
    loss = masked_sum(terms_BC, item.weight_BC)
    metrics = {"loss/policy": loss}
    if config.kl_loss_coef > 0:
        kl_BC = kl_terms(student.head_VD, hidden_BCD, logprob_BC, item, config, teacher_head_VD)
        metrics["loss/kl"] = masked_sum(kl_BC, item.weight_BC)
        loss += config.kl_loss_coef * metrics["loss/kl"]
    exit_index_BC = exit_index_of_depth(depth_BC, exit_layers, layers)
    depth_entropy_BC = jnp.where(
        rows.action_BC,
        reached_decision_entropy(*log_hazards(z_BCE, **hazards), exit_index_BC),
        0.0,
    )
    if config.depth_entropy_coef > 0:
        bonus_BC = depth_entropy_bonus(depth_entropy_BC, depth_logprob_BC)
        loss -= config.depth_entropy_coef * masked_sum(bonus_BC, item.weight_BC)
    gap_BC = jnp.abs(pair_BC - item.behaviour_BC)
    return loss, metrics | {
        "loss": loss,
        "entropy/tokens": masked_sum(entropy_BC, item.mean_BC),
        "entropy/depth": masked_sum(depth_entropy_BC, item.mean_BC),
        "sampler_gap": masked_sum(gap_BC, item.mean_BC),
    }


def kl_terms(
    head_VD: Array,
    hidden_BCD: Array,
    logprob_BC: Float[Array, "B C"],
    item: Scored,
    config: RLConfig,
    teacher_head_VD: Array | None,
) -> Float[Array, "B C"]:
    """Returns the KL between student and teacher at each token, in nats, [B, C].

    `config.kl_loss` is "exact" for KL(student ‖ teacher) and "forward" for KL(teacher ‖ student),
    both over the whole vocabulary, or "k2" or "k3" for these estimates from the drawn token.
    """
    if config.kl_loss not in EXACT_KL:
        return {"k2": k2, "k3": k3}[config.kl_loss](logprob_BC, item.teacher_BC)
    return linear_kl(
        flat(hidden_BCD),
        flat(item.teacher_hidden_BCD),
        head_VD,
        direction=EXACT_KL[config.kl_loss],
        head_teacher_VD=teacher_head_VD,
        temperature=config.temperature,
    ).reshape(logprob_BC.shape)


def depth_metrics(batch: RLBatch, exit_layers: tuple[int, ...], layers: int) -> Metrics:
    """Returns metrics of depth: mean, quantiles, layers per problem, and use of each depth.

    `exit/LAYER` is the fraction of tokens with this depth among those that could leave early; the
    other metrics also count the first token of each rollout.
    """
    token_JW, depth_JW = batch.token_JW, batch.depth_JW
    known_JW = jnp.where(token_JW, depth_JW.astype(jnp.float32), jnp.nan)
    metrics = {
        "depth/mean": masked_mean(depth_JW, token_JW),
        "depth/fraction": masked_mean(depth_JW / layers, token_JW),
        "layers/problem": jnp.mean(jnp.sum(depth_JW * token_JW, axis=1).astype(jnp.float32)),
        "depth/p10": jnp.nanquantile(known_JW, 0.1),
        "depth/p90": jnp.nanquantile(known_JW, 0.9),
    }
    for layer in (*exit_layers, layers):
        at_layer = (depth_JW == layer).astype(jnp.float32)
        metrics[f"exit/{layer}"] = masked_mean(at_layer, batch.action_JW)
    return metrics

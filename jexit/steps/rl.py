"""One update of RLOO over pairs of token and depth, with a depth penalty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jexit.axes import Array, Bool, Float, Int, PRNGKey
from jexit.config import RLConfig
from jexit.kernels import linear_kl, linear_logprob
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
from jexit.steps.completions import Completions, PackedCompletions
from jexit.steps.optim import (
    Metrics,
    accumulated_gradients,
    apply_gradients,
    joined,
    micro_batch,
)
from jexit.steps.state import Fixed, Params, SplitModel, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RLBatch:
    """Rollouts J, those of one prompt adjacent, with what was recorded, in rows to train on.

    `logprobs_JW` is of the tempered distribution that the token was drawn from, `depth_logprobs_JW`
    of the depth under the policy's law (0 at position 0, which nobody chose).
    """

    rows: Completions | PackedCompletions
    lengths_J: Int[Array, "J"]
    depth_JW: Int[Array, "J W"]
    logprobs_JW: Float[Array, "J W"]
    depth_logprobs_JW: Float[Array, "J W"]
    verifier_J: Float[Array, "J"]
    truncated_J: Bool[Array, "J"]

    @property
    def token_JW(self) -> Bool[Array, "J W"]:
        """Positions that hold a generated token."""
        return jnp.arange(self.depth_JW.shape[1]) < self.lengths_J[:, None]

    @property
    def action_JW(self) -> Bool[Array, "J W"]:
        """Positions whose token came from a pass that could leave: all but the first."""
        return self.token_JW & (jnp.arange(self.depth_JW.shape[1]) > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prices:
    """λ and μ of this step; arrays, so that a schedule does not recompile."""

    depth_coef: Float[Array, ""] | float
    length_coef: Float[Array, ""] | float


RLStep = Callable[[TrainState, Fixed, RLBatch, Prices, PRNGKey], tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scored:
    """Rows with all that is constant during a batch's updates."""

    rows: Completions | PackedCompletions
    depth_BC: Int[Array, "B C"]
    behaviour_BC: Float[Array, "B C"]  # log-probability of token and depth when they were drawn
    advantage_BC: Float[Array, "B C"]
    weight_BC: Float[Array, "B C"]  # loss weights: masked, normalised
    mean_BC: Float[Array, "B C"]  # weights of a mean over generated tokens
    teacher_BC: Float[Array, "B C"]  # log π_teacher of the tokens
    teacher_hidden_BCD: Array | None


def make_rl_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    config: RLConfig,
    *,
    micro_batches: int = 1,
) -> RLStep:
    """The jitted update (state, fixed, batch, prices, key) → (state, metrics).

    Scores the rollouts with the teacher, forms rewards and advantages, and takes
    `updates_per_batch` optimiser steps on
    −Σ w·A·[log π(y | d) + log P(d)] (REINFORCE), or PPO's clipped ratio when there are several.
    """
    model = split.student(split.trainable)
    layers, exit_layers = model.arch.layers, model.exit_layers
    law = {"temperature": config.hazard_temperature, "min_hazard": config.min_hazard}
    charged = {"norm": config.depth_norm, "length_ref": config.length_ref}
    directions = {"exact": "student_teacher", "forward": "teacher_student"}
    exact_kl = config.kl_loss_coef > 0 and config.kl_loss in directions

    def flat(values: Array) -> Array:
        return values.reshape(-1, *values.shape[2:])

    def tempered(rows: Completions | PackedCompletions, hidden_BTD: Array) -> Array:
        """Hidden states of the completion positions over the sampling temperature: [B, C, D].

        The sampler divides float32 logits; rounding the quotient to bfloat16 here would open a gap.
        """
        hidden_BCD = rows.window(hidden_BTD)
        if config.temperature == 1.0:
            return hidden_BCD
        return hidden_BCD.astype(jnp.float32) / config.temperature

    def token_logprobs(head_VD: Array, hidden_BCD: Array, tokens_BC: Array):
        result = linear_logprob(flat(hidden_BCD), head_VD, flat(tokens_BC))
        return (
            result.logprob_N.reshape(tokens_BC.shape),
            result.entropy_N.reshape(tokens_BC.shape),
        )

    def teach(teacher: Transformer, batch: RLBatch) -> tuple[Array, Array | None]:
        """log π_teacher of every token, and the teacher's hidden states for the exact KL."""

        def one(index: Array) -> tuple[Array, Array | None]:
            rows = micro_batch(batch.rows, index, micro_batches)
            taught = run(teacher, rows.tokens_BT, policy=Full(), **rows.layout, adapters=False)
            hidden_BCD = tempered(rows, taught.hidden_BTD)
            logprob_BC, _ = token_logprobs(teacher.head_VD, hidden_BCD, rows.completion_tokens_BC)
            return logprob_BC, hidden_BCD if exact_kl else None

        if micro_batches == 1:
            return one(jnp.zeros((), jnp.int32))
        stacked = jax.lax.map(one, jnp.arange(micro_batches))
        return joined(stacked)

    def spent(batch: RLBatch) -> tuple[Array, Array, Array]:
        """Depth/L of every token, which passes could leave, and which positions hold a token."""
        masks = (mask_JW.astype(jnp.float32) for mask_JW in (batch.action_JW, batch.token_JW))
        return batch.depth_JW / layers, *masks

    def advantages(batch: RLBatch, reward: Reward, prices: Prices) -> Array:
        """Advantage of every action pair [J, W]."""
        keep_J = ~batch.truncated_J if config.mask_truncated else None
        if not config.causal_depth:
            advantage_J = group_advantages(
                reward.total_B, config.rollouts, config.advantage, keep_J
            )
            return jnp.broadcast_to(advantage_J[:, None], batch.depth_JW.shape)
        cost_JW = prices.depth_coef * causal_depth_cost(
            *spent(batch), config.rollouts, keep_J, **charged
        )
        rest_J = reward.total_B - reward.depth_B
        return group_advantages(
            rest_J[:, None] - cost_JW, config.rollouts, config.advantage, keep_J
        )

    def score(teacher: Transformer, batch: RLBatch, prices: Prices) -> tuple[_Scored, Metrics]:
        rows = batch.rows
        token_JW = batch.token_JW.astype(jnp.float32)
        teacher_BC, teacher_hidden_BCD = teach(teacher, batch)
        log_ratio_JW = batch.logprobs_JW - rows.by_completion(teacher_BC, batch.depth_JW.shape)
        reward = rewards(
            batch.verifier_J,
            depth_cost(*spent(batch), **charged),
            log_ratio_JW,
            token_JW,
            depth_coef=prices.depth_coef,
            kl_coef=config.kl_coef,
            length_coef=prices.length_coef,
            length_ref=config.length_ref,
        )
        advantage_JW = advantages(batch, reward, prices)
        kept_JW = token_JW
        if config.mask_truncated:
            kept_JW = token_JW * ~batch.truncated_J[:, None]
        scored = _Scored(
            rows,
            rows.by_row(batch.depth_JW),
            rows.by_row(batch.logprobs_JW + batch.depth_logprobs_JW),
            rows.by_row(advantage_JW),
            rows.by_row(loss_weights(kept_JW, config.norm, config.max_new_tokens)),
            rows.token_BC / jnp.maximum(jnp.sum(token_JW), 1.0),
            teacher_BC,
            teacher_hidden_BCD,
        )
        metrics = {
            "reward/mean": jnp.mean(reward.total_B),
            "reward/verifier": jnp.mean(batch.verifier_J),
            "reward/depth": jnp.mean(reward.depth_B),
            "reward/kl": jnp.mean(reward.kl_B),
            "reward/length": jnp.mean(reward.length_B),
            "advantage/std": jnp.std(advantage_JW[:, 0]),
            "groups/zero_std": zero_spread_groups(batch.verifier_J, config.rollouts),
            "kl/teacher": masked_mean(log_ratio_JW, token_JW),
            "completion/length": jnp.mean(batch.lengths_J.astype(jnp.float32)),
            "completion/truncated": jnp.mean(batch.truncated_J.astype(jnp.float32)),
        }
        return scored, metrics | depth_metrics(batch)

    def depth_metrics(batch: RLBatch) -> Metrics:
        """Depth of the passes that produced the tokens."""
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

    def make_loss(fixed: Fixed, teacher: Transformer) -> Callable:
        def loss_fn(params: Params, item: _Scored, key: PRNGKey) -> tuple[Array, Metrics]:
            rows, depth_BC = item.rows, item.depth_BC
            student = split.student(params, fixed)
            result = run(
                student,
                rows.tokens_BT,
                policy=Prescribed(rows.input_depths(depth_BC, layers)),
                **rows.layout,
                hazards=True,
            )
            hidden_BCD = tempered(rows, result.hidden_BTD)
            logprob_BC, entropy_BC = token_logprobs(
                student.head_VD, hidden_BCD, rows.completion_tokens_BC
            )
            z_BCE = rows.window(result.hazard_logits_BTE)
            depth_logprob_BC = jnp.where(
                rows.action_BC,
                depth_log_prob(depth_BC, z_BCE, exit_layers, layers, **law),
                0.0,
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
                if exact_kl:
                    kl_BC = linear_kl(
                        flat(hidden_BCD),
                        flat(item.teacher_hidden_BCD),
                        student.head_VD,
                        direction=directions[config.kl_loss],
                        head_teacher_VD=teacher.head_VD if split.teacher_has_own_head else None,
                    ).reshape(logprob_BC.shape)
                else:
                    estimate = {"k2": k2, "k3": k3}[config.kl_loss]
                    kl_BC = estimate(logprob_BC, item.teacher_BC)
                metrics["loss/kl"] = masked_sum(kl_BC, item.weight_BC)
                loss += config.kl_loss_coef * metrics["loss/kl"]
            exit_index_BC = exit_index_of_depth(depth_BC, exit_layers, layers)
            depth_entropy_BC = jnp.where(
                rows.action_BC,
                reached_decision_entropy(*log_hazards(z_BCE, **law), exit_index_BC),
                0.0,
            )
            if config.depth_entropy_coef > 0:
                bonus_BC = depth_entropy_bonus(depth_entropy_BC, depth_logprob_BC)
                bonus = masked_sum(bonus_BC, item.weight_BC)
                loss -= config.depth_entropy_coef * bonus
            gap_BC = jnp.abs(pair_BC - item.behaviour_BC)
            metrics |= {
                "loss": loss,
                "entropy/tokens": masked_sum(entropy_BC, item.mean_BC),
                "entropy/depth": masked_sum(depth_entropy_BC, item.mean_BC),
                "sampler_gap": masked_sum(gap_BC, item.mean_BC),
            }
            return loss, metrics

        return loss_fn

    def step(
        state: TrainState, fixed: Fixed, batch: RLBatch, prices: Prices, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        teacher = split.teacher(state.trainable, fixed)
        scored, metrics = score(teacher, batch, prices)
        first_update = None
        start = state.step
        for update in range(config.updates_per_batch):
            loss, loss_metrics, gradients = accumulated_gradients(
                make_loss(fixed, teacher),
                state.trainable,
                lambda index: micro_batch(scored, index, micro_batches),
                micro_batches,
                jax.random.fold_in(key, update),
            )
            state, update_metrics = apply_gradients(state, optimizer, gradients, loss)
            # The gap to the sampler means something only before the first update.
            first_update = first_update or loss_metrics
            metrics |= loss_metrics | update_metrics
        metrics["sampler_gap"] = first_update["sampler_gap"]
        metrics["tokens"] = jnp.sum(batch.lengths_J).astype(jnp.float32)
        return dataclasses.replace(state, step=start + 1), metrics

    return jax.jit(step, donate_argnums=0)

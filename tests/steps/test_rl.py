"""The policy gradient against exact enumeration; options of the update; sampler against trainer."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import toy

from jexit.config import RLConfig
from jexit.losses.rloo import Reward
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed, Sample
from jexit.model.transformer import logits_of, run
from jexit.rollout import rollout
from jexit.steps.completions import pack_completions, pad_completions
from jexit.steps.rl import (
    Penalties,
    RLBatch,
    advantages,
    depth_metrics,
    make_rl_step,
    policy_loss,
    score,
)

LAYERS, NEW, EOS = toy.LAYERS, 3, 0
PROMPT = [1]


def trajectories(vocab):
    """All (tokens, depths of the passes that produced them): EOS or the third token ends one."""
    done, open_ = [], [((token,), (LAYERS,)) for token in range(vocab)]
    while open_:
        tokens, depths = open_.pop()
        if tokens[-1] == EOS or len(tokens) == NEW:
            done.append((tokens, depths))
        else:
            open_ += [
                ((*tokens, token), (*depths, depth))
                for token in range(vocab)
                for depth in (*toy.EXITS, LAYERS)
            ]
    return done


def padded(paths, part, fill):
    return jnp.array([[*path[part], *[fill] * (NEW - len(path[part]))] for path in paths])


def log_probs(split, trainable, paths, config, *, teacher=False):
    """log π of every token [N, NEW] and log P of every depth, straight from the definition.

    Zero beyond the end; with `teacher` the tokens are the base model's, at full depth.
    """
    model = split.teacher(trainable) if teacher else split.student(trainable)
    tokens, depths = padded(paths, 0, EOS), padded(paths, 1, LAYERS)
    inputs = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=PROMPT[0])
    policy = Prescribed(jnp.pad(depths, ((0, 0), (0, 1)), constant_values=LAYERS))
    result = run(
        model, inputs, policy=Full() if teacher else policy, hazards=True, adapters=not teacher
    )
    logits = logits_of(result.hidden_BTD, model.head_VD) / config.temperature
    log_pi = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[..., None], -1)[..., 0]
    law = {"temperature": config.hazard_temperature, "min_hazard": config.min_hazard}
    depth = depth_log_prob(depths, result.hazard_logits_BTE[:, :-1], toy.EXITS, LAYERS, **law)
    index, lengths = jnp.arange(NEW), jnp.array([[len(path[0])] for path in paths])
    there = index < lengths
    return jnp.where(there, log_pi, 0.0), jnp.where(there & (index > 0), depth, 0.0)


def batch_of(paths, verifier, log_pi, depth_logprobs):
    """Every path once."""
    completions = pad_completions(
        [PROMPT] * len(paths), [list(tokens) for tokens, _ in paths], 0, (len(PROMPT) + NEW, NEW)
    )
    cut = [tokens[-1] != EOS for tokens, _ in paths]
    return jax.tree.map(
        jnp.asarray,
        RLBatch(
            completions,
            completions.token_BC.sum(1),
            padded(paths, 1, 0),
            log_pi,
            depth_logprobs,
            verifier,
            np.asarray(cut),
        ),
    )


@pytest.mark.parametrize(
    "options",
    [
        {
            "kl_coef": 40.0, "temperature": 0.7, "min_hazard": 0.1, "hazard_temperature": 1.5,
            "depth_entropy_coef": 0.3,
        },
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"causal_depth": True},
                {"advantage": "group_mean"},
                {"depth_norm": "total", "causal_depth": True},
                {"depth_norm": "total", "kl_coef": 40.0},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_expected_gradient_equals_that_of_the_enumerated_return(options):
    """All texts of up to three tokens, ended by EOS or cut off, at all depths.

    The reward's own KL term counts as a constant, as in any policy gradient, and the bonus on the
    entropy of depths is that of the texts that were drawn.
    """
    split = toy.make_split(vocab_size=2)
    config = RLConfig(
        rollouts=2, max_new_tokens=NEW, length_ref=4.0,
        **{"temperature": 1.0, "kl_coef": 0.0, **options},
    )  # fmt: skip
    paths = trajectories(2)
    assert {len(tokens) for tokens, _ in paths} == {1, 2, 3}
    verifier = np.random.default_rng(0).normal(size=len(paths)).astype(np.float32)
    known = jax.jit(
        lambda trainable: [
            log_probs(split, trainable, paths, config, teacher=teacher) for teacher in (False, True)
        ]
    )
    (log_pi, depth_logprobs), (taught, _) = known(split.trainable)
    if config.depth_norm == "total":
        cost = [sum(depths) / LAYERS / 4.0 for _, depths in paths]
    else:
        cost = [np.mean(depths[1:]) / LAYERS if depths[1:] else 1.0 for _, depths in paths]
    lengths = np.array([len(tokens) for tokens, _ in paths])
    kl = np.asarray(jnp.sum(log_pi - taught, 1)) / lengths
    assert config.kl_coef == 0.0 or np.ptp(config.kl_coef * kl) > 0.1
    returns = verifier - 0.7 * np.array(cost) - config.kl_coef * kl - 0.3 * lengths / 4.0

    def expected_return(trainable):
        tokens, depths = log_probs(split, trainable, paths, config)
        probability = jnp.exp(jnp.sum(tokens + depths, axis=1))
        fixed, fixed_depths = jax.lax.stop_gradient((probability, depths))
        # -P log P of every depth, given what comes before it: their sum is an entropy.
        surprise = -jnp.exp(depths - fixed_depths) * depths
        bonus = fixed * jnp.sum(surprise, axis=1)
        return jnp.sum(probability * returns + config.depth_entropy_coef * bonus)

    exact = jax.jit(jax.grad(expected_return))(split.trainable)
    probability = jnp.exp(jnp.sum(log_pi + depth_logprobs, axis=1))
    assert float(jnp.sum(probability)) == pytest.approx(1.0, abs=1e-5)

    every = batch_of(paths, verifier, log_pi, depth_logprobs)
    step = make_rl_step(split, toy.DESCENT, config)

    def gradient_of(pair):
        batch = jax.tree.map(lambda rows: rows[pair], every)
        owner_BC = jnp.broadcast_to(jnp.arange(2)[:, None], (2, NEW))
        batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, owner_BC=owner_BC))
        return toy.taken_off(step, split, batch, Penalties(0.7, 0.3), jax.random.key(0))

    pairs = jnp.array([*itertools.product(range(len(paths)), repeat=2)])
    gradients, metrics = jax.jit(lambda pairs: jax.lax.map(gradient_of, pairs))(pairs)
    assert float(metrics["sampler_gap"].max()) < 1e-5
    # Each of two rows is weighted by 1 / (2 rows · the token budget). The group mean as baseline
    # keeps half of that (it contains the row itself).
    factor = (0.5 if config.advantage == "group_mean" else 1.0) / NEW
    weight = jnp.prod(probability[pairs], axis=1) / factor
    found = jax.tree.map(lambda taken: -jnp.tensordot(weight, taken, 1), gradients)
    toy.assert_close(found, exact, rtol=2e-3, atol=1e-5)


PENALTIES = Penalties(0.5, 0.1)
BASE = RLConfig(rollouts=3, max_new_tokens=10, temperature=0.8, min_hazard=0.05)


@functools.cache
def rolled_batch():
    """Three rollouts for each of four prompts, as the toy model samples them."""
    split, config = toy.make_split(), BASE
    rollouts = rollout(
        split.decodable(split.trainable),
        toy.PROMPTS,
        policy=Sample(config.hazard_temperature, config.min_hazard),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_ids=[3],
        pad_id=0,
        key=0,
        samples_per_prompt=config.rollouts,
    )
    completions = pad_completions(
        [toy.PROMPTS[row // config.rollouts] for row in range(rollouts.rows)],
        [rollouts.completion(row) for row in range(rollouts.rows)],
        0,
    )
    return RLBatch(
        completions,
        completions.token_BC.sum(1),
        jnp.asarray(rollouts.depths_BT),
        jnp.asarray(rollouts.logprobs_BT),
        jnp.asarray(rollouts.depth_logprobs_BT),
        jnp.asarray(np.random.default_rng(0).normal(size=rollouts.rows), jnp.float32),
        jnp.asarray(rollouts.truncated_B),
    )


@functools.cache
def update(config, *, micro_batches=1):
    """A batch's gradient (or, of several updates, what they take off together) and metrics."""
    split = toy.make_split()
    step = make_rl_step(split, toy.DESCENT, config, micro_batches=micro_batches)
    return lambda batch: toy.taken_off(step, split, batch, PENALTIES, jax.random.key(0))


MASKED = dataclasses.replace(BASE, mask_truncated=True, kl_coef=0.0, depth_entropy_coef=0.1)


def test_masked_truncated_rows_teach_nothing():
    batch = rolled_batch()
    assert bool(batch.truncated_J.any()) and not bool(batch.truncated_J.all())
    other = dataclasses.replace(
        batch,
        verifier_J=jnp.where(batch.truncated_J, 1e3, batch.verifier_J),
        depth_JW=jnp.where(batch.truncated_J[:, None], LAYERS, batch.depth_JW),
    )
    wild, _ = update(MASKED)(other)
    toy.assert_close(wild, update(MASKED)(batch)[0], rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_skipped():
    batch = rolled_batch()
    kept = int(jnp.argmin(batch.truncated_J))
    broken = dataclasses.replace(batch, verifier_J=batch.verifier_J.at[kept].set(jnp.nan))
    taken, metrics = update(MASKED)(broken)
    assert float(metrics["skipped"]) == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(taken))


def repacked(batch, *, row_of, shape, prompt_of=None):
    """The same rollouts, several to a row."""
    rows = jax.tree.map(np.asarray, batch.rows)
    new_B = rows.token_BC.sum(1)
    lengths = list(zip(rows.valid_BT.sum(1) - new_B, new_B, strict=True))
    prompts = [rows.tokens_BT[j, :prompt].tolist() for j, (prompt, _) in enumerate(lengths)]
    completions = [
        rows.completion_tokens_BC[j, :new].tolist() for j, (_, new) in enumerate(lengths)
    ]
    made = pack_completions(
        prompts, completions, 0, row_of=row_of, shape=shape, prompt_of=prompt_of
    )
    return dataclasses.replace(batch, rows=jax.tree.map(jnp.asarray, made))


WITH_BONUS = dataclasses.replace(BASE, depth_entropy_coef=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts_are_shared", "options"),
    [
        pytest.param(False, {}, id="rows"),
        pytest.param(True, {"updates_per_batch": 2}, id="prompts, two updates"),
        pytest.param(
            True,
            {"kl_loss_coef": 0.2, "mask_truncated": True, "norm": "tokens"},
            id="prompts, exact KL",
        ),
        pytest.param(
            False,
            {"kl_loss_coef": 0.2, "kl_loss": "k3", "causal_depth": True, "norm": "sequence"},
            id="rows, k3",
        ),
    ],
)
def test_rollouts_that_share_rows_and_prompts_teach_the_same(prompts_are_shared, options):
    """In micro-batches too."""
    config, batch = dataclasses.replace(WITH_BONUS, **options), rolled_batch()
    apart, apart_metrics = update(config)(batch)
    row_of = [2, 0, 2, 0, 1, 2, 0, 1, 0, 2, 1, 1]  # row 3 is empty
    prompt_of = np.arange(12) // 3 if prompts_are_shared else None
    packed = repacked(batch, row_of=row_of, shape=(4, 80, 56), prompt_of=prompt_of)
    shared, shared_metrics = update(config, micro_batches=2)(packed)
    toy.assert_close(shared, apart, rtol=1e-4, atol=1e-6)
    assert apart_metrics.keys() == shared_metrics.keys()
    for name, value in apart_metrics.items():
        np.testing.assert_allclose(value, shared_metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)


def surrogate(batch, config, term):
    """The gradient of Σ w · term(log π(y, d), that in sampling, A), from whole log-soft-maxes."""
    split, rows = toy.make_split(), batch.rows
    teacher = split.teacher(split.trainable)
    depth_BC = rows.by_row(batch.depth_JW)
    law = {"temperature": config.hazard_temperature, "min_hazard": config.min_hazard}

    @jax.jit
    @jax.grad
    def gradient(trainable):
        scored, _ = score(teacher, batch, PENALTIES, config, 1)
        policy = Prescribed(rows.input_depths(depth_BC, LAYERS))
        logp_BCV, out = toy.whole(split.student(trainable), rows, policy)
        logp_BCV = jax.nn.log_softmax(logp_BCV / config.temperature)
        token_BC = jnp.take_along_axis(logp_BCV, rows.completion_tokens_BC[..., None], -1)[..., 0]
        z_BCE = rows.window(out.hazard_logits_BTE)
        depth_logp_BC = depth_log_prob(depth_BC, z_BCE, toy.EXITS, LAYERS, **law)
        pair_BC = token_BC + jnp.where(rows.action_BC, depth_logp_BC, 0.0)
        terms_BC = term(pair_BC, scored.behaviour_BC, scored.advantage_BC)
        return jnp.sum(jnp.where(rows.token_BC, scored.weight_BC * terms_BC, 0.0))

    return gradient


def test_several_updates_use_the_clipped_ratio():
    """The second of two updates, at the parameters that the first has left."""
    clip, batch = 0.02, rolled_batch()
    config = dataclasses.replace(BASE, updates_per_batch=2, clip=clip)
    (twice, metrics), (once, _) = (update(c)(batch) for c in (config, BASE))
    assert float(metrics["sampler_gap"]) < 1e-4  # that of the first
    second = jax.tree.map(jnp.subtract, twice, once)
    moved = jax.tree.map(jnp.subtract, toy.make_split().trainable, once)

    def clipped(pair, behaviour, advantage):
        ratio = jnp.exp(pair - behaviour)
        return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)

    def free(pair, behaviour, advantage):
        return -jnp.exp(pair - behaviour) * advantage

    toy.assert_close(second, surrogate(batch, config, clipped)(moved), rtol=1e-3, atol=1e-5)
    without = surrogate(batch, config, free)(moved)
    apart = optax.global_norm(jax.tree.map(jnp.subtract, second, without))
    assert float(apart) > 0.1 * float(optax.global_norm(without))


def test_the_importance_cap_weights_what_another_policy_drew():
    config, batch = dataclasses.replace(BASE, importance_cap=1.2), rolled_batch()
    shift_J = jnp.where(jnp.arange(len(batch.lengths_J)) % 2, 0.5, -0.3)  # ratios e^0.5 and e^-0.3
    batch = dataclasses.replace(batch, logprobs_JW=batch.logprobs_JW - shift_J[:, None])

    def weighted(pair, behaviour, advantage):
        ratio = jax.lax.stop_gradient(jnp.exp(pair - behaviour))
        return -jnp.minimum(ratio, 1.2) * advantage * pair

    wanted = surrogate(batch, config, weighted)(toy.make_split().trainable)
    toy.assert_close(update(config)(batch)[0], wanted, rtol=1e-3, atol=1e-6)


def test_advantages_by_hand():
    """Two rollouts of three and two tokens, verifier rewards 1 and 0, λ = 0.5, T_ref = 4."""
    share_JW = jnp.array([[1.0, 0.5, 0.5], [1.0, 0.25, 0.0]])
    token_JW = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    spent = (share_JW, token_JW.at[:, 0].set(0.0), token_JW)
    depth_J = -0.5 * jnp.array([2.0, 1.25]) / 4
    zero_J = jnp.zeros(2)
    reward = Reward(jnp.array([1.0, 0.0]) + depth_J, depth_J, zero_J, zero_J)

    def found(**settings):
        config = RLConfig(rollouts=2, depth_norm="total", length_ref=4.0, **settings)
        return advantages(reward, spent, None, 0.5, config)

    whole = (1 - 0.25) + 0.15625
    np.testing.assert_allclose(found(), [[whole] * 3, [-whole] * 3], rtol=1e-6)
    mean = found(advantage="group_mean")
    np.testing.assert_allclose(mean, [[whole / 2] * 3, [-whole / 2] * 3], rtol=1e-6)
    # Still to come: 2, 1 and 0.5 layers of L in the first, 1.25, 0.25 and 0 in the second.
    to_come = np.array([[2, 1, 0.5], [1.25, 0.25, 0]]) * 0.5 / 4
    causal = (1 - to_come[0]) + to_come[1]
    np.testing.assert_allclose(found(causal_depth=True), [causal, -causal], rtol=1e-6)


def test_metrics_are_those_of_the_rollouts():
    split, batch = toy.make_split(), rolled_batch()
    verifier_J = np.float32([*[0.5] * 3, 1, 0, 0, *[0] * 3, 1, 1, 0])  # two groups of four agree
    batch = dataclasses.replace(batch, verifier_J=jnp.asarray(verifier_J))
    config = dataclasses.replace(BASE, kl_coef=0.0)
    teacher = split.teacher(split.trainable)
    _, metrics = jax.jit(lambda: score(teacher, batch, Penalties(0.0, 0.1), config, 1))()
    metrics |= depth_metrics(batch, toy.EXITS, LAYERS)
    lengths = np.asarray(batch.lengths_J)
    depths = [np.asarray(batch.depth_JW)[row, :n] for row, n in enumerate(lengths)]
    each, leaving = np.concatenate(depths), np.concatenate([row[1:] for row in depths])
    assert len({*leaving.tolist()}) == 3
    t_BCV, _ = toy.whole(teacher, batch.rows, Full(), adapters=False)
    t_BCV = jax.nn.log_softmax(t_BCV / BASE.temperature)
    t_JW = jnp.take_along_axis(t_BCV, batch.rows.completion_tokens_BC[..., None], -1)[..., 0]
    ratios = [
        np.asarray(batch.logprobs_JW)[row, :n] - np.asarray(t_JW)[row, :n]
        for row, n in enumerate(lengths)
    ]
    totals_PG = (verifier_J - 0.1 * lengths / config.length_ref).reshape(-1, 3)
    advantage_PG = 1.5 * (totals_PG - totals_PG.mean(1, keepdims=True))
    wanted = {
        "depth/mean": each.mean(),
        "depth/fraction": each.mean() / LAYERS,
        "depth/p10": np.quantile(each, 0.1),
        "depth/p90": np.quantile(each, 0.9),
        "layers/problem": each.sum() / len(lengths),
        **{f"exit/{layer}": (leaving == layer).mean() for layer in (*toy.EXITS, LAYERS)},
        "kl/teacher": np.concatenate(ratios).mean(),
        "groups/zero_std": 0.5,
        "advantage/std": advantage_PG.std(),
        "reward/verifier": verifier_J.mean(),
        "reward/length": -0.1 * lengths.mean() / config.length_ref,
        "reward/mean": totals_PG.mean(),
        "completion/length": lengths.mean(),
        "completion/truncated": np.asarray(batch.truncated_J).mean(),
    }
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("norm", ["constant", "sequence", "tokens"])
def test_tokens_are_weighted_by_the_norm(norm):
    split, batch = toy.make_split(), rolled_batch()
    config = dataclasses.replace(BASE, norm=norm)
    scored, _ = score(split.teacher(split.trainable), batch, PENALTIES, config, 1)
    token_BC, rows = np.asarray(batch.rows.token_BC), len(batch.lengths_J)
    weight = {
        "constant": 1 / (rows * BASE.max_new_tokens),
        "sequence": 1 / (rows * token_BC.sum(1, keepdims=True)),
        "tokens": 1 / token_BC.sum(),
    }[norm]
    np.testing.assert_allclose(scored.weight_BC, token_BC * weight, rtol=1e-6)


def test_exact_and_sampled_kl_loss_agree_with_materialised_ones():
    split, batch = toy.make_split(), rolled_batch()
    rows, trainable = batch.rows, split.trainable
    configs = {
        kl_loss: dataclasses.replace(BASE, kl_loss_coef=0.7, kl_loss=kl_loss)
        for kl_loss in ("exact", "forward", "k2", "k3")
    }

    @jax.jit
    def log_pi(trainable):
        """Of student and teacher, every token's [B, C, V]."""
        policy = Prescribed(rows.input_depths(rows.by_row(batch.depth_JW), LAYERS))
        s, _ = toy.whole(split.student(trainable), rows, policy)
        t, _ = toy.whole(split.teacher(trainable), rows, Full(), adapters=False)
        return [jax.nn.log_softmax(logp / BASE.temperature) for logp in (s, t)]

    @jax.jit
    def losses(trainable):
        student, teacher = split.student(trainable), split.teacher(trainable)
        scored = {
            name: score(teacher, batch, PENALTIES, config, 1)[0] for name, config in configs.items()
        }
        return {
            name: policy_loss(student, scored[name], config, None)
            for name, config in configs.items()
        }

    s, t = log_pi(trainable)
    token = rows.token_BC / (rows.token_BC.shape[0] * BASE.max_new_tokens)
    delta = jnp.take_along_axis(t - s, rows.completion_tokens_BC[..., None], -1)[..., 0]
    estimates = {
        "exact": jnp.sum(jnp.exp(s) * (s - t), -1),
        "forward": jnp.sum(jnp.exp(t) * (t - s), -1),
        "k2": delta**2 / 2,
        "k3": jnp.exp(delta) - delta - 1,
    }
    for name, (loss, metrics) in losses(trainable).items():
        truth = float(jnp.sum(token * estimates[name]))
        assert float(metrics["loss/kl"]) == pytest.approx(truth, rel=1e-4)
        assert float(loss) == pytest.approx(float(metrics["loss/policy"]) + 0.7 * truth, rel=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_keeps_the_teacher_apart():
    split = toy.make_split(full=True)
    step = make_rl_step(split, toy.DESCENT, dataclasses.replace(BASE, kl_loss_coef=0.1))
    state, _ = step(
        toy.start(split), split.fixed, rolled_batch(), Penalties(0.5, 0.0), jax.random.key(0)
    )
    teacher, student = split.teacher(state.trainable), split.student(state.trainable)
    np.testing.assert_array_equal(
        teacher.embed.embedding[...], split.fixed.teacher["embed"]["embedding"]
    )
    assert not np.array_equal(student.embed.embedding[...], teacher.embed.embedding[...])

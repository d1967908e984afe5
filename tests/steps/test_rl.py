"""The policy gradient against exact enumeration; options of the update; sampler against trainer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jexit.config import RLConfig
from jexit.model.exits import depth_log_prob
from jexit.model.policies import Full, Prescribed, Sample
from jexit.model.transformer import logits_of, run
from jexit.rollout import rollout
from jexit.steps.completions import pack_completions, pad_completions
from jexit.steps.rl import Penalties, RLBatch, make_rl_step
from jexit.steps.state import new_state

LAYERS, EXITS, NEW, EOS = 3, (1, 2), 3, 0
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
                for depth in (*EXITS, LAYERS)
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
    depth = depth_log_prob(depths, result.hazard_logits_BTE[:, :-1], EXITS, LAYERS, **law)
    index, lengths = jnp.arange(NEW), jnp.array([[len(path[0])] for path in paths])
    there = index < lengths
    return jnp.where(there, log_pi, 0.0), jnp.where(there & (index > 0), depth, 0.0)


def batch_of(paths, verifier, log_pi, depth_logprobs, rows):
    completions = pad_completions(
        [PROMPT] * len(rows), [list(paths[r][0]) for r in rows], 0, (len(PROMPT) + NEW, NEW)
    )
    index = jnp.asarray(rows)
    cut = [paths[r][0][-1] != EOS for r in rows]
    return RLBatch(
        completions,
        completions.token_BC.sum(1),
        padded(paths, 1, 0)[index],
        log_pi[index],
        depth_logprobs[index],
        jnp.asarray(verifier)[index],
        jnp.asarray(cut),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 40.0, "temperature": 0.7, "min_hazard": 0.1, "hazard_temperature": 1.5},
        {"depth_norm": "total", "causal_depth": True},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"advantage": "group_mean"},
                {"causal_depth": True},
                {"depth_norm": "total", "kl_coef": 40.0},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_expected_gradient_equals_that_of_the_enumerated_return(make_split, options):
    """All texts of up to three tokens, ended by EOS or cut off, at all depths.

    The reward's own KL term counts as a constant, as in any policy gradient.
    """
    vocab = 2
    split = make_split(vocab_size=vocab)
    config = RLConfig(
        rollouts=2, max_new_tokens=NEW, length_ref=4.0,
        **{"temperature": 1.0, "kl_coef": 0.0, **options},
    )  # fmt: skip
    penalties = Penalties(0.7, 0.3)
    paths = trajectories(vocab)
    assert {len(tokens) for tokens, _ in paths} == {1, 2, 3}
    verifier = np.random.default_rng(0).normal(size=len(paths)).astype(np.float32)
    log_pi, depth_logprobs = log_probs(split, split.trainable, paths, config)
    taught, _ = log_probs(split, split.trainable, paths, config, teacher=True)
    if config.depth_norm == "total":
        cost = [sum(depths) / LAYERS / 4.0 for _, depths in paths]
    else:
        cost = [np.mean(depths[1:]) / LAYERS if depths[1:] else 1.0 for _, depths in paths]
    lengths = np.array([len(tokens) for tokens, _ in paths])
    kl = np.asarray(jnp.sum(log_pi - taught, 1)) / lengths
    assert config.kl_coef == 0.0 or np.ptp(config.kl_coef * kl) > 0.1
    returns = verifier - 0.7 * np.array(cost) - config.kl_coef * kl - 0.3 * lengths / 4.0

    def log_p_of(trainable):
        tokens, depths = log_probs(split, trainable, paths, config)
        return jnp.sum(tokens + depths, axis=1)

    def expected_return(trainable):
        return jnp.sum(jnp.exp(log_p_of(trainable)) * returns)

    exact = jax.jit(jax.grad(expected_return))(split.trainable)
    log_p = log_p_of(split.trainable)
    assert float(jnp.sum(jnp.exp(log_p))) == pytest.approx(1.0, abs=1e-5)

    optimizer = optax.sgd(1.0)
    step = make_rl_step(split, optimizer, config)
    total = jax.tree.map(jnp.zeros_like, split.trainable)
    for a, b in itertools.product(range(len(paths)), repeat=2):
        state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
        batch = batch_of(paths, verifier, log_pi, depth_logprobs, [a, b])
        state, metrics = step(state, split.fixed, batch, penalties, jax.random.key(0))
        weight = jnp.exp(log_p[a] + log_p[b])
        total = jax.tree.map(
            lambda t, new, old, w=weight: t + w * (new - old), total, state.trainable,
            split.trainable,
        )  # fmt: skip
        assert float(metrics["sampler_gap"]) < 1e-5
    # Each of two rows is weighted by 1 / (2 rows · the token budget). The group mean as baseline
    # keeps half of that (it contains the row itself).
    factor = (0.5 if config.advantage == "group_mean" else 1.0) / NEW
    for ours, truth in zip(jax.tree.leaves(total), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, factor * truth, rtol=2e-3, atol=2e-6)


def rolled_batch(split, config, *, prompts=4, seed=0):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 11, size=rng.integers(1, 6)).tolist() for _ in range(prompts)]
    rollouts = rollout(
        split.decodable(split.trainable),
        texts,
        policy=Sample(config.hazard_temperature, config.min_hazard),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_ids=[3],
        pad_id=0,
        key=seed,
        samples_per_prompt=config.rollouts,
    )
    completions = pad_completions(
        [texts[row // config.rollouts] for row in range(rollouts.rows)],
        [rollouts.completion(row) for row in range(rollouts.rows)],
        0,
    )
    width = completions.completion_tokens_BC.shape[1]

    def fit(values):
        values = values[:, :width]
        return jnp.asarray(np.pad(values, ((0, 0), (0, width - values.shape[1]))))

    return RLBatch(
        completions,
        completions.token_BC.sum(1),
        fit(rollouts.depths_BT),
        fit(rollouts.logprobs_BT),
        fit(rollouts.depth_logprobs_BT),
        jnp.asarray(rng.normal(size=rollouts.rows), jnp.float32),
        jnp.asarray(rollouts.truncated_B),
    )


BASE = RLConfig(rollouts=3, max_new_tokens=10, temperature=0.8, min_hazard=0.05)


def one_update(split, config, batch, *, micro_batches=1, optimizer=None):
    optimizer = optimizer or optax.sgd(1.0)
    step = make_rl_step(split, optimizer, config, micro_batches=micro_batches)
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
    return step(state, split.fixed, batch, Penalties(0.5, 0.1), jax.random.key(0))


def test_the_sampler_and_the_trainer_agree(make_split):
    split = make_split()
    _, metrics = one_update(split, BASE, rolled_batch(split, BASE))
    assert 0 <= float(metrics["sampler_gap"]) < 1e-4
    assert float(metrics["depth/fraction"]) < 1.0  # something did leave


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "sequence", "kl_loss_coef": 0.2},
        {"norm": "tokens", "mask_truncated": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_micro_batches_change_nothing(make_split, options):
    split = make_split()
    config = dataclasses.replace(BASE, depth_entropy_coef=0.1, **options)
    batch = rolled_batch(split, config)
    whole, whole_metrics = one_update(split, config, batch)
    parts, parts_metrics = one_update(split, config, batch, micro_batches=4)
    for a, b in zip(
        jax.tree.leaves(whole.trainable), jax.tree.leaves(parts.trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(value, parts_metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_exact_and_sampled_kl_loss_agree_with_materialised_ones(make_split):
    split = make_split()
    batch = rolled_batch(split, BASE)
    rows = batch.rows
    student, teacher = split.student(split.trainable), split.teacher(split.trainable)
    depths = rows.input_depths(batch.depth_JW, LAYERS)
    hidden = run(student, rows.tokens_BT, policy=Prescribed(depths), **rows.layout).hidden_BTD
    taught = run(teacher, rows.tokens_BT, policy=Full(), **rows.layout, adapters=False).hidden_BTD

    def log_pi(hidden_BTD):
        logits = logits_of(rows.window(hidden_BTD), student.head_VD) / BASE.temperature
        return jax.nn.log_softmax(logits)

    s, t = log_pi(hidden), log_pi(taught)
    token = rows.token_BC / (rows.token_BC.shape[0] * BASE.max_new_tokens)
    config = dataclasses.replace(BASE, kl_loss_coef=1.0)
    picked = rows.completion_tokens_BC[..., None]
    delta = jnp.take_along_axis(t - s, picked, -1)[..., 0]
    estimates = {
        "exact": jnp.sum(jnp.exp(s) * (s - t), -1),
        "forward": jnp.sum(jnp.exp(t) * (t - s), -1),
        "k2": delta**2 / 2,
        "k3": jnp.exp(delta) - delta - 1,
    }
    for kl_loss, estimate in estimates.items():
        truth = float(jnp.sum(token * estimate))
        _, metrics = one_update(split, dataclasses.replace(config, kl_loss=kl_loss), batch)
        assert float(metrics["loss/kl"]) == pytest.approx(truth, rel=1e-4)


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_loss_coef": 0.2, "norm": "sequence"},
        {"kl_loss_coef": 0.2, "kl_loss": "k3", "mask_truncated": True, "norm": "tokens"},
        {"causal_depth": True, "updates_per_batch": 2},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("prompt_of", [None, np.arange(12) // 3], ids=["rows", "prompts"])
def test_rollouts_that_share_rows_and_prompts_teach_the_same(make_split, options, prompt_of):
    split = make_split()
    config = dataclasses.replace(BASE, depth_entropy_coef=0.1, **options)
    batch = rolled_batch(split, config)
    apart, apart_metrics = one_update(split, config, batch)
    row_of = [2, 0, 2, 0, 1, 2, 0, 1, 0, 2, 1, 1]  # row 3 is empty
    rows = repacked(batch, row_of=row_of, shape=(4, 80, 56), prompt_of=prompt_of)
    shared, shared_metrics = one_update(split, config, rows, micro_batches=2)
    for a, b in zip(
        jax.tree.leaves(apart.trainable), jax.tree.leaves(shared.trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert apart_metrics.keys() == shared_metrics.keys()
    for name, value in apart_metrics.items():
        np.testing.assert_allclose(value, shared_metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_masked_truncated_rows_teach_nothing(make_split):
    split = make_split()
    config = dataclasses.replace(BASE, mask_truncated=True, kl_coef=0.0)
    batch = rolled_batch(split, config)
    assert bool(batch.truncated_J.any()) and not bool(batch.truncated_J.all())
    wild = dataclasses.replace(
        batch, verifier_J=jnp.where(batch.truncated_J, 1e3, batch.verifier_J)
    )
    a, _ = one_update(split, config, batch)
    b, _ = one_update(split, config, wild)
    for x, y in zip(jax.tree.leaves(a.trainable), jax.tree.leaves(b.trainable), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_several_updates_use_the_clipped_ratio(make_split):
    split = make_split()
    config = dataclasses.replace(BASE, updates_per_batch=4, clip=0.1)
    batch = rolled_batch(split, config)
    state, metrics = one_update(split, config, batch, optimizer=optax.adam(1e-2))
    assert int(state.step) == 1 and float(metrics["sampler_gap"]) < 1e-4
    once, _ = one_update(split, BASE, batch, optimizer=optax.adam(1e-2))
    moved = [
        float(optax.global_norm(jax.tree.map(jnp.subtract, s.trainable, split.trainable)))
        for s in (state, once)
    ]
    assert moved[0] > 1.5 * moved[1]


def test_full_fine_tuning_keeps_the_teacher_apart(make_split):
    split = make_split(full=True)
    batch = rolled_batch(split, BASE)
    config = dataclasses.replace(BASE, kl_loss_coef=0.1)
    step = make_rl_step(split, optax.sgd(0.5), config)
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optax.sgd(0.5))
    args = (split.fixed, batch, Penalties(0.5, 0.0), jax.random.key(0))
    state, _ = step(state, *args)
    teacher = split.teacher(state.trainable)
    np.testing.assert_array_equal(
        teacher.embed.embedding[...], split.fixed.teacher["embed"]["embedding"]
    )
    assert not np.array_equal(
        split.student(state.trainable).embed.embedding[...], teacher.embed.embedding[...]
    )


def test_a_step_that_is_not_finite_is_skipped(make_split):
    split = make_split()
    batch = rolled_batch(split, BASE)
    broken = dataclasses.replace(batch, verifier_J=batch.verifier_J.at[0].set(jnp.nan))
    state, metrics = one_update(split, BASE, broken)
    assert int(state.skipped) == 1 and float(metrics["skipped"]) == 1
    for x, y in zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(split.trainable), strict=True
    ):
        np.testing.assert_array_equal(x, y)

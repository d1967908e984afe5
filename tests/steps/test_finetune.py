"""The fine-tuning step against cross-entropy written out, a completion at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import toy

from jexit.model.policies import Prescribed, Sample
from jexit.model.transformer import logits_of, run
from jexit.steps.completions import pack_completions
from jexit.steps.finetune import make_finetune_step

# A text a row; what comes after a text changes nothing in it.
TEXTS = [(*pair,) for pair in zip(toy.PROMPTS, toy.COMPLETIONS, strict=True)]
TOKENS_BT = np.zeros((len(TEXTS), 16), np.int32)
for row, (prompt, reference) in enumerate(TEXTS):
    TOKENS_BT[row, : len(prompt) + len(reference)] = [*prompt, *reference]
REFERENCE_BT = np.array([[len(p) <= t < len(p) + len(r) for t in range(16)] for p, r in TEXTS])
APART = {"row_of": [0, 1, 2, 3], "shape": (4, 16, 16)}


@functools.cache
def by_hand(full):
    """Mean of −log p over all tokens of the references, all run to one depth; its gradient."""
    split = toy.make_split(full=full)

    def loss(trainable, depth):
        model = split.student(trainable)
        depth_BT = jnp.where(REFERENCE_BT, depth, model.arch.layers)
        hidden_BTD = run(model, jnp.asarray(TOKENS_BT), policy=Prescribed(depth_BT)).hidden_BTD
        logp_BTV = jax.nn.log_softmax(logits_of(hidden_BTD, model.head_VD))
        row_N, place_N = np.nonzero(REFERENCE_BT)
        return -logp_BTV[row_N, place_N - 1, TOKENS_BT[row_N, place_N]].mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("full", "row_of", "shape", "micro_batches"),
    [
        pytest.param(
            False, [0, 1, 0, 1], (2, 24, 16), 2, id="lora, two to a row", marks=pytest.mark.slow
        ),
        pytest.param(True, *APART.values(), 1, id="full, a row each"),
    ],
)
def test_loss_and_gradient(full, row_of, shape, micro_batches):
    split = toy.make_split(full=full)
    loss, gradient = by_hand(full)(split.trainable, toy.LAYERS)
    step = make_finetune_step(split, toy.DESCENT, micro_batches=micro_batches)
    batch = pack_completions(toy.PROMPTS, toy.COMPLETIONS, 0, row_of=row_of, shape=shape)
    found, metrics = toy.taken_off(step, split, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    toy.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


def test_references_exit_under_the_policy_and_heads_learn_nothing():
    """Where the least hazard is 1 every draw leaves at the first exit."""
    split = toy.make_split(full=True)
    batch = pack_completions(toy.PROMPTS, toy.COMPLETIONS, 0, **APART)
    loss, gradient = by_hand(True)(split.trainable, toy.EXITS[0])
    step = make_finetune_step(split, toy.DESCENT, policy=Sample(1.0, 1.0))
    found, metrics = toy.taken_off(step, split, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    toy.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found["exits"]))
    step = make_finetune_step(split, toy.DESCENT, policy=Sample())
    losses = {
        float(toy.taken_off(step, split, batch, jax.random.key(seed))[1]["loss"])
        for seed in range(3)
    }
    assert len(losses) == 3

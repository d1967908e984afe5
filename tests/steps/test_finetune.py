"""The fine-tuning step against cross-entropy written out, a completion at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import toy

from jexit.model.policies import Fixed, Prescribed, Sample
from jexit.model.transformer import logits_of, run
from jexit.steps.completions import pack_completions
from jexit.steps.finetune import make_finetune_step


def by_hand(split, trainable, depth=None):
    """Mean of −log p over all tokens of the references, which all run to one depth."""
    model, total, count = split.student(trainable), 0.0, 0
    for prompt, reference in zip(toy.PROMPTS, toy.COMPLETIONS, strict=True):
        tokens = jnp.asarray([[*prompt, *reference]])
        depth_BT = np.full(tokens.shape, model.arch.layers)
        if depth is not None:
            depth_BT[:, len(prompt) :] = depth
        hidden_BTD = run(model, tokens, policy=Prescribed(depth_BT)).hidden_BTD
        logp = jax.nn.log_softmax(logits_of(hidden_BTD, model.head_VD))[0]
        for place, token in enumerate(reference):
            total -= logp[len(prompt) - 1 + place, token]
        count += len(reference)
    return total / count


@pytest.mark.parametrize(
    ("full", "row_of", "shape", "micro_batches"),
    [
        pytest.param(
            False, [0, 1, 0, 1], (2, 24, 16), 2, id="lora, two to a row", marks=pytest.mark.slow
        ),
        pytest.param(True, [0, 1, 2, 3], (4, 16, 16), 1, id="full, a row each"),
    ],
)
def test_loss_and_gradient(full, row_of, shape, micro_batches):
    split = toy.make_split(full=full)
    wanted = jax.jit(jax.value_and_grad(lambda params: by_hand(split, params)))
    loss, gradient = wanted(split.trainable)
    step = make_finetune_step(split, toy.DESCENT, micro_batches=micro_batches)
    batch = pack_completions(toy.PROMPTS, toy.COMPLETIONS, 0, row_of=row_of, shape=shape)
    found, metrics = toy.taken_off(step, split, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    toy.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


def test_references_exit_under_the_policy_and_heads_learn_nothing():
    split = toy.make_split(full=True)
    batch = pack_completions(
        toy.PROMPTS, toy.COMPLETIONS, 0, row_of=[0, 1, 2, 3], shape=(4, 16, 16)
    )
    model = split.student(split.trainable)
    shallow = model.exit_layers[0]
    wanted = jax.jit(jax.value_and_grad(lambda params: by_hand(split, params, shallow)))
    loss, gradient = wanted(split.trainable)
    step = make_finetune_step(split, toy.DESCENT, policy=Fixed(shallow))
    found, metrics = toy.taken_off(step, split, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    toy.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    # Every exit taken at once: the draws of `Sample` with the least hazard 1 are those depths.
    step = make_finetune_step(split, toy.DESCENT, policy=Sample(1.0, 1.0))
    drawn, metrics = toy.taken_off(step, split, batch, jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(drawn["exits"]))
    step = make_finetune_step(split, toy.DESCENT, policy=Sample())
    losses = {
        float(toy.taken_off(step, split, batch, jax.random.key(seed))[1]["loss"])
        for seed in range(3)
    }
    assert len(losses) == 3

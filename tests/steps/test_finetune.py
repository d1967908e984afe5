"""The fine-tuning step against cross-entropy written out, a completion at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jexit.model.transformer import logits_of, run
from jexit.steps.completions import pack_completions
from jexit.steps.finetune import make_finetune_step
from jexit.steps.state import new_state

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 11, size=n).tolist() for n in (3, 5, 1, 4)]
REFERENCES = [RNG.integers(0, 11, size=n).tolist() for n in (6, 2, 9, 4)]


def packed(row_of, shape):
    return pack_completions(PROMPTS, REFERENCES, 0, row_of=row_of, shape=shape)


def by_hand(split, trainable):
    """Mean of −log p over all tokens of the references."""
    model, total, count = split.student(trainable), 0.0, 0
    for prompt, reference in zip(PROMPTS, REFERENCES, strict=True):
        tokens = jnp.asarray([[*prompt, *reference]])
        logp = jax.nn.log_softmax(logits_of(run(model, tokens).hidden_BTD, model.head_VD))[0]
        for place, token in enumerate(reference):
            total -= logp[len(prompt) - 1 + place, token]
        count += len(reference)
    return total / count


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("row_of", "shape", "micro_batches"),
    [
        ([0, 1, 2, 3], (4, 16, 16), 1),
        ([0, 1, 0, 1], (2, 24, 16), 1),
        ([0, 1, 0, 1], (2, 24, 16), 2),
    ],
    ids=["a row each", "two to a row", "micro-batches"],
)
def test_loss_and_gradient(make_split, full, row_of, shape, micro_batches):
    split, optimizer = make_split(full=full), optax.sgd(1.0)
    loss, gradient = jax.value_and_grad(lambda params: by_hand(split, params))(split.trainable)
    step = make_finetune_step(split, optimizer, micro_batches=micro_batches)
    state = new_state(jax.tree.map(jnp.copy, split.trainable), optimizer)
    state, metrics = step(state, split.fixed, packed(row_of, shape), jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(
        lambda old, new, truth: np.testing.assert_allclose(
            old - new, truth, atol=1e-4 * (1 + np.abs(truth).max())
        ),
        split.trainable,
        state.trainable,
        gradient,
    )

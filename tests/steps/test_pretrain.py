"""The pretraining step on rows of several texts, against the same texts in rows of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from steps import toy

from jexit.steps.pretrain import PretrainBatch, make_pretrain_step

LENGTHS = (7, 5, 4, 8, 3, 6)  # in rows of 12: 7 + 5, 4 + 8, 3 + 6


def texts_of(seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        weight_T = rng.integers(0, 2, length).astype(np.float32)
        weight_T[0] = 0.0
        made.append((rng.integers(0, 11, length), weight_T, rng.integers(0, 3, length)))
    return made


def batch_of(texts, rows):
    """`rows` names the texts of each row."""
    batch = PretrainBatch(*(np.zeros((len(rows), 12), kind) for kind in ("i4", "f4", *["i4"] * 3)))
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            tokens_T, weight_T, group_T = texts[number]
            here = row, slice(start, start + len(tokens_T))
            batch.tokens_BT[here], batch.weight_BT[here] = tokens_T, weight_T
            batch.segment_BT[here], batch.position_BT[here] = segment, np.arange(len(tokens_T))
            batch.group_BT[here] = np.where(np.arange(len(tokens_T)) > 0, group_T, 0)
            start += len(tokens_T)
    return batch


def test_texts_that_share_a_row_do_not_see_each_other():
    """In three micro-batches, as one row a text at once."""
    split, texts = toy.make_split(full=True), texts_of()

    def update(rows, micro_batches):
        step = make_pretrain_step(
            split, toy.DESCENT, exit_loss=0.3, groups=("one", "two"), micro_batches=micro_batches
        )
        state, metrics = step(toy.start(split), batch_of(texts, rows), jax.random.key(0))
        return jax.tree.map(jnp.subtract, split.trainable, state.trainable), metrics

    shared, metrics = update([(0, 1), (2, 3), (4, 5)], 3)
    alone, known = update([(number,) for number in range(6)], 1)
    # The first token of a row is nobody's target; those of a row's other texts are counted.
    assert metrics.pop("tokens") == sum(LENGTHS) - 3
    assert known.pop("tokens") == sum(LENGTHS) - 6
    for name in known:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5, err_msg=name)
    toy.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(alone))

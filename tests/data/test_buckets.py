"""Length buckets against brute force, and their batches."""

import collections
import itertools

import numpy as np

from jexit.data.buckets import MULTIPLE, LengthBuckets


def lengths(size, seed=0):
    """Prompts and completions scattered as GSM8K's under Qwen's tokenizer and chat format."""
    random = np.random.default_rng(seed)
    shared, own = random.normal(size=(2, size))
    prompts = np.exp(4.69 + 0.185 * shared).astype(int) + 1
    return prompts, np.exp(4.41 + 0.437 * (0.53 * shared + 0.85 * own)).astype(int) + 1


def test_the_borders_are_the_best_there_are():
    prompts, completions = lengths(30)
    padded = -(-(prompts + completions) // MULTIPLE) * MULTIPLE
    candidates = np.unique(padded)

    def cost(borders):
        return sum(min(b for b in borders if b >= length) for length in padded)

    for count in (1, 2, 3, 4):
        best = min(
            cost((*chosen, candidates[-1]))
            for k in range(count)
            for chosen in itertools.combinations(candidates[:-1], k)
        )
        ours = [total for total, _ in LengthBuckets(prompts, completions, count).shapes]
        assert len(ours) <= count and ours == sorted(set(ours))
        assert cost(ours) == best
    assert LengthBuckets([5] * 10, [6] * 10).shapes == [(16, 8)]


def test_an_epoch_takes_every_row_once_but_for_a_remainder():
    buckets = LengthBuckets(*lengths(100))
    for batch_size in (1, 7, 16):
        left_out, per_epoch = [], 100 // batch_size
        for epoch in range(3):
            steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            rows = [buckets.batch(seed=3, step=s, batch_size=batch_size)[0] for s in steps]
            taken = collections.Counter(np.concatenate(rows).tolist())
            assert set(taken.values()) == {1} and len(taken) == per_epoch * batch_size
            left_out.append(set(range(100)) - set(taken))
        assert batch_size == 1 or left_out[0] != left_out[1]  # not always the same rows
    first, again, other = (buckets.batch(seed=s, step=3, batch_size=8)[0] for s in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
    rows, shape = LengthBuckets([3, 4, 5], [2, 2, 9]).batch(seed=0, step=5, batch_size=8)
    assert len(rows) == 8 and set(rows.tolist()) == {0, 1, 2}  # a small pool fills the batch
    assert shape == (16, 16)


def test_batches_fit_their_shape_and_hold_little_padding():
    prompts, completions = lengths(2000)
    buckets = LengthBuckets(prompts, completions)
    used = allocated = 0
    shapes = set()
    for step in range(2000 // 16):
        rows, (total, width) = buckets.batch(seed=0, step=step, batch_size=16)
        assert (prompts[rows] + completions[rows]).max() <= total
        assert completions[rows].max() <= width
        used += (prompts[rows] + completions[rows]).sum()
        allocated += len(rows) * total
        shapes.add((total, width))
    assert len(shapes) <= 6
    assert 1 - used / allocated < 0.15

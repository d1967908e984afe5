"""Groups rows of similar length into batches, which are padded to one of a few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUCKETS = 6
MULTIPLE = 8  # every padded length is a multiple of this


class LengthBuckets:
    """Divides a pool of rows into buckets by length, to save padding and limit the batch shapes.

    A row consists of a prompt and a completion, of the given lengths in tokens. There are at most
    `count` buckets, each of which pads its rows to one length. The padded lengths minimise the
    number of tokens in the whole pool, including padding. `shapes` contains (row length, completion
    length) for each bucket, from short to long: the padded length of a row, and the length of the
    longest completion in this and all shorter buckets. Both are multiples of 8.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], completion_lengths: Sequence[int], count: int = BUCKETS
    ):
        completions_N = np.asarray(completion_lengths)
        padded_N = _rounded(np.asarray(prompt_lengths) + completions_N)
        borders = _best_borders(padded_N, count)
        self._bucket_N = np.searchsorted(borders, padded_N)
        widths = [
            int(_rounded(completions_N[self._bucket_N <= index]).max())
            for index in range(len(borders))
        ]
        self.shapes = [(int(total), width) for total, width in zip(borders, widths, strict=True)]

    def batch(self, *, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns (row indices [B], entry of `shapes` to pad the rows to) for a step's batch.

        If the number of rows is a multiple of `batch_size`, an epoch uses every row once. Otherwise
        an epoch leaves out a few rows, drawn at random. If the pool has fewer rows than a batch,
        rows are repeated.
        """
        rows_N = np.arange(len(self._bucket_N))
        rows_N = np.tile(rows_N, -(-batch_size // len(rows_N)))
        batches = len(rows_N) // batch_size
        epoch, number = divmod(step, batches)
        random = np.random.default_rng((seed, epoch))
        rows_N = random.permutation(rows_N)[: batches * batch_size]
        rows_N = rows_N[np.argsort(self._bucket_N[rows_N], kind="stable")]
        rows_B = rows_N.reshape(batches, batch_size)[random.permutation(batches)[number]]
        return rows_B, self.shapes[self._bucket_N[rows_B].max()]


def _rounded(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // MULTIPLE) * MULTIPLE


def _best_borders(lengths_N: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` padded lengths, in increasing order, that minimise the total padding.

    `lengths_N` contains the lengths of the rows. A row is padded to the smallest returned length
    that holds it.
    """
    lengths_X, rows_X = np.unique(lengths_N, return_counts=True)
    below_X = np.concatenate([[0], np.cumsum(rows_X)])
    unique = len(lengths_X)
    # best[j]: the least cost of the j shortest lengths with the buckets so far.
    best = np.concatenate([[0.0], np.full(unique, np.inf)])
    choices = []
    for _ in range(min(count, unique)):
        # [i, j]: the last bucket contains the lengths i … j and pads them to length j.
        cost = best[:unique, None] + (below_X[1:] - below_X[:unique, None]) * lengths_X
        cost = np.where(np.arange(unique)[:, None] <= np.arange(unique), cost, np.inf)
        choices.append(np.argmin(cost, axis=0))
        best = np.concatenate([[0.0], np.min(cost, axis=0)])
    borders, end = [], unique
    for choice in reversed(choices):
        if end == 0:
            break
        borders.append(lengths_X[end - 1])
        end = choice[end - 1]
    return np.asarray(borders[::-1])

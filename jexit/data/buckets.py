"""Batches of rows of similar length, in a handful of shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUCKETS = 6
MULTIPLE = 8  # of every padded length


class LengthBuckets:
    """Splits a pool of rows by length, so that batches hold little padding and few shapes occur.

    The borders minimise the tokens of the whole pool, padding included, among all ways to use at
    most `count` padded lengths. `shapes` holds for each bucket (longest row, longest completion),
    both rounded up; they never fall from one bucket to the next.
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
        """Row indices [B] of one step and the shape that holds them; a function of (seed, step).

        An epoch takes every row once, but for the remainder of size / batch_size, which is drawn
        anew each time. A pool smaller than the batch is repeated.
        """
        rows_N = np.arange(len(self._bucket_N))
        rows_N = np.tile(rows_N, -(-batch_size // len(rows_N)))
        batches = len(rows_N) // batch_size
        epoch, place = divmod(step, batches)
        random = np.random.default_rng((seed, epoch))
        rows_N = random.permutation(rows_N)[: batches * batch_size]
        rows_N = rows_N[np.argsort(self._bucket_N[rows_N], kind="stable")]
        rows_B = rows_N.reshape(batches, batch_size)[random.permutation(batches)[place]]
        return rows_B, self.shapes[self._bucket_N[rows_B].max()]


def _rounded(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // MULTIPLE) * MULTIPLE


def _best_borders(lengths_N: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the lengths, rising, with the least Σ_rows (smallest border ≥ length)."""
    lengths_U, rows_U = np.unique(lengths_N, return_counts=True)
    below_U = np.concatenate([[0], np.cumsum(rows_U)])
    unique = len(lengths_U)
    # best[j]: the least cost of the j shortest lengths with the buckets used so far.
    best = np.concatenate([[0.0], np.full(unique, np.inf)])
    choices = []
    for _ in range(min(count, unique)):
        # [i, j]: the last bucket holds lengths i … j − 1 and pads them to length j − 1.
        cost = best[:unique, None] + (below_U[1:] - below_U[:unique, None]) * lengths_U
        cost = np.where(np.arange(unique)[:, None] <= np.arange(unique), cost, np.inf)
        choices.append(np.argmin(cost, axis=0))
        best = np.concatenate([[0.0], np.min(cost, axis=0)])
    borders, end = [], unique
    for choice in reversed(choices):
        if end == 0:
            break
        borders.append(lengths_U[end - 1])
        end = choice[end - 1]
    return np.asarray(borders[::-1])

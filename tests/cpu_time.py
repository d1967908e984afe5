"""Processor time, and how it grows with the text that is worked on."""

import time
import timeit
from collections.abc import Callable

TRIES = 5
SLACK = 3.0  # over linear growth: ten times the text takes quadratic work a hundred times as long
SHORTEST = 1e-3  # seconds that can be told from noise


def cpu_seconds(work: Callable[[str], object], text: str, enough: float) -> float:
    """The least that some tries take, or the first that took no more than `enough`.

    Without garbage collection, whose pauses grow with what the whole process holds.
    """
    timer = timeit.Timer(lambda: work(text), timer=time.process_time)
    least = float("inf")
    for _ in range(TRIES):
        least = min(least, timer.timeit(number=1))
        if least <= enough:
            break
    return least


def assert_linear(work: Callable[[str], object], short: str, long: str) -> None:
    """The time for two texts grows with their length, with slack."""
    before = max(cpu_seconds(work, short, SHORTEST), SHORTEST)
    limit = SLACK * len(long) / len(short) * before
    after = cpu_seconds(work, long, limit)
    assert after <= limit, (
        f"{len(short)} took {before:.4f} s, {len(long)} {after:.4f} s: {long[:40]!r}"
    )

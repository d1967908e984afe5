"""Processor time, and how it grows with the text that is worked on."""

import time
from collections.abc import Callable

TRIES = 5
SLACK = (
    3.0  # over linear growth: a text ten times as long takes a hundred times as long if quadratic
)
SHORTEST = 1e-3  # seconds that can be told from noise


def cpu_seconds(work: Callable[[str], object], text: str, enough: float) -> float:
    """The least that some tries take, or the first that took no more than `enough`."""
    least = float("inf")
    for _ in range(TRIES):
        began = time.process_time()
        work(text)
        least = min(least, time.process_time() - began)
        if not enough < least < 10 * enough:  # settled
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

"""Timing of two things at a time, on a machine that is not quiet.

An absolute time means little there. Two things are measured in one process in the order
A B B A, which cancels a drift of the machine to first order, and what counts is the
ratio of the medians. The same thing against itself shows how far to trust it.
"""

import statistics
import time
from collections.abc import Callable

Step = Callable[[], object]


def seconds(step: Step) -> float:
    """Return how long ``step`` took; it returns when its work is done."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def abba(a: Step, b: Step, rounds: int) -> tuple[float, float]:
    """Return the median times of ``a`` and ``b`` over ``2 * rounds`` runs of each."""
    times_a, times_b = [], []
    for step in (a, b):
        step()
    for _ in range(rounds):
        times_a.append(seconds(a))
        times_b.append(seconds(b))
        times_b.append(seconds(b))
        times_a.append(seconds(a))
    return statistics.median(times_a), statistics.median(times_b)

"""Timing of two things at a time, on a machine that is not quiet.

An absolute time means little there. Two things are measured in one process in the order
A B B A, which cancels a drift of the machine to first order, and what counts is the
ratio of the medians. The same thing against itself shows how far to trust it.

Before each run that is timed comes one that is not, so that a thing finds the caches,
the heap and the threads as its own loop leaves them, and not as the other does: after a
step of PyTorch's its second thread goes on turning for some milliseconds, on the core
that the next step needs.
"""

import statistics
import time
from collections.abc import Callable

Step = Callable[[], object]


def seconds(step: Step, before: int = 0) -> float:
    """Return how long ``step`` took; it returns when its work is done.

    It runs ``before`` times more, and untimed, before that.
    """
    for _ in range(before):
        step()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def abba(a: Step, b: Step, rounds: int) -> tuple[float, float]:
    """Return the median times of ``a`` and ``b`` over ``2 * rounds`` runs of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side in (0, 1, 1, 0):
            times[side].append(seconds((a, b)[side], before=1))
    return statistics.median(times[0]), statistics.median(times[1])

"""Central differences in float64, extrapolated to step 0, with an error bar."""

from collections.abc import Callable

import numpy as np


def along(values: Callable[[np.ndarray], np.ndarray], x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The derivative of `values` at x along v, element by element, and how far it may be off.

    Richardson extrapolation in Ridders' manner: of all entries of the table the one whose neighbours differ least, each
    with the rounding of its differences added.
    """
    steps = 2.0 ** -np.arange(3, 13)
    both = values(np.concatenate([x + sign * steps[:, None] * v for sign in (1, -1)]))
    above, below = both[: len(steps)], both[len(steps) :]
    with np.errstate(all="ignore"):
        row = (above - below) / (2 * steps[:, None])
        rounding = (2.0**-51 * np.maximum(np.abs(above), np.abs(below)) + 2.0**-50 * np.abs(row)) / steps[:, None]
        best, bar = row[-1], np.full(both.shape[1], np.inf)
        for order in range(1, 6):
            finer = row[1:] + (row[1:] - row[:-1]) / (4.0**order - 1)
            error = np.maximum(np.abs(finer - row[1:]), np.abs(finer - row[:-1])) + rounding[order:]
            error = np.where(np.isfinite(error), error, np.inf)
            at = np.argmin(error, axis=0), np.arange(both.shape[1])
            better = error[at] < bar
            best, bar = np.where(better, finer[at], best), np.where(better, error[at], bar)
            row = finer
    return best, bar

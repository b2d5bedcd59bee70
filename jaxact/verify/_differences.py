"""Central differences in float64, extrapolated to step 0, with an error bar."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Differences(NamedTuple):
    """Of each element of a function: its value, its derivative in a direction, and how far that may be off."""

    value: np.ndarray
    slope: np.ndarray
    bar: np.ndarray
    kink: np.ndarray  # whether the slope to the one side is another than that to the other


def along(values: Callable[[np.ndarray], np.ndarray], x: np.ndarray, v: np.ndarray) -> Differences:
    """The derivative of `values` at x along v; to one side where they are not finite on the other."""
    steps = 2.0 ** -np.arange(3, 13)
    found = values(np.concatenate([x[None], *(x + sign * steps[:, None] * v for sign in (1, -1))]))
    value, above, below = found[0], found[1 : 1 + len(steps)], found[1 + len(steps) :]
    with np.errstate(all="ignore"):
        slope, bar = _extrapolated(above, below, steps, power=2)
        for side, step in (above, steps), (below, -steps):
            one_sided, its_bar = _extrapolated(side, np.broadcast_to(value, side.shape), step / 2, power=1)
            edge = ~np.isfinite(bar)
            slope, bar = np.where(edge, one_sided, slope), np.where(edge, its_bar, bar)
    return Differences(value, slope, bar, _kink(value, above[-3:], below[-3:]))


def _extrapolated(above: np.ndarray, below: np.ndarray, steps: np.ndarray, power: int) -> tuple[np.ndarray, np.ndarray]:
    """The limit of (above − below)/(2·step), whose error is a series in step^power, and how far it may be off.

    Richardson extrapolation in Ridders' manner: of all entries of the table the one whose neighbours differ least, each
    with the rounding of its differences added.
    """
    row = (above - below) / (2 * steps[:, None])
    rounding = (2.0**-51 * np.maximum(np.abs(above), np.abs(below)) + 2.0**-50 * np.abs(row)) / np.abs(steps[:, None])
    best, bar = row[-1], np.full(row.shape[1], np.inf)
    for order in range(1, 6):
        finer = row[1:] + (row[1:] - row[:-1]) / (2.0 ** (power * order) - 1)
        error = np.maximum(np.abs(finer - row[1:]), np.abs(finer - row[:-1])) + rounding[order:]
        error = np.where(np.isfinite(error), error, np.inf)
        at = np.argmin(error, axis=0), np.arange(row.shape[1])
        better = error[at] < bar
        best, bar = np.where(better, finer[at], best), np.where(better, error[at], bar)
        row = finer
    return best, bar


def _kink(value: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Where steps to both sides, each half of the one before, change the value alike, and by half as much each time.

    The central difference is the mean of two slopes there, and autodiff may have the same. Where the function is smooth
    the change falls to a quarter, and it does not fall where the value alone is another, as that of a program at a tie
    may be. What is not far above rounding says nothing.
    """
    with np.errstate(all="ignore"):
        even = np.abs(above / 2 + below / 2 - value)
        size = np.max(np.abs([value, *above, *below]), axis=0)
        ratio = even[1:] / even[:-1]
        return ((ratio > 0.4) & (ratio < 0.7)).all(0) & (even[-1] > 2.0**-42 * size)

"""Whether a Jacobian agrees with differences of the function, in random directions."""

import numpy as np

from jaxact.verify._differences import Differences, along
from jaxact.verify._jacobian import FULL, Jacobian, Layout
from jaxact.verify._problem import Problem
from jaxact.verify._reference import Values


def agreement(
    problem: Problem, layout: Layout, jacobian: Jacobian, doubted: Jacobian, values: Values, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which outputs' derivatives agree with differences in random directions, how well those know a 0, and values."""
    credible, zero_error = np.ones(problem.m, bool), np.zeros(problem.m)
    x = problem.x[layout.columns]
    scale = np.where(x == 0, 2.0**-10, np.where(np.isfinite(x), np.abs(x), 0))
    inward = np.zeros(len(scale))

    def measured() -> tuple[np.ndarray, Differences]:
        v = np.zeros(problem.n)
        signs = np.where(inward == 0, rng.choice([-1.0, 1.0], len(scale)), inward)
        v[layout.columns] = scale * signs * rng.uniform(0.5, 1, len(scale))
        return v, along(values, problem.x, v)

    def agrees() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nonlocal inward
        v, (value, difference, bar, kink) = measured()
        if (np.isfinite(value) & ~np.isfinite(bar)).any() and not inward.any():
            inward = _inward(problem, layout, values, scale)
            v, (value, difference, bar, kink) = measured()
        with np.errstate(all="ignore"):
            u, slack = v[layout.columns], np.abs(jacobian.forward) * 2.0**-36 + 8 * doubted.forward
            expected = u * jacobian.forward if slack.ndim == 1 else u @ jacobian.forward
            allowed = 8 * bar + (np.abs(u) * slack if slack.ndim == 1 else np.abs(u) @ slack)
            # Where the function is not finite, differences say nothing.
            agreed = (np.abs(difference - expected) <= allowed) & ~kink | ~np.isfinite(value)
            per_input = bar / (scale if layout.elementwise else scale[scale > 0].min(initial=np.inf))
        return agreed, np.nan_to_num(per_input, nan=np.inf, posinf=np.inf), value

    for _ in range(2):
        agreed, error, value = agrees()
        credible, zero_error = credible & agreed, np.maximum(zero_error, error)
    # Of thousands the bar of one may be too low by chance. A kink, or what is wrong, is there in other directions too.
    if 0 < (~credible).sum() <= problem.m / 2**8:
        credible |= agrees()[0] & agrees()[0]
    return credible, zero_error, value


def _inward(problem: Problem, layout: Layout, values: Values, scale: np.ndarray) -> np.ndarray:
    """To which side of each input the function is finite, where it is not on both: 1, −1, or 0."""
    x, step = problem.x, np.zeros(problem.n)
    step[layout.columns] = 2.0**-12 * scale  # the least of `along`
    if layout.elementwise:
        up, down = np.isfinite(values(np.stack([x + step, x - step])))
    elif problem.n * len(scale) <= FULL:
        steps, there = np.diag(step)[layout.columns], np.isfinite(values(x[None]))
        up, down = ((np.isfinite(values(x + s)) | ~there).all(1) for s in (steps, -steps))
    else:
        return np.zeros(len(scale))
    return up.astype(float) - down.astype(float)

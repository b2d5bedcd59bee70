"""The special values of an elementwise function: a sweep of all magnitudes, and what the user expects where."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxact.verify._compare import close, compare
from jaxact.verify._contract import first_line
from jaxact.verify._diagnosis import apart
from jaxact.verify._oracle import find_oracle, is_elementwise
from jaxact.verify._problem import Problem
from jaxact.verify._report import REFUTED, VERIFIED, Check


def sweep(dtype: Any) -> np.ndarray:
    """±0, every magnitude, neighbours of 1 and of ½, the ends of the range, and where an exponential nears them."""
    info = ml_dtypes.finfo(dtype)
    near = [c * (1 + k * float(info.eps)) for c in (0.5, 1.0) for k in (-1, 0, 1)]
    powers = 2.0 ** np.linspace(info.minexp, info.maxexp - 1, 32)
    tail = np.linspace(32, -1.1 * np.log(float(info.smallest_normal)), 32)  # 8 and below: nothing new, in float16
    positive = np.concatenate(
        [np.arange(1, 65) / 2, near, powers, tail, [float(info.smallest_normal), float(info.max)]]
    )
    with np.errstate(over="ignore"):
        points = np.unique(np.concatenate([[0.0], positive]).astype(dtype))
    wide = points.astype(np.float64)
    points = points[np.isfinite(wide) & ((wide == 0) | (wide >= float(info.smallest_normal)))]
    return np.concatenate([-points[::-1], points])


def edge_points(session: Any, given: dict[float, float]) -> Check:
    """`f` at the sweep, where the function and the oracle are finite, and at `given`."""
    spec, dtype = session.problem.spec, session.problem.in_shapes[0][1]
    x = np.array([*given], np.float64).astype(dtype) if given else sweep(dtype)
    try:
        problem = Problem(session.problem.f, spec.arguments((x,), session.problem.others))
    except Exception as error:  # f may hold an array of the shape of its argument: labels, or a mask
        if given:
            raise
        return Check("edges", "absent", f"f takes no array of shape {x.shape}: {first_line(error)}")
    ones = np.ones((1, len(x)))
    if given:
        exact = np.array([*given.values()], np.float64)
        for mode in session.modes:
            got = problem.products(mode, "eager", ones)[0]
            allowed = session.bound * problem.unit * np.abs(exact)
            wrong = ~close(got, exact, allowed)
            if wrong.any():
                i = int(np.argmax(wrong))
                return Check(
                    "edges", REFUTED, f"at the edge x = {x[i]}, {mode} mode gives {got[i]:.6g} for {exact[i]:.6g}"
                )
        return Check("edges", VERIFIED, f"{len(x)} given inputs")
    # At one point, or at special ones, the Jacobian of any function may be diagonal.
    if problem.out_shapes[0][0] != x.shape or not is_elementwise(problem, session.rng):
        return Check("edges", "absent", "f is not elementwise in the sweep")
    finite = np.isfinite(problem.value())
    if not finite.any():
        return Check("edges", "absent", "f is finite nowhere in the sweep")
    x = x[finite]
    problem = Problem(session.problem.f, spec.arguments((x,), session.problem.others))
    ones = np.ones((1, len(x)))
    oracle = find_oracle(problem, session.reference, session.derivative, session.bound, session.rng, elementwise=True)
    other = session.other_value(problem, oracle)
    if other is not None:
        name, i, came, due = other
        return Check("edges", REFUTED, f"at x = {x[i]}, {name} is {came} where f is {due}")
    known = 0
    for mode in session.modes:
        vectors = ones * (oracle.credible if mode == "reverse" else 1.0)
        got = problem.products(mode, "eager", vectors)
        verdicts = compare(problem, oracle, mode, vectors, got, session.bound, session.given_bound is not None)
        if verdicts.wrong.any():
            i = int(np.argmax(verdicts.wrong[0]))
            came, due = apart(got[0, i], verdicts.product.want[0, i])
            return Check("edges", REFUTED, f"at x = {x[i]}, {mode} mode gives {came} where the derivative is {due}")
        known = int((~verdicts.unresolved[0] & oracle.credible).sum())
    return Check("edges", VERIFIED, f"{known} of a sweep of {len(x)} inputs from {x.min():.3g} to {x.max():.3g}")

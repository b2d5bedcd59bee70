"""The special values of an elementwise function: a sweep of all magnitudes, and what the user expects where."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxact.verify._compare import Comparison, close
from jaxact.verify._diagnosis import witness_at
from jaxact.verify._jacobian import Layout, autodiff
from jaxact.verify._oracle import find_oracle, is_elementwise
from jaxact.verify._other_values import other_value
from jaxact.verify._problem import Problem
from jaxact.verify._report import ABSENT, INCONCLUSIVE, REFUTED, VERIFIED, Check, apart, counted, first_line


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


def given_points(
    problem: Problem, given: dict[float, float], modes: tuple[str, ...], bound: float
) -> tuple[Check, str]:
    """`f` at the inputs, and with the derivatives, that the user gives; and lines that show what is wrong."""
    wide, dtype = np.array([*given], np.float64), problem.in_shapes[0][1]
    x = wide.astype(dtype)
    if (other := (x != wide) & ~np.isnan(wide)).any():
        raise ValueError(f"edges must be numbers of {dtype}, got {wide[other][0]}: the next to it is {x[other][0]}.")
    problem, exact = _at(x, problem), np.array([*given.values()], np.float64)
    if problem.out_shapes[0][0] != x.shape:
        return Check("edges", INCONCLUSIVE, f"f of an array of shape {x.shape} has another shape"), ""
    for mode in modes:
        got = problem.products(mode, "eager", np.ones((1, len(x))))[0]
        wrong = ~close(got, exact, bound * problem.unit * np.abs(exact) + 4 * problem.lost)
        if wrong.any():
            i = int(np.argmax(wrong))
            return _refuted(problem, mode, i, *apart(got[i], exact[i]), "edges= says")
    return Check("edges", VERIFIED, counted(len(x), "given input")), ""


def swept_points(
    comparison: Comparison, reference: Any, derivative: Any, modes: tuple[str, ...], rng: np.random.Generator
) -> tuple[Check, str]:
    """`f` at the sweep, where the function is finite; and lines that show what is wrong."""
    here, bound = comparison.problem, comparison.bound
    if here.loops:
        return Check("edges", ABSENT, "f has a loop, which need not end elsewhere"), ""
    x = sweep(here.in_shapes[0][1])
    order = rng.permutation(len(x))  # of sorted numbers even `sort` has a diagonal Jacobian
    try:
        problem = _at(x[order], here)
    except Exception as error:  # f may hold an array of the shape of its argument: labels, or a mask
        return Check("edges", ABSENT, f"f takes no array of shape {x.shape}: {first_line(error)}"), ""
    # At one point, or at special ones, the Jacobian of any function may be diagonal.
    if problem.out_shapes[0][0] != x.shape or not is_elementwise(problem, rng):
        return Check("edges", ABSENT, "f is not elementwise in the sweep"), ""
    finite, count = np.isfinite(problem.value()), len(x)
    if not finite.any():
        return Check("edges", ABSENT, "f is finite nowhere in the sweep"), ""
    x = x[np.sort(order[finite])]
    problem = _at(x, here)
    try:
        oracle = find_oracle(problem, reference, derivative, bound, rng, elementwise=True)
        comparison = Comparison(problem, oracle, bound, comparison.strict)
        other = other_value(comparison, modes, reference)
    except Exception as error:  # what is given may hold such an array as well
        return Check("edges", ABSENT, f"no oracle for an array of shape {x.shape}: {first_line(error)}"), ""
    if other is not None:
        name, i, came, due = other
        return Check("edges", REFUTED, f"at x = {x[i]}, {name} is {came} where f is {due}"), ""
    vectors, known = np.ones((1, len(x))), np.ones(len(x), bool)
    low, high = _beside(comparison, reference)
    for mode in modes:
        got = problem.products(mode, "eager", vectors)
        verdicts = comparison.products(mode, vectors, got)
        wrong, slope, value = verdicts.wrong[0], got[0], problem.value()
        explained = wrong & _explained(comparison, slope, rng) if wrong.any() else wrong
        if (wrong & ~explained).any():
            i = int(np.argmax(wrong & ~explained))
            return _refuted(problem, mode, i, *apart(slope[i], verdicts.product.want[0, i]), "the derivative is")
        # No slope is nan; and at a kink it lies between those beside it.
        if (strange := np.isnan(slope) & ~oracle.credible).any():
            i = int(np.argmax(strange))
            return _refuted(problem, mode, i, "nan", f"{value[i]:.5g}", "f is", "a number")
        slack = 2 * BLUR * np.maximum(np.abs(low), np.abs(high)) + verdicts.floor[0]
        if (strange := (slope < low - slack) | (slope > high + slack)).any():
            i = int(np.argmax(strange))
            beside = f"{low[i]:.5g} and {high[i]:.5g}"
            return _refuted(
                problem, mode, i, f"{slope[i]:.5g}", beside, "the slopes beside it are", f"between {beside}"
            )
        known &= ~verdicts.unresolved[0] & ~explained & oracle.credible
    among = "" if finite.all() else f", of which f is finite at {len(x)},"
    detail = f"{known.sum()} of a sweep of {count} inputs{among} from {x.min():.3g} to {x.max():.3g}"
    return Check("edges", VERIFIED, detail if known.all() else f"{detail}; not known at {_some(x[~known])}"), ""


def _refuted(
    problem: Problem, mode: str, i: int, came: str, due: str, what: str, should: str = ""
) -> tuple[Check, str]:
    detail = f"at x = {problem.x[i]:.9g}, {mode} mode gives {came} where {what} {due}"
    return Check("edges", REFUTED, detail), witness_at(problem, mode, problem.x[i], 1.0, came, should or due)


def _some(x: np.ndarray) -> str:
    """A few of them, as text."""
    return ", ".join(f"{a:.5g}" for a in x[:4]) + (f" and {len(x) - 4} more" if len(x) > 4 else "")


BLUR = 2.0**-7  # of slopes that are the same: above the rounding of bfloat16, and far below what a wrong one is off by


def _beside(comparison: Comparison, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """The lesser and the greater of the slopes beside each kink; nan where there is none, or they do not settle."""
    problem, oracle, *_ = comparison
    unknown = np.full(problem.n, np.nan)
    if oracle.kind not in ("f", "jax") or oracle.another or oracle.credible.all():
        return unknown, unknown
    slopes_at = autodiff(problem, reference if oracle.kind == "jax" else problem.f, Layout.diagonal(problem.n))
    step = np.where(problem.x == 0, 2.0**-100, np.abs(problem.x) * 2.0**-20)
    with np.errstate(all="ignore"):
        try:
            left, near_left, near_right, right = (slopes_at(problem.x + s * step).reverse for s in (-1, -0.5, 0.5, 1))
        except Exception:  # as in `_explained`
            return unknown, unknown
        settled = (np.abs(left - near_left) <= BLUR * np.abs(left)) & (
            np.abs(right - near_right) <= BLUR * np.abs(right)
        )
        kink = settled & ~oracle.credible
        return np.where(kink, np.minimum(left, right), np.nan), np.where(kink, np.maximum(left, right), np.nan)


def _explained(comparison: Comparison, got: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which slopes lie among those at inputs off by up to `bound` units.

    Of a function that oscillates from one number to the next, as sin(2x + 1) at 10³⁰, where the sum rounds, two or
    three such inputs need not show how far its slope may be off.
    """
    problem, _, bound, strict = comparison
    if strict:
        return np.zeros(problem.n, bool)
    slopes_at = autodiff(problem, problem.f, Layout.diagonal(problem.n))
    shifts = bound * problem.unit * rng.uniform(-1, 1, (64, problem.n))
    with np.errstate(all="ignore"):
        try:
            slopes = np.stack([slopes_at(x).reverse for x in problem.x * (1 + shifts)])
        except Exception:  # what f computes need not have a derivative where its rule is given
            return np.zeros(problem.n, bool)
        low, high = slopes.min(0), slopes.max(0)
        # The extremes of an oscillation need not be among them. But 0 is no slope of what only grows.
        margin = np.where((low < 0) & (high > 0), (high - low) / 16, 0)
        return (low < high) & (low - margin <= got) & (got <= high + margin)


def _at(x: np.ndarray, problem: Problem) -> Problem:
    return Problem(problem.f, problem.spec.arguments((x,), problem.others))

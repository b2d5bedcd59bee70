"""The reference that a user gives, and programs in JAX: what kind it is, and its values at any points in float64."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from jaxact.verify._jacobian import call, exact_value
from jaxact.verify._primal import without_rules
from jaxact.verify._problem import Problem, ravel, ravel_one, unravel

Values = Callable[[np.ndarray], np.ndarray]  # of the rows of a matrix of points


def kind_of(problem: Problem, reference: Any) -> Literal["mpmath", "jax", "numpy"]:
    """Found by calling it: JAX can trace it, NumPy returns numbers, and what remains is for mpmath."""
    wide = problem.leaves(problem.x, np.float64)
    with jax.enable_x64(True), np.errstate(all="ignore"):
        kind: Literal["jax", "numpy"] = "jax"
        out, args = None, problem.spec.arguments(wide, problem.others)
        with contextlib.suppress(Exception):
            out = jax.eval_shape(problem.spec.of_floats(reference, problem.others), *wide)
        if out is None:
            kind = "numpy"
            try:
                out = [np.asarray(y) for y in jax.tree.leaves(reference(*args))]
            except (TypeError, ValueError, AttributeError):
                if len(jax.tree.leaves(args)) != 1:
                    raise
                call(reference, args)  # raises what is raised here, if mpmath does not help
    if out is None or any(y.dtype == object for y in out):
        return "mpmath"
    got, due = [y.shape for y in out], [shape for shape, _ in problem.out_shapes]
    if got != due:
        raise ValueError(f"reference must return arrays of the shapes that f does, {due}, got {got}.")
    return kind


def _batch(f: Any, spec: Any, parts: Any, others: Any) -> Any:
    flat = without_rules(spec.of_floats(f, others))
    return jax.lax.map(lambda floats: flat(*floats), parts)


def jax_values(problem: Problem, f: Any) -> Values:
    def at(points: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            parts = tuple(unravel(points, problem.in_shapes, np.float64))
            return ravel(problem.compiled(_batch, f, problem.spec)(parts, problem.others))

    return at


def numpy_values(problem: Problem, reference: Any) -> Values:
    def one(x: np.ndarray) -> np.ndarray:
        args = problem.spec.arguments(problem.leaves(x, np.float64), problem.others)
        return ravel_one([np.asarray(y, np.float64) for y in jax.tree.leaves(call(reference, args))])

    return lambda points: np.stack([one(x) for x in points])


def reference_value(problem: Problem, reference: Any) -> np.ndarray | None:
    """The reference's value, of a program in JAX as mpmath has it; None without a reference."""
    if reference is None:
        return None
    if kind_of(problem, reference) == "jax":
        value = exact_value(problem, reference)
        if value is not None:
            return value
    return numpy_values(problem, reference)(problem.x[None])[0]

"""`contract`: shapes, dtypes, trees and leaks, without arithmetic."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxact.verify._problem import Problem
from jaxact.verify._report import (
    ABSENT,
    REFUTED,
    VERIFIED,
    Check,
    Report,
    Verdict,
    first_line,
    name_of,
    type_text,
    verdict_of,
)


def contract(f: Callable[..., Any], *args: Any) -> Report:
    """Checks, by tracing alone, that the derivative rules of `f` return what JAX expects of them.

    Args:
        f: a function of arrays or pytrees.
        *args: example inputs, as for `rule`.

    Returns:
        A `Report` with one check for each mode: that it can be traced, that (co)tangents have the shapes and dtypes of
        what they belong to, that its value has the tree of `f`'s, and that no tracer leaks.

    Raises:
        TypeError: if there is no float among the arguments or the results.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact import verify
        >>> verify.contract(jnp.sin, jnp.ones(3)).verdict
        'verified'
    """
    return check_contract(Problem(f, args), leaks=True)


def check_contract(problem: Problem, leaks: bool) -> Report:
    """The contract; looking for leaks takes JAX seconds, since it then keeps no traces."""
    f = problem.f
    flat = problem.spec.of_floats(f, problem.others)
    checks, reasons = [], []

    def reverse(floats: Any) -> Any:
        out, pullback = jax.vjp(flat, *floats)
        return out, pullback(tuple(map(jnp.ones_like, out)))

    def forward(floats: Any) -> Any:
        return jax.jvp(flat, floats, tuple(map(jnp.ones_like, floats)))

    for mode, function in (("reverse", reverse), ("forward", forward)):
        due = problem.in_shapes if mode == "reverse" else problem.out_shapes
        try:
            with problem.precision(), jax.checking_leaks() if leaks else contextlib.nullcontext():
                # Lowered, for in a trace alone JAX does not say that a `custom_vjp` function has no forward mode.
                primal, derivative = jax.jit(function).lower(problem.floats).out_info
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            checks.append(Check(mode, ABSENT if is_missing_mode(error) else REFUTED, why))
            if not is_missing_mode(error):
                reasons.append(f"tracing {mode} mode raises {why}")
            continue
        problems = _wrong_tree(problem, mode)
        for name, got, expected in (("primal", primal, problem.out_shapes), (_OF[mode], derivative, due)):
            shapes = [(g.shape, np.dtype(g.dtype)) for g in got]
            if shapes != expected:
                problems += [
                    f"{name} {i} has {type_text(*g)}, expected {type_text(*w)}"
                    for i, (g, w) in enumerate(zip(shapes, expected, strict=False))
                    if g != w
                ]
        verdict: Verdict = REFUTED if problems else VERIFIED
        checks.append(Check(mode, verdict, "; ".join(problems) or "traces; shapes, dtypes and trees agree"))
        reasons += problems
    return Report(name_of(f), verdict_of([c.verdict for c in checks]), tuple(checks), tuple(reasons))


def _wrong_tree(problem: Problem, mode: str) -> list[str]:
    """A rule's forward pass may return what `f` does in another tree, and JAX takes it."""

    def f(*floats: Any) -> Any:
        return problem.f(*problem.spec.arguments(floats, problem.others))

    def primal(*floats: Any) -> Any:
        return jax.vjp(f, *floats)[0] if mode == "reverse" else jax.jvp(f, floats, floats)[0]

    def tree(g: Any) -> str:
        with problem.precision():
            return str(jax.tree.structure(jax.eval_shape(g, *problem.floats)))

    due, got = tree(f), tree(primal)
    return [] if got == due else [f"primal has the tree {got}, expected {due}"]


_OF = {"reverse": "cotangent of argument", "forward": "tangent of result"}


def is_missing_mode(error: Exception) -> bool:
    """Whether an error says that a function cannot have a mode, and not that a rule is wrong."""
    text = first_line(error)
    return ("(jvp) to a custom_vjp function" in text) or ("Reverse-mode differentiation does not work" in text)

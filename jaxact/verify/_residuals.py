"""`residuals`: what reverse mode keeps between the passes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxact.verify._problem import Problem
from jaxact.verify._report import REFUTED, VERIFIED, Check, Report, name_of, type_text


def residuals(f: Callable[..., Any], *args: Any, max_bytes: int | None = None) -> Report:
    """Lists the arrays that reverse mode keeps from the forward to the backward pass of `f`.

    Args:
        f: a function of arrays or pytrees.
        *args: example inputs, as for `rule`; only their shapes and dtypes matter.
        max_bytes: refute if more is kept.

    Returns:
        A `Report` with a check for each array, and in `facts` the total of `bytes`. An array that is an argument
        itself, which the caller has anyway, counts once and is marked so.

    Raises:
        TypeError, ValueError: if there is no float among the arguments or the results, or JAX has no reverse mode.

    Example:
        >>> import jax.numpy as jnp, jaxact
        >>> from jaxact import verify
        >>> verify.residuals(jaxact.softmax, jnp.ones((4, 8))).facts["bytes"]
        128
    """
    problem = Problem(f, args)
    flat = problem.spec.of_floats(f, problem.others)
    with problem.precision():
        ones = tuple(np.ones(shape, dtype) for shape, dtype in problem.out_shapes)
        # JAX says only here that there is no reverse mode.
        jax.eval_shape(lambda *floats: jax.vjp(flat, *floats)[1](ones), *problem.floats)
        jaxpr: Any = jax.make_jaxpr(lambda *floats: jax.tree.leaves(jax.vjp(flat, *floats)[1]))(*problem.floats).jaxpr
    kept = {
        id(v): v for v in jaxpr.outvars if hasattr(v.aval, "shape") and v.aval.size > 0 and not isinstance(v, Literal)
    }
    checks, total = [], 0
    for v in kept.values():
        size = int(v.aval.size) * v.aval.dtype.itemsize  # not of np.dtype: a key has one
        total += size
        alias = ", an argument" if v in jaxpr.invars else ""
        checks.append(Check("residual", VERIFIED, f"{type_text(v.aval.shape, v.aval.dtype)}, {size} bytes{alias}"))
    reasons = []
    if max_bytes is not None and total > max_bytes:
        reasons.append(f"reverse mode keeps {total} bytes, more than {max_bytes}")
    return Report(name_of(f), REFUTED if reasons else VERIFIED, tuple(checks), tuple(reasons), {"bytes": total})

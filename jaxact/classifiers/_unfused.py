"""Parts of a program that round alike whatever surrounds them, for two programs that must agree in each bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Literal


def apart(f: Callable[..., Any], always: Array, *args: Any) -> Any:
    """`f(*args)`, compiled apart from its surroundings, so that its roundings do not depend on them.

    In a fusion XLA may contract a product and a sum into one operation with one rounding, or sum in another order,
    and which it does depends on everything else in the fusion. It does not fuse across the branch of a conditional
    whose predicate it does not know. (A barrier is not enough here: on CPU it is gone before fusion.)
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *args))
    return lax.cond(always, f, lambda *_: zeros, *args)


def unfused(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with a barrier after every operation, so that XLA optimises it alike in the programs of both twins.

    Without, it simplifies the update together with what surrounds it, and contracts a product and a sum here and not
    there. An optimizer is the user's own code, so the barriers are put in from outside. (`apart` would not do: with
    two rows in one branch instead of one, JAX 0.12 rounds AdamW differently.)
    """

    def with_barriers(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        flat = _evaluate_unfused(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return with_barriers


def _evaluate_unfused(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], lax.optimization_barrier([*consts, *args]), strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        called = equation.params.get("jaxpr" if equation.primitive.name in ("jit", "pjit") else "call_jaxpr")
        if isinstance(called, ClosedJaxpr):
            outputs = _evaluate_unfused(called.jaxpr, called.consts, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = lax.optimization_barrier(outputs if equation.primitive.multiple_results else [outputs])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

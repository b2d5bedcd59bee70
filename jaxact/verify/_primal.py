"""A function without its custom derivative rules, so that autodiff differentiates what it computes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from jaxact._error_free import two_product, two_sum

# The parameter that holds what a call computes.
_CALLS = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "jit": "jaxpr",
    "pjit": "jaxpr",
}

# What selects, moves or only turns the sign of numbers does not round. (Were a maximum moved, no number would equal it,
# and that is how JAX finds the one that it has the derivative of.)
_EXACT = {
    "abs", "broadcast_in_dim", "ceil", "clamp", "concatenate", "copy", "cummax", "cummin", "dynamic_slice",
    "dynamic_update_slice", "floor", "gather", "iota", "max", "min", "neg", "optimization_barrier", "pad",
    "reduce_max", "reduce_min", "reshape", "rev", "round", "scatter", "select_n", "sign", "slice", "sort", "split",
    "squeeze", "top_k", "transpose",
}  # fmt: skip


def _lost(operation: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    """What an error-free transformation says is lost. Behind a barrier, or XLA may find that it is nothing."""
    return lambda a, b: lax.stop_gradient(operation(*lax.optimization_barrier((a, b)))[1])


# Of which it can be told.
_LOST = {
    "add": _lost(two_sum),
    "sub": _lost(lambda a, b: two_sum(a, -b)),
    "mul": _lost(two_product),
}


def without_rules(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with every `jax.custom_jvp` and `jax.custom_vjp` replaced by its primal, inside loops and branches too."""
    return _evaluated(f, None)


def perturbed(f: Callable[..., Any], signs: Any) -> Callable[..., Any]:
    """`f` with what each operation rounds off by a unit of float64 in the direction of the next of `signs`.

    How far the result moves tells how much of it is rounding: Monte Carlo arithmetic. What has not rounded is left as
    it is, such as the place of a class that is compared to a label.
    """
    count = itertools.count()

    def nudge(primitive: str, inputs: list[Any], y: Any) -> Any:
        if primitive in _EXACT or not jnp.issubdtype(jnp.result_type(y), jnp.floating):
            return y
        if primitive == "convert_element_type" and not jnp.issubdtype(jnp.result_type(*inputs), jnp.floating):
            return y
        nudged = y * (1 + 2.0**-52 * signs[next(count) % len(signs)]).astype(y.dtype)
        known = primitive in _LOST and y.dtype == jnp.float64
        return jnp.where(_LOST[primitive](*inputs) == 0, y, nudged) if known else nudged

    return _evaluated(f, nudge)


def _evaluated(f: Callable[..., Any], after: Any) -> Callable[..., Any]:
    def evaluated(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        flat = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), after)
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return evaluated


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], after: Any = None) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        called = equation.params.get(_CALLS.get(equation.primitive.name, ""))
        if isinstance(called, ClosedJaxpr):
            outputs = _evaluate(called.jaxpr, called.consts, inputs, after)
        else:
            outputs = equation.primitive.bind(*inputs, **{k: _strip(v) for k, v in equation.params.items()})
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            outputs = outputs if after is None else [after(equation.primitive.name, inputs, y) for y in outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _strip(parameter: Any) -> Any:
    """A parameter of a loop or a branch, its programs without rules."""
    if isinstance(parameter, tuple) and any(hasattr(p, "eqns") for p in parameter):
        stripped = [_strip(p) for p in parameter]
        return type(parameter)(*stripped) if hasattr(parameter, "_fields") else tuple(stripped)
    if hasattr(parameter, "eqns") and _has_rule(parameter):
        consts = getattr(parameter, "consts", ())
        jaxpr = getattr(parameter, "jaxpr", parameter)
        closed = jax.make_jaxpr(lambda *args: _evaluate(jaxpr, consts, args))(*(v.aval for v in jaxpr.invars))
        return closed if isinstance(parameter, ClosedJaxpr) else closed.jaxpr
    return parameter


def _has_rule(jaxpr: Any) -> bool:
    def inner(parameter: Any) -> bool:
        if isinstance(parameter, tuple):
            return any(map(inner, parameter))
        return hasattr(parameter, "eqns") and _has_rule(parameter)

    return any(e.primitive.name.startswith("custom_") or any(map(inner, e.params.values())) for e in jaxpr.eqns)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr, and of what it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)

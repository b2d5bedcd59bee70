"""Probabilities of the classes, and their logarithms, from a row's sum that is known; on one device or several."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._classes import Classes
from jaxact._elementary import exp
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import certain, over_total, times_jacobian
from jaxact._label_sums import at_labels, others_exponentials
from jaxact._limits import below_infinity, finite
from jaxact._row_sums import Total, below, but_maximum
from jaxact._shared_exponentials import softmax_of_shared


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def probabilities(classes: Classes, z: Array, total: Total) -> Array:
    # Behind the barrier XLA computes the exponentials again instead of keeping them from where they were summed.
    total = lax.optimization_barrier(total)
    d = below_infinity(z) - total.shift
    return over_total(jnp.exp(d) if classes.lean else exp(d), total.sum, ())


def _probabilities_fwd(classes: Classes, z: Array, total: Total) -> tuple[Array, Array]:
    p = probabilities(classes, z, total)
    return p, p


def _probabilities_bwd(classes: Classes, p: Array, g: Array) -> tuple[Array, None]:
    return times_jacobian(certain(p), g, (p.ndim - 1,), classes.sum), None


probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def others_probabilities(classes: Classes, z: Array, y: Array, total: Total) -> Array:
    """The probabilities, and 0 at the label, of the exponentials that are shared."""
    e, at_peak = others_exponentials(z, total.shift, y)
    return e / (total.sum * at_peak)


def _others_probabilities_fwd(classes: Classes, z: Array, y: Array, total: Total) -> Any:
    return others_probabilities(classes, z, y, total), (z, y, total)


def _others_probabilities_bwd(classes: Classes, residuals: Any, g: Array) -> Any:
    z, y, total = residuals
    g = at_labels(lax.scatter, g, y, jnp.zeros_like(total.sum))
    p = softmax_of_shared(z, Total(*(a[..., 0] for a in total)), (z.ndim - 1,))
    return times_jacobian(certain(p), g, (p.ndim - 1,), classes.sum), None, None


others_probabilities.defvjp(_others_probabilities_fwd, _others_probabilities_bwd)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_probabilities(classes: Classes, z: Array, total: Total) -> Array:
    # About the maximum, as in log_softmax, and not the shift, which may be far from it: no term is positive, and none
    # falsely 0.
    top = classes.max(z)
    peak = finite(top)
    d = below(peak, z, ())
    weight = but_maximum(z, peak, ())
    others, ties = classes.sum(jnp.exp(d) * weight) / 2, classes.sum(2 - weight) / 2
    # Beside an infinite logit every other class is infinitely unlikely.
    impossible = (top == jnp.inf) & (z < jnp.inf)
    return jnp.where(impossible, -jnp.inf, d - jnp.log1p(others + jnp.maximum(ties - 1, 0)))


def _log_probabilities_fwd(classes: Classes, z: Array, total: Total) -> Any:
    return log_probabilities(classes, z, total), (z, total)


def _log_probabilities_bwd(classes: Classes, residuals: Any, g: Array) -> Any:
    z, total = residuals
    return without_mean(classes, probabilities(classes, z, total), g), None


log_probabilities.defvjp(_log_probabilities_fwd, _log_probabilities_bwd)


def without_mean(classes: Classes, p: Array, g: Array) -> Array:
    """ȳ − p Σ ȳ, the cotangent of the logits of that of log p."""
    # Twice, as in log_softmax: what it lost to rounding at the largest probability is its sum.
    v = g - p * classes.sum(g)
    return v - p * classes.sum(v)

"""Limits and masks as arithmetic, which is what XLA for CPU vectorises and keeps in one kernel.

A boolean inside a reduction, as of a comparison or a `where`, makes the sum several times slower.
"""

import jax.numpy as jnp
from jax import Array, lax


def at_most(limit: Array, x: Array) -> Array:
    """The minimum, and nan where x is nan.

    `minimum(x, limit)` would not be: in the library of XLA for CPU the second operand wins, as a constant does in
    either place. A reduction to a maximum passes over nan too. So it is through this, and the sum of the exponentials,
    that a nan reaches its row.
    """
    return jnp.minimum(limit, x)


def finite(top: Array) -> Array:
    """The nearest finite number, so that ∞ − ∞ never occurs."""
    largest = float(jnp.finfo(top.dtype).max)
    return between(top, -largest, largest)


def below_infinity(x: Array) -> Array:
    """`x`, but the largest number for +inf, from which nothing can be subtracted."""
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max))


def between(x: Array, low: float, high: Array | float) -> Array:
    """`clip`, in a form that XLA for CPU does not take for one: at a clip it splits the kernel. nan remains."""
    return -jnp.maximum(-jnp.maximum(x, low), -high)


def is_possible(x: Array) -> Array:
    """0 where a logit is −inf and 1 elsewhere; not a comparison, for one kernel."""
    largest = float(jnp.finfo(x.dtype).max)
    return jnp.minimum(jnp.maximum(x / 2, -largest) + largest, 1)  # half, since the least number is not −inf


def is_largest(peak: Array) -> Array:
    """1 at the largest number, which `finite` makes of +inf, and 0 below. Not a comparison, for one kernel."""
    info, peak = jnp.finfo(peak.dtype), lax.stop_gradient(peak)
    last = 2 * float(info.eps)  # from the largest number to the one before it, multiplied by `tiny`
    # The minimum changes nothing. In JAX 0.10 it keeps XLA from multiplying 1/last by another factor, and overflowing.
    return jnp.minimum(jnp.maximum(peak * float(info.tiny) - (4 - 2 * last), 0) / last, 1)

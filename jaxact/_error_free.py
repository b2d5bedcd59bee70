"""Sums and products with what their rounding loses: error-free transformations, for float32 and float64."""

import jax.numpy as jnp
from jax import Array, lax


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """s = a + b as it is rounded, and a + b − s exactly (Knuth's TwoSum)."""
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """p = ab as it is rounded, and ab − p (Dekker's product): exactly, but for what is less than the smallest number.

    The products of the halves are exact, so that it does not matter which of them a compiler contracts with a sum.
    """
    p = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return p, ((a_high * b_high - p) + (a_high * b_low + a_low * b_high)) + a_low * b_low


def _halves(a: Array) -> tuple[Array, Array]:
    """Two numbers of half the digits, whose sum is `a`."""
    integer, low = (jnp.int32, 12) if a.dtype == jnp.float32 else (jnp.int64, 27)
    bits = lax.bitcast_convert_type(a, integer)
    high = lax.bitcast_convert_type(bits & -(1 << low), a.dtype)
    return high, a - high

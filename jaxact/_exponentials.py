"""Exponentials of a row after a shift that keeps them in range: what softmax and logsumexp rest on.

Inside, a masked class is a logit of −inf, and `axis` is a sorted tuple. What there is one of for each row has no class
axes until it is spread over the row: an array with an axis of length 1 XLA for CPU would visit row by row.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxact._elementary import exp_over
from jaxact._limits import at_most, below_infinity
from jaxact._reductions import Axes, class_count, few, small, spread


class Shift(NamedTuple):
    """What keeps the exponentials of a row in range; arrays of the shape of the rows."""

    top: Array  # finite, and no logit but +inf above it
    by: Array  # what is subtracted from the logits
    factor: Array  # by which the exponentials are multiplied


UNSHIFTED = 63.0  # a maximum between 0 and this needs neither a shift nor a factor


def room(dtype: Any) -> float:
    """The inverse of a sum of 2²⁶ times e^{room + 1} is a normal number."""
    return math.floor(-math.log(float(jnp.finfo(dtype).tiny)) - math.log(2.0**26) - 1)


def whole_shift(peak: Array, room: float, least: Array | float) -> Array:
    """The least whole number from `least` on that a maximum m exceeds by no more than `room`; a large m itself."""
    # Lifted, since a large m less the room is rounded, and to a number that may be much further below m than that: by
    # m·eps, at most, which 8 times it outweighs.
    lifted = peak * (1 + 8 * float(jnp.finfo(peak.dtype).eps))
    return jnp.floor(jnp.maximum(jnp.minimum(lifted - room, peak), least))


def shift_about(peak: Array, t: Array | None, count: int) -> Shift:
    """The shift for which neither the sum of `count` exponentials nor its reciprocal overflows.

    Subtracting the maximum m rounds: by up to |x − m|·u, a relative error in the exponential of 66 ulp at logit
    scale 30. But the maximum is only one of many shifts that prevent overflow. An integer s ≤ m such that m − s stays
    below the logarithm of the largest number serves as well, and of these we take the one nearest 0: then x − s is
    exact unless |x − s| exceeds |x|, where it is small. Where t divides, that rounds in any case, and s = m.
    """
    if t is not None:
        return Shift(peak, peak, jnp.ones_like(peak))
    if count <= 28:
        return shift_without_factor(peak, count)
    by = whole_shift(peak, math.floor(math.log(float(jnp.finfo(peak.dtype).max)) - 1) - 1, jnp.minimum(peak, 0))
    # A larger maximum makes the sum of all larger still. Multiplied by this, the exponentials of 2³¹ classes do not
    # overflow, and none is flushed that is a normal part of their sum. (Arithmetic on the maximum, and not a
    # comparison: so XLA for CPU makes one kernel of softmax.)
    return Shift(peak, by, jnp.maximum(1 - jnp.floor(jnp.maximum(peak / (UNSHIFTED + 1), 0)), 2.0**-32))


def shift_without_factor(peak: Array, count: int) -> Shift:
    """The same without a factor. The more classes, the less room that leaves, which costs digits.

    All may be as large as the largest, and the reciprocal of their sum is a normal number still.
    """
    most = -math.log(float(jnp.finfo(peak.dtype).tiny)) - math.log(max(count, 1))
    return Shift(peak, whole_shift(peak, math.floor(most) - 1, jnp.minimum(peak, 0)), jnp.ones_like(peak))


def shift_of_sum(peak: Array, t: Array | None, count: int) -> Shift:
    """The shift, without a factor, for which the sum of `count` exponentials does not overflow; its reciprocal may.

    A negative m is rounded, and not down: so e^{m − s} times the least normal number is at most the distance of m from
    the number before it, however small that is.
    """
    if t is not None:
        return Shift(peak, peak, jnp.ones_like(peak))
    info = jnp.finfo(peak.dtype)
    most = min(math.log(float(info.eps) / float(info.tiny)), math.log(float(info.max)) - math.log(max(count, 1)) - 1)
    by = whole_shift(peak, math.floor(most) - 1, jnp.minimum(peak, 0) + 0.5)
    return Shift(peak, by, jnp.ones_like(peak))


def exponentials(x: Array, shift: Shift, t: Array | None, axis: Axes, exp: Callable[[Array], Array] = jnp.exp) -> Array:
    top, by, factor = (spread(a, axis) for a in shift)
    # The minimum changes nothing but +inf. It keeps XLA from contracting the multiplication in `softmax(a * x)` with
    # the subtraction, after which the maximum would no longer be the largest (jax issue 37234).
    d = at_most(top, x) - by
    return exp(d) * factor if t is None else exp(d / t)


def scaled_exponentials(x: Array, peak: Array, axis: Axes) -> tuple[Array, Array]:
    """The exponentials of float32 over a number for each row, and those of the maxima over the same.

    By our own exponential, and XLA's in small arrays: that is no operation in its eyes, and the loop is not split. (Nor
    is a loop through few numbers; and there `classifiers` needs that of `sigmoid`, bit for bit.) Ours is divided by 2ⁿ,
    and about 2⁹⁰ at the maximum: so none is flushed that counts in the sum of the others, however small that is, and
    2³¹ do not overflow. No logit is rounded: of one near a large m the difference x − m is exact, and others need none.
    """
    if small(x) and not few(x):
        shift = shift_without_factor(peak, class_count(x, axis))
        return exponentials(x, shift, None, axis), exponentials(peak, shift, None, ())
    by = jnp.where(jnp.abs(peak) <= 2.0**8, 0, peak)  # nan of nan, for which the comparison is false
    n = jnp.floor((peak - by) / math.log(2)) - 90
    d = below_infinity(x) - spread(by, axis)
    return exp_over(d, spread(n, axis)), exp_over(peak - by, n)

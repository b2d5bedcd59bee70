"""The sums of a row's exponentials: over all classes, and over all but the largest.

The second is what a dominated row needs, in which one class has more than half of the probability: what the others
have is lost in the sum of all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxact._branches import unless_all
from jaxact._canonical import widen
from jaxact._exponentials import UNSHIFTED, Shift, exponentials, shift_about, shift_of_sum
from jaxact._limits import at_most, finite
from jaxact._reductions import (
    Axes,
    at_once,
    class_by_class,
    class_count,
    maximum,
    on_cpu,
    small,
    spread,
    sum_but_largest,
    sum_over,
)


class Sums(NamedTuple):
    """What a row's logits come to; arrays of the shape of the rows."""

    peak: Array  # the maximum m, or the finite number nearest to it; UNSHIFTED where that is not known
    total: Array  # the sum of `exponentials`; 0 where no class is left


class RowSums(NamedTuple):
    """The same, with the sum of all but the largest."""

    peak: Array
    total: Array  # as in `Sums`; of exponentials that are shared, as in a `Total` about the maximum m
    others: Array  # Σ e^{(xⱼ − m)/t} over all j but one at which m is attained; 0 where no class is left


class Total(NamedTuple):
    """Σ e^{xⱼ − s} of a row; arrays of the shape of the rows, and of one class beside integer labels."""

    shift: Array  # s, finite
    sum: Array


def written_sum(e: Array, axis: Axes) -> Array:
    """The sum of an array that is in memory."""
    total = sum_over(e, axis)
    # It changes nothing. But the library of XLA for CPU takes in no selection, and so nothing that follows the sum,
    # for each operation of which it takes as long as for the sum.
    return jnp.where(total == 0, 0, total)


def total_unshifted(x: Array, axis: Axes) -> tuple[Array, Array]:
    """The sum without a shift, for which no maximum need be found; and whether it will do.

    It does if it has not overflowed and nothing is flushed that counts.
    """
    total = sum_over(jnp.exp(widen(x)), axis)
    return total, (total >= 1) & (total < math.exp(UNSHIFTED))


def undominated(others: Array) -> Array:
    """Whether no class has much more than half of the sum. Where several attain the maximum none has.

    The sum of the others, about the maximum, is then at least 1; but rounding may have left a little less.
    """
    return lax.stop_gradient(others) >= 0.75


def row_sums(
    x: Array,
    t: Array | None,
    axis: Axes,
    suffices: Callable[[Array], Array] = undominated,
    try_unshifted: bool = True,
) -> RowSums:
    """The sums of rows. `suffices` says where the sum less 1 may stand for that of the others.

    `try_unshifted` is false where it is known already that the plain sum will not do.
    """
    if at_once(x, axis):
        return sums_at_once(x, t, axis)
    peak = finite(widen(maximum(x, axis)))
    shift = shift_about(peak, t, class_count(x, axis))

    def shifted(x: Array, shift: Shift, unshifted: Array) -> Array:
        return sum_over(exponentials(widen(x), shift, t, axis), axis)

    if t is None and try_unshifted and on_cpu() and not small(x):
        # Of a maximum from 0 on that is in range nothing is subtracted, and on CPU to do so takes as long as the sum.
        unshifted, in_range = total_unshifted(x, axis)
        total = unless_all(in_range & (peak >= 0), shifted, lambda x, shift, unshifted: unshifted, x, shift, unshifted)
    else:
        total = shifted(x, shift, peak)
    at_peak = exponentials(peak, shift, t, ())
    all_but_one = total / at_peak - 1

    # What a branch or a barrier is given is written to memory: logits as they are, which may have 16 bits.
    def exact(x: Array, shift: Shift, at_peak: Array, all_but_one: Array) -> Array:
        # This difference may have cancelled. But then no second class attains the maximum.
        weight = but_maximum(widen(x), shift.top, axis)
        alone = jnp.sum(exponentials(widen(x), shift, t, axis) * weight, axis) / 2 / at_peak
        return jnp.where(undominated(all_but_one), all_but_one, alone)

    def quick(x: Array, shift: Shift, at_peak: Array, all_but_one: Array) -> Array:
        return all_but_one

    return RowSums(peak, total, unless_all(suffices(all_but_one), exact, quick, x, shift, at_peak, all_but_one))


def sums_at_once(x: Array, t: Array | None, axis: Axes) -> RowSums:
    """The sums, without a branch: in one kernel, where XLA for CPU makes one of what comes before and after."""
    top, wide = widen(maximum(x, axis)), widen(x)
    peak = finite(top)
    shift = shift_about(peak, t, class_count(x, axis))
    at_peak = exponentials(peak, shift, t, ())
    if class_by_class(x, axis):
        others = sum_but_largest(lambda a: exponentials(a, shift, t, ()), wide, axis)
        return RowSums(peak, others + exponentials(top, shift, t, ()), others / at_peak)
    bare = shift_of_sum(peak, t, class_count(x, axis))
    at_bare = exponentials(peak, bare, t, ())
    e = exponentials(wide, bare, t, axis)
    # 0 where the maximum is attained. Elsewhere the distance from it is at least e times the least normal number.
    but_largest = jnp.minimum(e, lax.stop_gradient(below(peak, wide, axis)) / -float(jnp.finfo(peak.dtype).tiny))
    total, others = jnp.sum(e, axis), jnp.sum(but_largest, axis)
    # A whole number but for rounding; where that exceeds a half, the total is rounded by as much.
    ties = jnp.floor((total - others) / at_bare + 0.5)
    return RowSums(peak, total * (at_peak / at_bare), others / at_bare + jnp.maximum(ties - 1, 0))


def but_maximum(x: Array, peak: Array, axis: Axes) -> Array:
    """0 where the maximum is attained and 2 elsewhere."""
    # Not 1, a limit that other kernels have as well: a constant of two kernels is written to memory at full size.
    # Autodiff must not see it: the limit's slope would be that of a step.
    return jnp.minimum(lax.stop_gradient(below(peak, x, axis)) / -float(jnp.finfo(x.dtype).tiny), 2)


def below(peak: Array, x: Array, axis: Axes) -> Array:
    """x − m, at most 0. The minimum, as in `exponentials`."""
    top = spread(peak, axis)
    return at_most(top, x) - top


def if_dominated(others: Array, exact: Callable[..., Any], quick: Callable[..., Any], *operands: Any) -> Any:
    """`exact(*operands)`, for which `quick` may stand in where no row has a class with more than half of the sum.

    Such a row needs a second pass over its logits for what the first has cancelled. For one that is not dominated the
    two agree up to rounding.
    """
    return unless_all(undominated(others), exact, quick, *operands)

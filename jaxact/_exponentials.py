"""Exponentials of a row after a shift that keeps them in range, and their sums: what softmax and logsumexp rest on.

Inside, a masked class is a logit of −inf, and `axis` is a sorted tuple. Masks and limits are written as arithmetic
(minimum, maximum, multiplication) and not as `where`: on CPU a boolean inside a reduction keeps XLA from vectorising
it, which makes the sum several times slower. What there is one of for each row has no class axes until it is spread
over the row: an array with an axis of length 1 XLA for CPU would visit row by row.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._branches import unless_all
from jaxact._canonical import widen
from jaxact._elementary import exp_over
from jaxact._reductions import (
    Axes,
    at_once,
    class_by_class,
    class_count,
    few,
    maximum,
    on_cpu,
    size,
    small,
    spread,
    sum_but_largest,
    sum_over,
)


class Shift(NamedTuple):
    """What keeps the exponentials of a row in range; arrays of the shape of the rows."""

    top: Array  # finite, and no logit but +inf above it
    by: Array  # what is subtracted from the logits
    factor: Array  # by which the exponentials are multiplied


class Sums(NamedTuple):
    """What a row's logits come to; arrays of the shape of the rows."""

    peak: Array  # the maximum m, or the finite number nearest to it; UNSHIFTED where that is not known
    total: Array  # the sum of `exponentials`; 0 where no class is left


class RowSums(NamedTuple):
    """The same about the maximum m, with the sum of all but the largest."""

    peak: Array
    total: Array
    others: Array  # Σ e^{(xⱼ − m)/t} over all j but one at which m is attained; 0 where no class is left


class Total(NamedTuple):
    """Σ e^{xⱼ − s} of a row; arrays of the shape of the rows."""

    shift: Array  # s, finite
    sum: Array


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
    and about 2 to 4 at the maximum. No logit is rounded: of one near a large m the difference x − m is exact, and
    others need none.
    """
    if small(x) and not few(x):
        shift = shift_without_factor(peak, class_count(x, axis))
        return exponentials(x, shift, None, axis), exponentials(peak, shift, None, ())
    by = jnp.where(jnp.abs(peak) <= 2.0**8, 0, peak)  # so a peak of nan leaves none a number
    n = jnp.floor((peak - by) / math.log(2)) - 1
    # The minimum changes +inf alone, from which nothing can be taken.
    d = jnp.minimum(x, float(jnp.finfo(x.dtype).max)) - spread(by, axis)
    return exp_over(d, spread(n, axis)), exp_over(peak - by, n)


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


def over_total(e: Array, total: Array, axis: Axes) -> Array:
    """Exponentials divided by their `total`; 0 where no class is left."""
    # What is added is lost in any other sum: that is at least the `factor` of the shift.
    return e / spread(total + 2.0**-100, axis)


def divided_by_total(e: Array, total: Array, axis: Axes) -> Array:
    """The same by a division: 1 where nothing is left to the others, where e·(1/e) may not be. It takes longer."""
    # Of what is divided by one number for each row, XLA makes a product. (The total second, as in `at_most`: a nan
    # reaches its row through it.)
    return e / jnp.maximum(e, spread(total + 2.0**-100, axis))


def undominated(others: Array) -> Array:
    """Whether no class has much more than half of the sum. Where several attain the maximum none has.

    The sum of the others, about the maximum, is then at least 1; but rounding may have left a little less.
    """
    return lax.stop_gradient(others) >= 0.75


def row_sums(x: Array, t: Array | None, axis: Axes, suffices: Callable[[Array], Array] = undominated) -> RowSums:
    """The sums of rows. `suffices` says where the sum less 1 may stand for that of the others."""
    if at_once(x, axis):
        return sums_at_once(x, t, axis)
    peak = finite(widen(maximum(x, axis)))
    shift = shift_about(peak, t, class_count(x, axis))
    total = sum_over(exponentials(widen(x), shift, t, axis), axis)
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


@jax.custom_jvp
def certain(y: Array) -> Array:
    """`y`, with 1 for a probability within 2 ulp of 1, where e·(1/e), as XLA divides, may have left a little less.

    To subtract a mean twice leaves ε² of the largest entry where its probability is 1 − ε instead of 1, and that can
    exceed the small entries. Derivatives pass through unchanged.
    """
    return jnp.maximum(y, jnp.floor(y + 2 * float(jnp.finfo(y.dtype).eps)))


certain.defjvp(lambda primals, tangents: (certain(*primals), *tangents))


def times_jacobian(y: Array, g: Array, axis: Axes, row_sum: Callable[[Array], Array]) -> Array:
    """The product of the Jacobian of softmax, where it is `y`, with a tangent or cotangent. `y` should be `certain`."""
    # The Jacobian is diag(y) − y yᵀ = Pᵀ diag(y) P with P u = u − ⟨u, y⟩. Where one probability is near 1, subtracting
    # the mean first leaves that entry small, so that nothing large cancels in the second subtraction. The product is
    # symmetric, as the Jacobian is: transposed for forward mode it is the same steps, from the last to the first.
    # Both differences have their sign reversed: what XLA for CPU subtracts from each entry of a row it first negates,
    # in a kernel of its own that parts the two around it; this way one kernel does it all.
    # The cotangent must not come first in the product that is summed: where it is the same for all rows, XLA of JAX
    # 0.10 writes the product over it, and later rows find it there.
    g = uncontracted(g, y, axis)
    z = y * (row_sum(y * g) - g)
    return uncontracted(-(z - y * row_sum(z)), y, axis)


def uncontracted(g: Array, y: Array, axis: Axes) -> Array:
    """`g`, also where it is a product, or is multiplied by something when transposed. `y` are probabilities.

    XLA may contract a product with what is subtracted from it, which leaves the product unrounded; and if it was
    rounded where it was summed, there is a rest where there should be none. What is subtracted from `g` times 1 is
    exact, if XLA does not know that it is 1.
    """
    if on_cpu() and size(y) >= 2**15 and not class_by_class(y, axis):
        # What the library sums would take up to half of the time again. There a barrier does, which XLA of JAX 0.10
        # leaves out, and needs not. In larger arrays no such rest has been seen, and a barrier would cost a pass.
        return lax.optimization_barrier(g) if size(y) <= 2**20 else g
    return g * lax.stop_gradient(jnp.maximum(y, 1))


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

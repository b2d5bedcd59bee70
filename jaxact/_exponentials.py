"""Exponentials of a row after a shift that keeps them in range, and their sums: what softmax and logsumexp rest on.

Inside, a masked class is a logit of −inf, `axis` is a sorted tuple, and reductions keep their dimensions. Masks and
limits are written as arithmetic (minimum, maximum, multiplication) and not as `where`: on CPU a boolean inside a
reduction keeps XLA from vectorising it, which makes the sum several times slower.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxact._canonical import as_float, compute_dtype

Axes = tuple[int, ...]


class Sums(NamedTuple):
    """What a row's logits come to; arrays of the row's shape with the class axes kept."""

    peak: Array  # the maximum m, or the finite number nearest to it
    total: Array  # the sum of `exponentials`, times `scale`
    others: Array  # Σ e^{(xⱼ − m)/t} over all j but one at which m is attained; 0 where no class is left


def exponentials(x: Array, peak: Array, t: Array | None) -> Array:
    """exp((x − s)/t) for a shift s of the row such that the largest is between 1 and e⁸⁶ in float32.

    Subtracting the maximum m as s rounds: by up to |x − m|·u, a relative error in the exponential of 66 ulp at logit
    scale 30. But the maximum is only one of many shifts that prevent overflow. An integer s ≤ m such that m − s stays
    below the logarithm of the largest number serves as well, and of these we take the one nearest 0: then x − s is
    exact unless |x − s| exceeds |x|, where it is small. Where t divides, that rounds in any case, and s = m.
    """
    # The minimum changes nothing but +inf. It keeps XLA from contracting the multiplication in `softmax(a * x)` with
    # the subtraction, after which the maximum would no longer be the largest (jax issue 37234).
    x = jnp.minimum(x, peak)
    if t is not None:
        return jnp.exp((x - peak) / t)
    # Room for rounding s up, and for the reciprocal of the sum to be a normal number.
    room = math.floor(math.log(float(jnp.finfo(peak.dtype).max))) - 2
    shift = jnp.floor(jnp.minimum(peak, 0)) + jnp.ceil(jnp.maximum(peak - room, 0))
    return jnp.exp(x - shift)


def total(e: Array, axis: Axes) -> Array:
    """The sum of exponentials, times `scale`: by itself it might overflow. What that flushes is too small to count."""
    return jnp.sum(e * scale(class_count(e, axis)), axis, keepdims=True)


def scale(count: int) -> float:
    """The largest power of 2 that is at most 1/count."""
    return 2.0 ** -(max(count, 1) - 1).bit_length()


def over_total(e: Array, total: Array, peak: Array, t: Array | None) -> Array:
    """Exponentials divided by their `total`; 0 where no class is left and the sum is 0."""
    c = scale(e.size // max(total.size, 1))
    total = jnp.maximum(total, c)
    if t is not None:
        return e / (total / c)
    # The reciprocal of a large sum may not be a normal number. Where the maximum is large we scale the exponentials
    # instead, which flushes none of a normal probability. (Arithmetic on the maximum, and not a comparison of the sum:
    # so XLA for CPU makes one kernel of softmax.)
    factor = 1 - jnp.minimum(jnp.floor(jnp.maximum(peak / 64, 0)), 1) * (1 - c)
    return e * factor / (total * (factor / c))


def row_sums(x: Array, t: Array | None, axis: Axes) -> Sums:
    # What a branch or a barrier is given is written to memory: logits as they are, which may have 16 bits.
    peak = finite(widen(maximum(x, axis)))
    at_peak = exponentials(peak, peak, t)
    sum_of_all = total(exponentials(widen(x), peak, t), axis)
    all_but_one = sum_of_all / (at_peak * scale(class_count(x, axis))) - 1

    def exact(x: Array, peak: Array, all_but_one: Array) -> Array:
        # Below 1 this difference may have cancelled. But then no second class attains the maximum, and with weights
        # that are 0 at the maximum and 1 elsewhere the others can be summed by themselves.
        wide = widen(x)
        weight = jnp.minimum((peak - jnp.minimum(wide, peak)) / float(jnp.finfo(peak.dtype).tiny), 1)
        alone = jnp.sum(exponentials(wide, peak, t) * weight, axis, keepdims=True) / at_peak
        return jnp.where(all_but_one >= 1, all_but_one, alone)

    others = if_dominated(all_but_one, exact, lambda x, peak, all_but_one: all_but_one, x, peak, all_but_one)
    return Sums(peak, sum_of_all, others)


def if_dominated(others: Array, exact: Callable[..., Any], quick: Callable[..., Any], *operands: Any) -> Any:
    """`exact(*operands)`, for which `quick` may stand in where no row has a class with more than half of the sum.

    Such a row needs a second pass over its logits for what the first has cancelled. For one that is not dominated the
    two agree up to rounding.
    """
    return unless_all(lax.stop_gradient(others) >= 1, exact, quick, *operands)


def unless_all(condition: Array, exact: Callable[..., Any], quick: Callable[..., Any], *operands: Any) -> Any:
    """`exact(*operands)`, for which `quick` may stand in where the condition holds throughout.

    On CPU a pass over the logits is what costs, and is left out where no row needs it. Elsewhere a branch on a value
    that the device has computed may cost more than the pass, and so it does for a handful of numbers.
    """
    if max(a.size for a in jax.tree.leaves(operands)) <= 64:
        return exact(*operands)

    def on_cpu(*operands: Any) -> Any:
        return lax.cond(_all(condition), quick, exact, *operands)

    return lax.platform_dependent(*operands, cpu=on_cpu, default=exact)


@jax.custom_batching.custom_vmap
def _all(condition: Array) -> Array:
    """`jnp.all`, over the batch too when batched, so that the branch on it remains one."""
    return jnp.all(condition)


@_all.def_vmap
def _all_of_batch(size: int, batched: list[bool], condition: Array) -> tuple[Array, bool]:
    return _all(condition), False


@jax.custom_jvp
def certain(y: Array) -> Array:
    """`y`, with 1 for a probability within 2 ulp of 1, where e·(1/e), as XLA divides, may have left a little less.

    Below, subtracting means leaves ε² of the largest entry where its probability is 1 − ε instead of 1, and that can
    exceed the small entries. Derivatives pass through unchanged.
    """
    return jnp.maximum(y, jnp.floor(y + 2 * float(jnp.finfo(y.dtype).eps)))


certain.defjvp(lambda primals, tangents: (certain(*primals), *tangents))


def times_jacobian(y: Array, g: Array, row_sum: Callable[[Array], Array]) -> Array:
    """The product of the Jacobian of softmax, where it is `y`, with a tangent or cotangent. `y` should be `certain`."""
    # The Jacobian is diag(y) − y yᵀ = Pᵀ diag(y) P with P u = u − ⟨u, y⟩. Where one probability is near 1, subtracting
    # the mean first leaves that entry small, so that nothing large cancels in the second subtraction. The product is
    # symmetric, as the Jacobian is: transposed for forward mode it is the same three steps.
    # Both differences have their sign reversed: what XLA for CPU subtracts from each entry of a row it first negates,
    # in a kernel of its own that parts the two around it; this way one kernel does it all. (The last is not turned
    # round: the cotangent may be a product, and XLA would then contract it with the difference here and not there.)
    z = y * (row_sum(g * y) - g)
    return -(z - y * row_sum(z))


def maximum(x: Array, axis: Axes) -> Array:
    return jnp.max(x, axis, keepdims=True, initial=-jnp.inf)


def finite(top: Array) -> Array:
    """The nearest finite number, so that ∞ − ∞ never occurs. Not `clip`, at which XLA for CPU splits the kernel."""
    largest = float(jnp.finfo(top.dtype).max)
    return -jnp.maximum(-jnp.maximum(top, -largest), -largest)


def class_count(x: Array, axis: Axes) -> int:
    return math.prod(x.shape[a] for a in axis)


def divisor(temperature: ArrayLike | None, x: Array) -> Array | None:
    if temperature is None:
        return None
    t = as_float("temperature", temperature).astype(compute_dtype(x.dtype))
    return jnp.where(t > 0, t, jnp.nan)


def widen(x: Array) -> Array:
    return x.astype(compute_dtype(x.dtype))

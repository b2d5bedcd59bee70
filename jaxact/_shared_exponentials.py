"""Exponentials that a value shares with its gradient, or with a second sum of its own, on CPU.

Where they are wanted once, XLA's library of kernels finds them as it sums them, and nothing is written to memory. But
every operation beside a sum takes long there, and a second use would find them again. Where there is one, they are an
array (`scaled_exponentials`), which the library sums plainly, and of which the gradient is made in place. XLA sees that
the two are the same as long as no barrier or branch lies between them. What a rule keeps is the logits, as ever.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._branches import needing, unless_all
from jaxact._canonical import compute_dtype, widen
from jaxact._exponentials import scaled_exponentials
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import certain, over_total, times_jacobian
from jaxact._limits import finite, is_possible
from jaxact._reductions import Axes, class_by_class, few, maximum, on_cpu, size, small, spread, sum_over
from jaxact._row_sums import RowSums, Total, but_maximum, if_dominated, undominated, written_sum


def shares(x: Array, axis: Axes) -> bool:
    """Whether a derivative shares the exponentials of its value.

    In 16 bits the logits have half the size: to write exponentials of more than `_fits` takes longer than to find them
    twice. In 64 there is no `exp_over`.
    """
    narrow = x.dtype == jnp.float32 or (compute_dtype(x.dtype) == jnp.float32 and _fits(x))
    return on_cpu() and narrow and not class_by_class(x, axis)


def shares_sums(x: Array, t: Array | None, axis: Axes, differentiated: bool = False) -> bool:
    """Whether the sum over all but the largest class shares them too.

    So in arrays of up to 4 MB of float32, and in any that is `differentiated` where value and gradient have its size:
    the gradient takes their place. Elsewhere to write and read them takes longer than to find them twice, in one kernel
    each; and so it does of few numbers, where that takes no time.
    """
    if t is not None or not shares(x, axis):
        return False
    if x.dtype == jnp.float32:
        return not few(x) and (differentiated or _fits(x))
    return differentiated and not small(x)


def _fits(x: Array) -> bool:
    """Whether an array of this size is cheap to write down."""
    return size(x) <= 2**20


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def softmax_of_shared(x: Array, total: Total, axis: Axes) -> Array:
    """Softmax over the axes, of exponentials that were summed for the `total`, which is not differentiated."""
    e, at_peak = scaled_exponentials(x, total.shift, axis)
    return over_total(e, total.sum * at_peak, axis)


def _softmax_of_shared_fwd(x: Array, total: Total, axis: Axes) -> tuple[Array, Array]:
    y = softmax_of_shared(x, total, axis)
    return y, y


def _softmax_of_shared_bwd(axis: Axes, y: Array, g: Array) -> tuple[Array, None]:
    return times_jacobian(certain(y), g, axis, lambda a: spread(sum_over(a, axis), axis)), None


softmax_of_shared.defvjp(_softmax_of_shared_fwd, _softmax_of_shared_bwd)


def shared_row_sums(x: Array, axis: Axes) -> RowSums:
    peak = finite(widen(maximum(x, axis)))
    e, at_peak = scaled_exponentials(widen(x), peak, axis)
    total = written_sum(e, axis)
    all_but_one = total / at_peak - 1
    # What a branch is given stays in memory. Without it XLA would make a slow loop of exponentials that have no other
    # use; with it, the gradient could not take their place.
    given = (e, at_peak) if _fits(x) else ()

    def exact(x: Array, peak: Array, all_but_one: Array, *given: Array) -> Array:
        e, at_peak = given or scaled_exponentials(widen(x), peak, axis)
        alone = sum_over(jnp.where(widen(x) >= spread(peak, axis), 0, e), axis) / at_peak
        return jnp.where(undominated(all_but_one), all_but_one, alone)

    def quick(x: Array, peak: Array, all_but_one: Array, *given: Array) -> Array:
        return all_but_one

    others = _if_dominated(all_but_one, exact, quick, x, peak, all_but_one, *given)
    # Not the total: of many that are each just too small to count beside the one, a sum one after another loses all.
    return RowSums(peak, jnp.where(total == 0, 0, 1 + others), others)


def without_mean_of_shared(
    cotangent: Callable[..., Array], x: Array, peak: Array, others: Array, axis: Axes, *operands: Array
) -> Array:
    """ȳ − p Σ ȳ, with ȳ = `cotangent(*operands)`, or 0 where a logit is −inf; with sums as in `RowSums`."""

    def counting(x: Array, *operands: Array) -> Array:
        return cotangent(*operands) * is_possible(widen(x))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_possible(x: Array, *operands: Array) -> Array:
        return sum_over(counting(x, *operands), axis)

    def of_all(x: Array, *operands: Array) -> Array:
        return sum_over(cotangent(*operands), axis)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_others(x: Array, peak: Array, g_sum: Array, *operands: Array) -> Array:
        return sum_over(counting(x, *operands) * but_maximum(widen(x), peak, axis), axis) / 2

    def of_none(x: Array, peak: Array, g_sum: Array, *operands: Array) -> Array:
        return 0 * g_sum

    if small(x):
        g_sum = of_possible(x, *operands)
    else:
        # To look for −inf takes a third of the time that it takes to multiply by what is possible.
        least = jnp.min(lax.stop_gradient(x), axis)
        g_sum = unless_all(least > -jnp.inf, of_possible, needing(of_all, 1), x, *operands)
    # It is never negative. But the library takes in no selection, and so not the product with it, for which it would
    # need p in memory.
    g_sum = jnp.where(others < 0, 0, g_sum)
    others_sum = _if_dominated(others, of_others, needing(of_none, 2), x, peak, g_sum, *operands)
    # Where no class is left the sum is 0, not 1 as here, but so is each exponential.
    p, g = softmax_of_shared(widen(x), Total(peak, 1 + others), axis), counting(x, *operands)
    at_largest = of_largest(g, p, spread(g_sum, axis), spread(others_sum, axis), spread(others, axis))
    # No number is as large as nan.
    top = jnp.where(undominated(others), jnp.nan, peak)
    return jnp.where(widen(x) >= spread(top, axis), at_largest, g - p * spread(g_sum, axis)).astype(x.dtype)


def of_largest(g: Array, p: Array, g_sum: Array, others_sum: Array, others: Array) -> Array:
    """ȳ − p Σ ȳ at the one class that has more than half, where it cancels.

    There it is ȳ (1 − p) − p Σ of the others' ȳ, and the others' share of the sum is known.
    """
    share, fixed = lax.stop_gradient((others / (1 + others), p))
    # The last term is 0, and is the derivative in p, for which Σ ȳ is whole: the two sums may cancel in it.
    return g * share - fixed * others_sum - (p - fixed) * g_sum


def _if_dominated(others: Array, exact: Callable[..., Any], quick: Callable[..., Any], x: Array, *operands: Any) -> Any:
    """`if_dominated`, but in small arrays: there a branch takes longer than what it may save."""
    return exact(x, *operands) if small(x) else if_dominated(others, exact, quick, x, *operands)

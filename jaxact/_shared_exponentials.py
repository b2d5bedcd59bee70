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
from jax import Array

from jaxact._exponentials import scaled_exponentials
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import certain, over_total, times_jacobian
from jaxact._limits import finite
from jaxact._reductions import Axes, class_by_class, few, maximum, on_cpu, size, small, spread, sum_over
from jaxact._row_sums import RowSums, Total, if_dominated, undominated, written_sum


def shares(x: Array, axis: Axes) -> bool:
    """Whether a derivative shares the exponentials of its value.

    Not of other dtypes: in 16 bits the logits have half the size, and in 64 there is no `exp_over`.
    """
    return on_cpu() and x.dtype == jnp.float32 and not class_by_class(x, axis)


def shares_sums(x: Array, t: Array | None, axis: Axes) -> bool:
    """Whether the sum over all but the largest class shares them too.

    So in arrays of up to 4 MB of float32. Of larger ones to write and read what they need takes longer than to find
    exponentials twice, in one kernel each; and so it does of few numbers, where that takes no time.
    """
    return t is None and shares(x, axis) and not few(x) and size(x) <= 2**20


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
    peak = finite(maximum(x, axis))
    e, at_peak = scaled_exponentials(x, peak, axis)
    total = written_sum(e, axis)
    all_but_one = total / at_peak - 1

    def exact(x: Array, e: Array, peak: Array, at_peak: Array, all_but_one: Array) -> Array:
        alone = sum_over(jnp.where(x >= spread(peak, axis), 0, e), axis) / at_peak
        return jnp.where(undominated(all_but_one), all_but_one, alone)

    def quick(x: Array, e: Array, peak: Array, at_peak: Array, all_but_one: Array) -> Array:
        return all_but_one

    others = _if_dominated(all_but_one, exact, quick, x, e, peak, at_peak, all_but_one)
    # Not the total: of many that are each just too small to count beside the one, a sum one after another loses all.
    return RowSums(peak, jnp.where(total == 0, 0, 1 + others), others)


def without_mean_of_shared(g: Array, x: Array, total: Total, axis: Axes) -> Array:
    """ȳ − p Σ ȳ. What of it cancels, at a class that has more than half, is minus the sum of the rest: all sum to 0."""
    p = softmax_of_shared(x, total, axis)
    # The selection changes nothing, as p is 0 there. But the library takes in no selection, and so not the product with
    # it, for which it would need p in memory.
    g_sum = jnp.where(total.sum == 0, 0, sum_over(g, axis))
    others = total.sum - 1
    # The maximum where a class has more than half. No number is as large as nan.
    top = jnp.where(undominated(others), jnp.nan, total.shift)

    def exact(x: Array, p: Array, g: Array, g_sum: Array, top: Array) -> Array:
        return sum_over(jnp.where(x >= spread(top, axis), 0, g - p * spread(g_sum, axis)), axis)

    def quick(x: Array, p: Array, g: Array, g_sum: Array, top: Array) -> Array:
        return jnp.zeros_like(g_sum)

    of_others = _if_dominated(others, exact, quick, x, p, g, g_sum, top)
    v = g - p * spread(g_sum, axis)
    return jnp.where(x >= spread(top, axis), -spread(of_others, axis), v)


def _if_dominated(others: Array, exact: Callable[..., Any], quick: Callable[..., Any], x: Array, *operands: Any) -> Any:
    """`if_dominated`, but in small arrays: there a branch takes longer than what it may save."""
    return exact(x, *operands) if small(x) else if_dominated(others, exact, quick, x, *operands)

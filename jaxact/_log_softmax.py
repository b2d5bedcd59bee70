"""log_softmax, with its rule below it, and the product with its Jacobian, which the soft labels' loss has as well."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxact._canonical import (
    Axis,
    as_float,
    canonical_axis,
    canonical_temperature,
    masked,
    optional_array,
    require_array,
    static_axis,
    widen,
)
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import uncontracted
from jaxact._limits import is_possible
from jaxact._reductions import Axes, at_once, maximum, spread, sum_over
from jaxact._row_sums import RowSums, below, but_maximum, if_dominated, row_sums, undominated
from jaxact._shared_exponentials import of_largest, shared_row_sums, shares_sums, without_mean_of_shared
from jaxact._softmax import _softmax, softmax_of_sums, temperature_of


def log_softmax(
    x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Array:
    """Logarithm of the softmax, xᵢ/T − log Σⱼ e^{xⱼ/T}, over one axis or several.

    Args:
        x: logits, an array of any shape; real. Integers and bools become the default float.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `x`. False means that this class does not exist.
        temperature: T > 0, a scalar. May be traced and differentiated; a traced T ≤ 0 gives nan.

    Returns:
        Log-probabilities ≤ 0 with the shape and dtype of `x`; −inf for a class that is masked or has logit −inf.
        Logits of +inf share the row equally; beside them the largest finite number counts as one, but not that of 16
        bits. A nan makes its own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = (ȳ − p Σ ȳ)/T with p = softmax(x/T), and T̄ = −Σ x̄ log p. Where a logit is −inf, a finite ȳ counts as 0.
        Reverse mode keeps `x`, up to three numbers for each row, and the mask.

    Numerics:
        At most 12 ulp in float32 at logit scale 30, also near 0: log1p of the other classes' sum and not the log of the
        whole. What each of n classes has below the least normal number may be lost of that sum, so this holds down to
        n·2⁻¹⁰²; and XLA's sums of a row may lose more, as `softmax` says: 16 ulp have been seen.
        The gradient is within 8·u·Σⱼ|Jᵢⱼ||ȳⱼ| of each element at that scale and within 10 at any, the pushforward,
        which ends in a sum, within 20, but for the sums that `softmax` speaks of. 16-bit types are computed in float32
        and rounded once. Held by `tests/test_softmax*.py`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxact
        >>> x = jnp.array([20.0, 0.0])
        >>> print(f"{jaxact.log_softmax(x)[0]:.4e}, {jax.nn.log_softmax(x)[0]:.4e}")
        -2.0612e-09, 0.0000e+00

    References:
        jax issues 40384, 40409, 19490 and 23842.
    """
    if where is None and type(axis) is int and type(temperature) is float and temperature == 1:
        # Most calls, which `jax.nn` has compiled too: eagerly the checks of what is not given take a tenth of the time.
        return _log_softmax_of_any(require_array("x", x), axis, None, None)
    where = optional_array("where", where)
    return _log_softmax_of_any(require_array("x", x), static_axis(axis), where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _log_softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis(axis, x.ndim)
    y, _ = _log_softmax(masked(x, where, -math.inf), temperature_of(x, temperature), axes, False)
    return masked(y, where, -math.inf)  # as in softmax


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_softmax(x: Array, t: Array | None, axis: Axes, differentiated: bool) -> tuple[Array, RowSums]:
    """Log-softmax over the axes, and the sums it is made of, as constants."""
    shared = shares_sums(x, t, axis, differentiated)
    sums = shared_row_sums(x, axis) if shared else row_sums(x, t, axis)
    # Behind a barrier, as in `softmax_of_sums`: XLA would otherwise write down what the sums have found already, wide.
    # Not in one kernel, which it would part.
    again, peak = (x, sums.peak) if shared or at_once(x, axis) else lax.optimization_barrier((x, sums.peak))
    d = below(peak, widen(again), axis)
    # Beside +inf every other class is impossible. d is 0 or at least an ulp of the largest number, so the product
    # is 0 or −inf. (The excess is 0 or infinite. A maximum by 1 beside the minimum would be a clip, as in `between`.)
    largest = float(jnp.finfo(d.dtype).max)
    excess = jnp.maximum(widen(maximum(x, axis)), -largest) - peak
    d = d * spread(jnp.minimum(1 + excess, largest), axis)
    return ((d if t is None else d / t) - spread(jnp.log1p(sums.others), axis)).astype(x.dtype), sums


def _log_softmax_fwd(x: Array, t: Array | None, axis: Axes, _: bool) -> Any:
    y, sums = _log_softmax(x, t, axis, True)
    return (y, sums), (x, t, kept_sums(x, sums, axis, shares_sums(x, t, axis, True)))


def _log_softmax_bwd(axis: Axes, _: bool, residuals: Any, cotangents: Any) -> Any:
    x, t, sums = residuals
    v = without_mean(widen, x, t, sums, axis, cotangents[0], shared=shares_sums(x, t, axis, True))
    if t is None:
        return v, None
    log_p = _log_softmax(widen(x), t, axis, False)[0]
    possible = log_p > -jnp.inf
    t_bar = -jnp.sum(jnp.where(possible, v * jnp.where(possible, log_p, 0), 0)) / t
    return (v / t).astype(x.dtype), t_bar


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def kept_sums(x: Array, sums: RowSums, axis: Axes, shared: bool) -> Any:
    """What `without_mean` needs of the sums."""
    if shared:
        return sums.peak, sums.others
    return None if at_once(x, axis) else sums


def without_mean(
    cotangent: Callable[..., Array],
    x: Array,
    t: Array | None,
    sums: Any,
    axis: Axes,
    *operands: Array,
    shared: bool = False,
    all_count: bool = False,
) -> Array:
    """ȳ − p Σ ȳ, with ȳ = `cotangent(*operands)`, wide; in the dtype of x if t is None.

    The log p of a logit of −inf is constant, and its ȳ does not count, but where it is known that `all_count`. `sums`
    are what is kept of them: None where all is done at once (`at_once`); of exponentials that may be `shared`.

    What a branch is given is written to memory: the operands and not ȳ, which is made of them inside.
    """
    if shared:
        peak, others = sums
        return without_mean_of_shared(cotangent, x, peak, others, axis, *operands)
    result = x.dtype if t is None else widen(x).dtype

    def counting(x: Array, *operands: Array) -> Array:
        g = cotangent(*operands)
        return g if all_count else g * is_possible(x)

    # At a class that has more than half, ȳ − p Σ ȳ cancels, and nothing is left of 1 − p where p rounds to 1.
    def once(p: Array, g: Array) -> Array:
        return g - p * spread(sum_over(g, axis), axis)

    if sums is None:
        # The Jacobian is I − 1 pᵀ. It is a projection, and so applying it twice changes nothing; but what v = ȳ − p Σ ȳ
        # lost to rounding at the largest probability is Σ v, and the second time takes it off.
        # In one kernel, all of it again: what another has found would part this one, hence the barrier.
        x = widen(lax.optimization_barrier(x))
        p = _softmax(x, t, axis, True)
        v = once(p, uncontracted(counting(x, *operands), p, axis))
        return uncontracted(v - p * spread(sum_over(v, axis), axis), p, axis).astype(result)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def quick(x: Array, t: Array | None, sums: RowSums, *operands: Array) -> Array:
        x = widen(x)
        p = softmax_of_sums(x, t, sums, axis, jnp.exp)
        return uncontracted(once(p, uncontracted(counting(x, *operands), p, axis)), p, axis).astype(result)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def exact(x: Array, t: Array | None, sums: RowSums, *operands: Array) -> Array:
        x = widen(x)
        p = softmax_of_sums(x, t, sums, axis, jnp.exp)
        g = uncontracted(counting(x, *operands), p, axis)
        is_other = jnp.maximum(
            but_maximum(x, sums.peak, axis) / 2, spread(jnp.where(undominated(sums.others), 1.0, 0.0), axis)
        )
        total, of_others = (spread(sum_over(a, axis), axis) for a in (g, g * is_other))
        at_largest = of_largest(g, p, total, of_others, spread(sums.others, axis))
        v = (g - p * total) * is_other + at_largest * (1 - is_other)
        return uncontracted(v, p, axis).astype(result)

    return if_dominated(sums.others, exact, quick, x, t, sums, *operands)

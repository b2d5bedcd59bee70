"""softmax and log_softmax, each with its rule below it."""

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
    divisor,
    masked,
    require_array,
    require_arrays,
    static_axis,
    widen,
)
from jaxact._classes import vary, varying
from jaxact._elementary import exp
from jaxact._exponentials import (
    RowSums,
    Sums,
    at_most,
    below,
    but_maximum,
    certain,
    divided_by_total,
    exponentials,
    if_dominated,
    is_possible,
    maximum_and_total,
    over_total,
    row_sums,
    shift_about,
    times_jacobian,
    total_unshifted,
    undominated,
    unless_all,
)
from jaxact._forward_mode import forward_mode
from jaxact._reductions import Axes, at_once, class_by_class, class_count, maximum, size, spread, sum_over
from jaxact._shared_exponentials import shared_row_sums, shares_sums, without_mean_of_shared


def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0) -> Array:
    """Softmax, e^{xᵢ/T} / Σⱼ e^{xⱼ/T}, over one axis or several.

    Args:
        x: logits, an array of any shape; real. Integers and bools become the default float.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `x`. False means that this class does not exist.
        temperature: T > 0, a scalar. May be traced and differentiated; a traced T ≤ 0 gives nan.

    Returns:
        Probabilities with the shape and dtype of `x`, summing to 1 over `axis`. Exactly 0 for a class that is masked
        or has logit −inf; all 0 where no class is left. Logits of +inf share the row equally; beside
        them the largest finite number counts as one. A nan makes its own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = y ⊙ (ȳ − ⟨ȳ, y⟩)/T and T̄ = −Σ x̄ log y. Reverse mode keeps `y`, and the mask; for float16 it keeps `x`
        instead, since a small `y` has few digits there, or none.

    Numerics:
        At most 6 ulp in float32 at logit scale 30 and T = 1; there the gradient is within 8·u·Σⱼ|Jᵢⱼ||ȳⱼ| of each
        element, and any derivative within 20, also where one probability rounds to 1 (`jax.nn.softmax` loses that
        entry) or ȳ has a large common offset.
        Both rest on XLA's sum of a row. On CPU it adds up to 32 numbers one after another in arrays of less than 2¹⁵,
        and where all but one of them are just too small to count, as in [16.6, 0, 0, …], it is off by up to 60 u.
        16-bit types are computed in float32 and rounded once. Held by `tests/test_softmax*.py`.

    Example:
        >>> import jax.numpy as jnp, jaxact
        >>> print(" ".join(f"{p:.3e}" for p in jaxact.softmax(jnp.array([-20.0, 10.0, 30.0]))))
        1.929e-22 2.061e-09 1.000e+00
        >>> jaxact.softmax(jnp.array([1.0, jnp.nan, 1.0]), where=jnp.array([True, False, True]))
        Array([0.5, 0. , 0.5], dtype=float32)

    References:
        jax issues 40386, 40344, 37234, 17117 and 13529.
    """
    require_arrays(where=where)
    return _softmax_of_any(require_array("x", x), static_axis(axis), where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis(axis, x.ndim)
    y = _softmax(masked(x, where, -math.inf), _divisor(temperature, x), None, axes, False)
    return masked(y, where, 0)  # for derivatives: so that not even a cotangent of nan counts at what is masked


def _divisor(temperature: ArrayLike | None, x: Array) -> Array | None:
    """The temperature, with a cotangent of its own on every device that has logits of its own."""
    t = divisor(temperature, x)
    return None if t is None else vary(t, varying(x))


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _softmax(x: Array, t: Array | None, sums: Sums | None, axis: Axes, summed: bool) -> Array:
    """Softmax over the axes. `sums`, where they are known, save finding them; they are not differentiated.

    Our own exponential takes less time than XLA's, but not in what is then `summed`.
    """
    if t is None and all(x.shape[a] == 1 for a in axis):
        # One class takes everything, exactly: e·(1/e), as XLA divides, can round to less than 1.
        return jnp.where(jnp.isnan(x), x, (x > -jnp.inf).astype(x.dtype))

    divides = _divides(x, t, axis, summed)

    def about_maximum(x: Array, _: Any) -> Array:
        sums, _, e = maximum_and_total(x, t, axis)
        return (divided_by_total if divides else over_total)(e, sums.total, axis).astype(x.dtype)

    # XLA has more than one exponential on CPU, and we have ours: beside a sum of another, one may exceed the whole.
    def about_zero(x: Array, total: Array) -> Array:
        return jnp.minimum(exp(widen(x)) / spread(total, axis), 1).astype(x.dtype)

    if sums is not None:
        # Behind a barrier, XLA computes the exponentials again and does not keep them from where the sums were found.
        shift, total = lax.optimization_barrier((shift_about(sums.peak, t, class_count(x, axis)), sums.total))
        e = exponentials(widen(x), shift, t, axis, jnp.exp if summed else exp)
        return over_total(at_most(spread(total, axis), e), total, axis).astype(x.dtype)
    if divides or at_once(x, axis):
        return about_maximum(x, None)  # to find it takes less time than a branch
    total, in_range = total_unshifted(x, axis)
    return unless_all(in_range, about_maximum, about_zero, x, total)


def _divides(x: Array, t: Array | None, axis: Axes, summed: bool) -> bool:
    """Whether what takes everything is exactly 1, by a division. Its time is won back where none need be `certain`."""
    if at_once(x, axis):
        # Of few classes the value has it for little. In one kernel it takes less time than `certain`.
        return class_by_class(x, axis) != summed
    return t is not None or summed or size(x) < 2**17


def _certain(y: Array, t: Array | None, axis: Axes, summed: bool) -> Array:
    """Probabilities for a derivative, of which what takes everything is 1."""
    return y if _divides(y, t, axis, summed) else certain(y)


def _softmax_fwd(x: Array, t: Array | None, sums: Sums | None, axis: Axes, summed: bool) -> Any:
    y = _softmax(x, t, sums, axis, summed)
    # Of a probability below 6e-5 float16 keeps fewer digits, and below 3e-8 none; but its cotangent may be large.
    # With known sums it is never divided, and the backward pass cannot tell, since it is not given them.
    kept = x if y.dtype == jnp.float16 else y if sums is None else certain(y)
    return y, (kept, t)


def _softmax_bwd(axis: Axes, summed: bool, residuals: Any, g: Array) -> Any:
    kept, t = residuals
    dtype = kept.dtype
    y = _softmax(widen(kept), t, None, axis, summed) if dtype == jnp.float16 else widen(kept)
    y = _certain(y, t, axis, summed)
    z = times_jacobian(y, widen(g), lambda a: spread(sum_over(a, axis), axis))
    if t is None:
        return z.astype(dtype), None, None
    # Σ z̄ = 0, so the logits in T̄ = −Σ z̄ x/T² may be shifted, and T log y is a shift of x.
    log_y = jnp.log(jnp.where(y > 0, y, 1))
    return (z / t).astype(dtype), -jnp.sum(z * log_y) / t, None


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


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
        Logits of +inf share the row equally; beside them the largest finite number counts as one. A nan makes its
        own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = (ȳ − p Σ ȳ)/T with p = softmax(x/T), and T̄ = −Σ x̄ log p. Where a logit is −inf, a finite ȳ counts as 0.
        Reverse mode keeps `x`, up to three numbers for each row, and the mask.

    Numerics:
        At most 12 ulp in float32 at logit scale 30, however near 0 the result: log1p of the other classes' sum and not
        the log of the whole.
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
    require_arrays(where=where)
    return _log_softmax_of_any(require_array("x", x), static_axis(axis), where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _log_softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis(axis, x.ndim)
    y, _ = _log_softmax(masked(x, where, -math.inf), _divisor(temperature, x), axes, False)
    return masked(y, where, -math.inf)  # as in softmax


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_softmax(x: Array, t: Array | None, axis: Axes, differentiated: bool) -> tuple[Array, RowSums]:
    """Log-softmax over the axes, and the sums it is made of, as constants."""
    shared = differentiated and shares_sums(x, t, axis)
    sums = shared_row_sums(x, axis) if shared else row_sums(x, t, axis)
    # Behind a barrier, as in softmax: XLA would otherwise write down what the sums have found already, wide. Not in one
    # kernel, which it would part.
    again, peak = (x, sums.peak) if shared or at_once(x, axis) else lax.optimization_barrier((x, sums.peak))
    d = below(peak, widen(again), axis)
    # Beside +inf every other class is impossible. d is 0 or at least an ulp of the largest number, so the product
    # is 0 or −inf. (The excess is 0 or infinite. A maximum by 1 beside the minimum would be a clip, as in `between`.)
    largest = float(jnp.finfo(d.dtype).max)
    excess = jnp.maximum(widen(maximum(x, axis)), -largest) - peak
    d = d * spread(jnp.minimum(1 + excess, largest), axis)
    return ((d if t is None else d / t) - spread(jnp.log1p(sums.others), axis)).astype(x.dtype), sums


def _log_softmax_fwd(x: Array, t: Array | None, axis: Axes, differentiated: bool) -> Any:
    y, sums = _log_softmax(x, t, axis, True)
    return (y, sums), (x, t, kept_sums(x, t, sums, axis))


def _log_softmax_bwd(axis: Axes, differentiated: bool, residuals: Any, cotangents: Any) -> Any:
    x, t, sums = residuals
    v = without_mean(widen, x, t, sums, axis, cotangents[0])
    if t is None:
        return v, None
    log_p = _log_softmax(widen(x), t, axis, False)[0]
    possible = log_p > -jnp.inf
    t_bar = -jnp.sum(jnp.where(possible, v * jnp.where(possible, log_p, 0), 0)) / t
    return (v / t).astype(x.dtype), t_bar


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def kept_sums(x: Array, t: Array | None, sums: RowSums, axis: Axes) -> Any:
    """What `without_mean` needs of the sums."""
    if shares_sums(x, t, axis):
        return Sums(sums.peak, sums.total)
    return None if at_once(x, axis) else sums


def without_mean(
    cotangent: Callable[..., Array],
    x: Array,
    t: Array | None,
    sums: Any,
    axis: Axes,
    *operands: Array,
    all_count: bool = False,
) -> Array:
    """ȳ − p Σ ȳ, with ȳ = `cotangent(*operands)`, wide; in the dtype of x if t is None.

    The log p of a logit of −inf is constant, and its ȳ does not count, but where it is known that `all_count`. `sums`
    are what is kept of them: None where all is done at once (`at_once`).

    What a branch is given is written to memory: the operands and not ȳ, which is made of them inside.
    """
    result = x.dtype if t is None else widen(x).dtype

    def counting(x: Array, *operands: Array) -> Array:
        g = cotangent(*operands)
        return g if all_count else g * is_possible(x)

    if isinstance(sums, Sums):
        return without_mean_of_shared(counting(x, *operands), x, sums, axis)

    # At a class that has more than half, ȳ − p Σ ȳ cancels, and nothing is left of 1 − p where p rounds to 1.
    def once(p: Array, g: Array) -> Array:
        return g - p * spread(sum_over(g, axis), axis)

    if sums is None:
        # The Jacobian is I − 1 pᵀ. It is a projection, and so applying it twice changes nothing; but what v = ȳ − p Σ ȳ
        # lost to rounding at the largest probability is Σ v, and the second time takes it off.
        # In one kernel, all of it again: what another has found would part this one, hence the barrier.
        x = widen(lax.optimization_barrier(x))
        p = _certain(_softmax(x, t, None, axis, True), t, axis, True)
        v = once(p, counting(x, *operands))
        return (v - p * spread(sum_over(v, axis), axis)).astype(result)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def quick(x: Array, t: Array | None, sums: RowSums, *operands: Array) -> Array:
        x = widen(x)
        p = _softmax(x, t, Sums(sums.peak, sums.total), axis, True)
        return once(p, counting(x, *operands)).astype(result)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def exact(x: Array, t: Array | None, sums: RowSums, *operands: Array) -> Array:
        x = widen(x)
        p, g = _softmax(x, t, Sums(sums.peak, sums.total), axis, True), counting(x, *operands)
        # There it is ȳ (1 − p) − p Σ of the others' ȳ, and the others' share of the sum is known.
        is_other = jnp.maximum(
            but_maximum(x, sums.peak, axis) / 2, spread(jnp.where(undominated(sums.others), 1.0, 0.0), axis)
        )
        total, of_others = (spread(sum_over(a, axis), axis) for a in (g, g * is_other))
        share, fixed = lax.stop_gradient((spread(sums.others / (1 + sums.others), axis), p))
        # The last term is 0, and is the derivative in p, for which Σ ȳ is whole: the two sums may cancel in it.
        of_largest = g * share - fixed * of_others - (p - fixed) * total
        v = (g - p * total) * is_other + of_largest * (1 - is_other)
        return v.astype(result)

    return if_dominated(sums.others, exact, quick, x, t, sums, *operands)

"""logsumexp, with and without weights, each with its rule below it."""

import functools
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxact._branches import unless_all
from jaxact._canonical import (
    Axis,
    as_float,
    canonical_axis,
    canonical_bool,
    masked,
    optional_array,
    require_array,
    static_axis,
    widen,
)
from jaxact._classes import alike
from jaxact._elementary import exp
from jaxact._exponentials import UNSHIFTED, scaled_exponentials
from jaxact._forward_mode import forward_mode
from jaxact._limits import finite
from jaxact._reductions import Axes, maximum, small, spread, sum_over
from jaxact._row_sums import Sums, Total, below, but_maximum, row_sums, total_unshifted, undominated, written_sum
from jaxact._shared_exponentials import shares, softmax_of_shared
from jaxact._softmax import softmax_of_sums


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = ...,
    b: ArrayLike | None = ...,
    keepdims: bool = ...,
    return_sign: Literal[False] = ...,
    where: ArrayLike | None = ...,
) -> Array: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = ...,
    b: ArrayLike | None = ...,
    keepdims: bool = ...,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = ...,
) -> tuple[Array, Array]: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = ...,
    b: ArrayLike | None = ...,
    keepdims: bool = ...,
    return_sign: bool = ...,
    where: ArrayLike | None = ...,
) -> Array | tuple[Array, Array]: ...
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Array | tuple[Array, Array]:
    """log Σᵢ bᵢ e^{aᵢ} over one axis or several, a full replacement for `jax.nn.logsumexp` of real numbers.

    Args:
        a: exponents, an array of any shape; real. Integers and bools become the default float.
        axis: the axis or axes to sum over: an int, a tuple of ints, or None for all.
        b: weights, which may be 0 or negative; broadcast against `a`. Default: 1.
        keepdims: keep the reduced axes with length 1.
        return_sign: return the pair (log|Σ|, sign of Σ). Without it a negative sum gives nan.
        where: boolean, broadcastable to the shape of `a`. False means that this term does not exist.

    Returns:
        The logarithm, with the dtype of `a` (promoted with `b`); or the pair of logarithm and sign. −inf, and sign 0,
        for a sum that is empty or exactly 0. A term with b = 0 does not count, whatever its exponent.

    Raises:
        TypeError: if `a` or `b` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` or `b` does not broadcast.

    Derivative:
        ā = ḡ softmax(a); with weights āᵢ = ḡ s bᵢ e^{aᵢ−out} and b̄ᵢ = ḡ s e^{aᵢ−out}, s the sign, also at bᵢ = 0.
        0 where the sum is empty. Reverse mode keeps `a` and two numbers for each sum, with weights `a`, `b` and four,
        its sign, and the mask.

    Numerics:
        m + log1p(Σ of the others) with m the maximum, so that logsumexp([0, −20]) is 2.06e-9 and not 0; on CPU, of more
        than 2048 numbers without a gradient, log Σ where all sums are between e and e⁶³, which needs no maximum.
        With `b`, terms whose exponent is 87 or more (708 in float64) below the largest of those with b ≠ 0 are lost,
        whatever the weights, and Σ |bᵢ| e^{aᵢ−m} must be finite. The gradient is as accurate as the sum: see `softmax`.
        16-bit types are computed in float32 and rounded once. Held by `tests/test_logsumexp.py`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxact
        >>> a = jnp.array([0.0, -20.0])
        >>> print(f"{jaxact.logsumexp(a):.4e}, {jax.nn.logsumexp(a):.4e}")
        2.0612e-09, 0.0000e+00
        >>> jax.grad(lambda b: jaxact.logsumexp(jnp.zeros(2), b=b))(jnp.array([1.0, 0.0]))
        Array([1., 1.], dtype=float32)

    References:
        jax issues 6811 and 22398.
    """
    b, where = optional_array("b", b), optional_array("where", where)
    keepdims, return_sign = canonical_bool("keepdims", keepdims), canonical_bool("return_sign", return_sign)
    return _logsumexp_of_any(require_array("a", a), static_axis(axis), b, keepdims, return_sign, where)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _logsumexp_of_any(
    a: ArrayLike, axis: Axis, b: ArrayLike | None, keepdims: bool, return_sign: bool, where: ArrayLike | None
) -> Any:
    if b is None:
        a = as_float("a", a)
    else:
        given, a, b = (a, b), as_float("a", a), as_float("b", b)
        # Integers and masks leave the other's dtype.
        floats = [x for x, was in zip((a, b), given, strict=True) if jnp.issubdtype(jnp.result_type(was), jnp.floating)]
        dtype = jnp.result_type(*floats or (a,))
        try:
            a, b = jnp.broadcast_arrays(a.astype(dtype), b.astype(dtype))
        except ValueError:
            raise ValueError(f"b must broadcast against a, of shape {a.shape}, got shape {b.shape}.") from None
    axes = canonical_axis(axis, a.ndim)
    x = masked(a, where, -math.inf)
    if b is None:
        out, _ = _logsumexp(x, axes, False)
        # The sum of exponentials is positive, 0 where it is empty and nan where it is nan.
        fixed = lax.stop_gradient(out)
        sign = jnp.where(jnp.isnan(fixed), fixed, (fixed > -jnp.inf).astype(fixed.dtype))
    else:
        x, weights = alike(x, masked(b, where, 0))
        out, sign = _weighted_logsumexp(x, weights, axes)
        if not return_sign:
            out = jnp.where(sign < 0, jnp.nan, out)
    if keepdims:
        out, sign = spread(out, axes), spread(sign, axes)
    return (out, sign) if return_sign else out


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _logsumexp(x: Array, axis: Axes, differentiated: bool) -> tuple[Array, tuple[Array, Array]]:
    """The logarithm of the sum of exponentials over the axes, and what its derivative needs of it, as constants.

    That is a `Total` about the maximum where exponentials are shared with the derivative, and else `Sums`.
    """
    if differentiated and _shares(x, axis):
        return _of_shared(x, axis)

    def about_maximum(x: Array, total: Array, log_total: Array) -> tuple[Array, Sums]:
        top = widen(maximum(x, axis))
        sums = row_sums(x, None, axis, functools.partial(_settled, top), try_unshifted=False)
        return top + jnp.log1p(sums.others), Sums(sums.peak, sums.total)

    def about_zero(x: Array, total: Array, log_total: Array) -> tuple[Array, Sums]:
        return log_total, Sums(jnp.full_like(total, UNSHIFTED), total)

    total, in_range = total_unshifted(x, axis)
    log_total = jnp.log(total)
    # As in `_settled`.
    out, sums = unless_all(in_range & (log_total > 1), about_maximum, about_zero, x, total, log_total)
    return out.astype(x.dtype), (sums.peak, sums.total)


def _shares(x: Array, axis: Axes) -> bool:
    """Whether the derivative shares exponentials; of 16 bits in small arrays, since others it finds as quickly anew."""
    return shares(x, axis) and (x.dtype == jnp.float32 or small(x))


def _of_shared(x: Array, axis: Axes) -> tuple[Array, tuple[Array, Array]]:
    """The same where its exponentials are shared with the derivative."""
    top = widen(maximum(x, axis))
    peak = finite(top)
    e, at_peak = scaled_exponentials(widen(x), peak, axis)
    total = written_sum(e, axis) / at_peak
    others = total - 1

    def exact(x: Array, peak: Array, others: Array) -> Array:
        alone = sum_over(jnp.exp(below(peak, widen(x), axis)) * but_maximum(widen(x), peak, axis), axis) / 2
        return jnp.where(undominated(others), others, alone)

    # Not of the exponentials, or they would be kept, and what the derivative makes of them not made in place.
    others = unless_all(_settled(top, others), exact, lambda x, peak, others: others, x, peak, others)
    return (top + jnp.log1p(others)).astype(x.dtype), (peak, total)


def _settled(top: Array, others: Array) -> Array:
    """Whether it does not count in the logarithm what the sum of the others has lost beside 1: near 0 it does."""
    return undominated(others) | (jnp.abs(top + jnp.log1p(others)) > 1)


def _logsumexp_fwd(x: Array, axis: Axes, differentiated: bool) -> Any:
    out, kept = _logsumexp(x, axis, True)
    return (out, kept), (x, kept)


def _logsumexp_bwd(axis: Axes, differentiated: bool, residuals: Any, cotangents: Any) -> tuple[Array]:
    x, kept = residuals
    if _shares(x, axis):
        p = softmax_of_shared(widen(x), Total(*kept), axis)
    else:
        # Not a probability of 16 bits: the product is rounded once. Behind a barrier, as in `softmax_of_sums`, to be
        # widened again.
        p = softmax_of_sums(widen(lax.optimization_barrier(x)), None, Sums(*kept), axis, exp)
    return ((spread(widen(cotangents[0]), axis) * p).astype(x.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


def _weighted_logsumexp(a: Array, b: Array, axis: Axes) -> tuple[Array, Array]:
    # Terms of weight 0 are left out before the maximum is taken: however large, they must not scale the rest away.
    top = lax.stop_gradient(maximum(jnp.where(b == 0, -jnp.inf, widen(a)), axis))
    log_total, sign = _log_total(a, b, finite(top), axis)
    return (top + log_total).astype(a.dtype), sign.astype(a.dtype)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_total(a: Array, b: Array, peak: Array, axis: Axes) -> tuple[Array, Array]:
    """log|Σ b e^{a − peak}| and the sign of the sum, in float32 or wider. The peak is a constant."""
    b, shift = widen(b), spread(peak, axis)
    a = _counting(widen(a), b, shift)
    at_peak = (b != 0) & (jnp.minimum(a, shift) == shift)
    # Of every term, also where it is known to be 0 or b: who leaves out the rule finds the derivative in this.
    terms = b * _bounded_exp(a - shift)
    others = jnp.sum(jnp.where(at_peak, 0, terms), axis)
    weight_at_peak = jnp.sum(jnp.where(at_peak, terms, 0), axis)
    total = others + weight_at_peak
    # As without weights, log1p of what differs from 1 where the sum is near 1.
    excess = others + (weight_at_peak - 1)
    near_one = jnp.abs(excess) < 0.5
    log_total = jnp.where(near_one, jnp.log1p(jnp.where(near_one, excess, 0)), jnp.log(jnp.abs(total)))
    return log_total, jnp.sign(total)


def _counting(a: Array, b: Array, shift: Array) -> Array:
    """The exponents. One of weight 0 does not count, though it be nan; those of +inf share the row by weight."""
    return jnp.where((b == 0) & jnp.isnan(a), -jnp.inf, jnp.where((b != 0) & (a == jnp.inf), shift, a))


@jax.custom_jvp
def _weighted_exp(b: Array, d: Array) -> Array:
    """b e^d."""
    return b * _bounded_exp(d)


@_weighted_exp.defjvp
def _weighted_exp_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # In an order in which a large exponential has met a weight of 0 before it is multiplied by anything.
    (b, d), (b_dot, d_dot) = primals, tangents
    product = _weighted_exp(b, d)
    return product, b_dot * _bounded_exp(d) + product * d_dot


def _bounded_exp(d: Array) -> Array:
    """e^d, of which 0 times is 0: where it overflows, a large number and not infinity."""
    most = math.floor(math.log(float(jnp.finfo(d.dtype).max)))
    return jnp.exp(jnp.where(d > most, most, d))


def _log_total_fwd(a: Array, b: Array, peak: Array, axis: Axes) -> Any:
    log_total, sign = _log_total(a, b, peak, axis)
    return (log_total, sign), (a, b, peak, log_total, sign)


def _log_total_bwd(axis: Axes, residuals: Any, cotangents: Any) -> Any:
    a, b, *of_rows = residuals
    dtype = a.dtype
    a, b = widen(a), widen(b)
    shift, log_total, sign, g = (spread(r, axis) for r in (*of_rows, cotangents[0]))
    a = _counting(a, b, shift)
    # Beside infinity the shares are constant.
    log_total = jnp.where(shift >= float(jnp.finfo(a.dtype).max), lax.stop_gradient(log_total), log_total)
    # ∂/∂b = s e^{a − peak − log_total}, 0 where the sum is. It overflows at a weight of 0 alone, where ā is 0.
    empty = jnp.isinf(log_total)
    d = jnp.where(empty, -jnp.inf, (a - shift) - jnp.where(empty, 0, log_total))
    b_bar = g * sign * _bounded_exp(d)
    a_bar = (g * sign) * _weighted_exp(b, d)
    return a_bar.astype(dtype), b_bar.astype(dtype), None


_log_total.defvjp(_log_total_fwd, _log_total_bwd)

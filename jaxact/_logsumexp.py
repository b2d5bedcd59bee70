"""logsumexp, with and without weights, each with its rule below it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxact._canonical import Axis, as_float, canonical_axis, masked, require_array, rounded_once, static_axis, widen
from jaxact._exponentials import (
    UNSHIFTED,
    Axes,
    Sums,
    finite,
    maximum,
    row_sums,
    spread,
    total_unshifted,
    unless_all,
)
from jaxact._forward_mode import forward_mode
from jaxact._softmax import _softmax


def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Any:
    """log Σᵢ bᵢ e^{aᵢ} over one axis or several, a full replacement for `jax.nn.logsumexp`.

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
        0 where the sum is empty. Reverse mode keeps `a` and two numbers for each sum; with weights `a`, `b` and two.

    Numerics:
        m + log1p(Σ of the others) with m the maximum, so that logsumexp([0, −20]) is 2.06e-9 and not 0; on CPU, log Σ
        where all sums are between e and e⁶³, for which no maximum need be found. With `b`, terms whose exponent is 87
        or more (708 in float64) below the largest of those with b ≠ 0 are lost, whatever the weights.
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
    if b is not None:
        require_array("b", b)
    return _logsumexp_of_any(require_array("a", a), static_axis(axis), b, keepdims, return_sign, where)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _logsumexp_of_any(
    a: ArrayLike, axis: Axis, b: ArrayLike | None, keepdims: bool, return_sign: bool, where: ArrayLike | None
) -> Any:
    a = as_float("a", a)
    if b is not None:
        b = as_float("b", b)
        dtype = jnp.promote_types(a.dtype, b.dtype)
        try:
            a, b = jnp.broadcast_arrays(a.astype(dtype), b.astype(dtype))
        except ValueError:
            raise ValueError(f"b must broadcast against a, of shape {a.shape}, got shape {b.shape}.") from None
    axes = canonical_axis(axis, a.ndim)
    x = masked(a, where, -math.inf)
    if b is None:
        out, _ = _logsumexp(x, axes)
        # The sum of exponentials is positive, 0 where it is empty and nan where it is nan.
        fixed = lax.stop_gradient(out)
        sign = jnp.where(jnp.isnan(fixed), fixed, (fixed > -jnp.inf).astype(fixed.dtype))
    else:
        out, sign = _weighted_logsumexp(x, masked(b, where, 0), axes)
        if not return_sign:
            out = jnp.where(sign < 0, jnp.nan, out)
    if keepdims:
        out, sign = spread(out, axes), spread(sign, axes)
    return (out, sign) if return_sign else out


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _logsumexp(x: Array, axis: Axes) -> tuple[Array, Sums]:
    """The logarithm of the sum of exponentials over the axes, and the sums it is made of, as constants."""

    def about_maximum(x: Array, total: Array, log_total: Array) -> tuple[Array, Sums]:
        sums = row_sums(x, None, axis)
        return widen(maximum(x, axis)) + jnp.log1p(sums.others), Sums(sums.peak, sums.total)

    def about_zero(x: Array, total: Array, log_total: Array) -> tuple[Array, Sums]:
        return log_total, Sums(jnp.full_like(total, UNSHIFTED), total)

    total, in_range = total_unshifted(x, axis)
    log_total = jnp.log(total)
    # Near 0, the logarithm lacks what the sum has lost beside 1.
    out, sums = unless_all(in_range & (log_total > 1), about_maximum, about_zero, x, total, log_total)
    return out.astype(x.dtype), sums


def _logsumexp_fwd(x: Array, axis: Axes) -> Any:
    out, sums = _logsumexp(x, axis)
    return (out, sums), (x, sums)


def _logsumexp_bwd(axis: Axes, residuals: Any, cotangents: Any) -> tuple[Array]:
    x, sums = residuals
    # Not a probability of 16 bits: the product is rounded once. Behind a barrier, as in softmax, to be widened again.
    p = _softmax(widen(lax.optimization_barrier(x)), None, sums, axis, False)
    return ((spread(widen(cotangents[0]), axis) * p).astype(x.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@rounded_once
def _weighted_logsumexp(a: Array, b: Array, axis: Axes) -> tuple[Array, Array]:
    # Terms of weight 0 are left out before the maximum is taken: however large, they must not scale the rest away.
    a = jnp.where(b == 0, -jnp.inf, a)
    top = maximum(a, axis)
    peak = finite(top)
    shift = spread(peak, axis)
    at_peak = jnp.minimum(a, shift) == shift
    others = jnp.sum(jnp.where(at_peak, 0, b * jnp.exp(a - shift)), axis)
    weight_at_peak = jnp.sum(jnp.where(at_peak, b, 0), axis)
    total = others + weight_at_peak
    # As without weights, log1p of what differs from 1 where the sum is near 1.
    excess = others + (weight_at_peak - 1)
    near_one = jnp.abs(excess) < 0.5
    log_total = jnp.where(near_one, jnp.log1p(jnp.where(near_one, excess, 0)), jnp.log(jnp.abs(total)))
    return top + log_total, jnp.sign(total)


def _weighted_logsumexp_fwd(a: Array, b: Array, axis: Axes) -> Any:
    out, sign = _weighted_logsumexp(a, b, axis)
    return (out, sign), (a, b, out, sign)


def _weighted_logsumexp_bwd(axis: Axes, residuals: Any, g: Any) -> Any:
    a, b, out, sign = residuals
    dtype = a.dtype
    a, b = widen(a), widen(b)
    out, sign, g_out = (spread(widen(a), axis) for a in (out, sign, g[0]))
    # ∂out/∂b = s e^{a − out}. A sum that is empty has no derivative, and exponents of +inf share the row by weight.
    # Both are left out of the difference too: infinity less infinity has no second derivative.
    unknown = jnp.isinf(out)
    infinite = (a == jnp.inf) & (b != 0)
    share = spread(1 / jnp.abs(jnp.sum(jnp.where(infinite, b, 0), axis)), axis)
    known = jnp.exp(jnp.where(unknown, -jnp.inf, a) - jnp.where(unknown, 0, out))
    ratio = jnp.where(infinite & (out == jnp.inf), share, known)
    b_bar = g_out * sign * ratio
    # A term of weight 0 does not count, however large its exponent; but ∂ā/∂b is not 0 there.
    a_bar = g_out * sign * b * jnp.where((b == 0) & ~jnp.isfinite(ratio), 0, ratio)
    return a_bar.astype(dtype), b_bar.astype(dtype)


_weighted_logsumexp.defvjp(_weighted_logsumexp_fwd, _weighted_logsumexp_bwd)

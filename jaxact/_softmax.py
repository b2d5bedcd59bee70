"""softmax, log_softmax and logsumexp, each with its rule below it, and the one home of the shift by the maximum.

Inside, a masked class is a logit of −inf, `axis` is a sorted tuple, and reductions keep their dimensions. Masks and
limits are written as arithmetic (minimum, maximum, multiplication) and not as `where`: on CPU a boolean inside a
reduction keeps XLA from vectorising it, which makes the sum several times slower.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxact._canonical import (
    Axis,
    as_float,
    canonical_axis,
    canonical_temperature,
    compute_dtype,
    masked,
    require_array,
    rounded_once,
)
from jaxact._forward_mode import forward_mode

# A custom rule over (x, temperature) with the axes static.
_rule = functools.partial(jax.custom_vjp, nondiff_argnums=(2,))


def softmax(
    x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """Softmax, e^{xᵢ/T} / Σⱼ e^{xⱼ/T}, over one axis or several.

    Args:
        x: logits, an array of any shape; real. Integers and bools become the default float.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `x`. False means that this class does not exist.
        temperature: T > 0, a scalar. May be traced and differentiated; a traced T ≤ 0 gives nan.

    Returns:
        Probabilities with the shape and dtype of `x`, summing to 1 over `axis`. Exactly 0 for a class that is masked
        or has logit −inf; all 0 where no class is left. Logits of +inf share the row equally, and so does the
        largest finite number beside them. A nan makes its own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = y ⊙ (ȳ − ⟨ȳ, y⟩)/T and T̄ = −Σ x̄ log y. Reverse mode keeps `y`.

    Numerics:
        At most 6 ulp in float32 at logit scale 30 and T = 1; the derivative within 12·u·Σⱼ|Jᵢⱼ||ȳⱼ| of each element,
        also where one probability rounds to 1 (`jax.nn.softmax` loses that entry) or ȳ has a large common offset.
        16-bit types are computed in float32 and rounded once. Held by `tests/test_softmax.py`.

    Example:
        >>> import jax.numpy as jnp, jaxact
        >>> print(" ".join(f"{p:.3e}" for p in jaxact.softmax(jnp.array([-20.0, 10.0, 30.0]))))
        1.929e-22 2.061e-09 1.000e+00
        >>> jaxact.softmax(jnp.array([1.0, jnp.nan, 1.0]), where=jnp.array([True, False, True]))
        Array([0.5, 0. , 0.5], dtype=float32)

    References:
        jax issues 40386, 40344, 37234, 17117 and 13529.
    """
    return _softmax_of_any(require_array("x", x), axis, where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis("axis", axis, x.ndim)
    return _softmax(masked(x, where, -math.inf), _divisor(temperature, x), axes)


@forward_mode
@_rule
@rounded_once
def _softmax(x: Array, t: Array | None, axis: tuple[int, ...]) -> Array:
    if all(x.shape[a] == 1 for a in axis):
        # One class takes everything, exactly: e·(1/e), as XLA divides, can round to less than 1.
        return jnp.where(jnp.isnan(x), x, (x > -jnp.inf).astype(x.dtype))
    peak = _finite(_max(x, axis))
    count = _count(x, axis)
    e = _exponentials(x, peak, t, count)
    total = jnp.sum(e, axis, keepdims=True)
    # The maximum changes nothing unless no class is left and the sum is 0.
    return e / jnp.maximum(total, _reciprocal_power_of_2(count))


def _softmax_fwd(x: Array, t: Array | None, axis: tuple[int, ...]) -> Any:
    y = _softmax(x, t, axis)
    return y, (y, t)


def _softmax_bwd(axis: tuple[int, ...], residuals: Any, g: Array) -> Any:
    y, t = residuals
    dtype = y.dtype
    y, g = _certain(_widen(y)), _widen(g)
    # The Jacobian is diag(y) − y yᵀ = Pᵀ diag(y) P with P u = u − ⟨u, y⟩. Where one probability is near 1, subtracting
    # the mean first leaves that entry small, so that nothing large cancels in the second subtraction. The product is
    # symmetric, as the Jacobian is: transposed for forward mode it is the same three steps.
    z = y * (g - jnp.sum(g * y, axis, keepdims=True))
    z = z - y * jnp.sum(z, axis, keepdims=True)
    if t is None:
        return z.astype(dtype), None
    # Σ z̄ = 0, so the logits in T̄ = −Σ z̄ x/T² may be shifted, and T log y is a shift of x.
    log_y = jnp.where(y > 0, jnp.log(jnp.where(y > 0, y, 1)), 0)
    return (z / t).astype(dtype), -jnp.sum(z * log_y) / t


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


def log_softmax(
    x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """Logarithm of the softmax, xᵢ/T − log Σⱼ e^{xⱼ/T}, over one axis or several.

    Args:
        x: logits, an array of any shape; real. Integers and bools become the default float.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `x`. False means that this class does not exist.
        temperature: T > 0, a scalar. May be traced and differentiated; a traced T ≤ 0 gives nan.

    Returns:
        Log-probabilities ≤ 0 with the shape and dtype of `x`; −inf for a class that is masked or has logit −inf.
        Logits of +inf share the row equally, and so does the largest finite number beside them. A nan makes its
        own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = (ȳ − p Σ ȳ)/T with p = softmax(x/T), and T̄ = −Σ x̄ log p. The cotangent of a result that is −inf because
        its logit is counts as 0. Reverse mode keeps `x`.

    Numerics:
        Relatively accurate however near 0 the result: log1p of the other classes' sum and not the log of the whole.
        The derivative is within 12·u·Σⱼ|Jᵢⱼ||ȳⱼ| of each element. 16-bit types are computed in float32 and rounded
        once. Held by `tests/test_softmax.py`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxact
        >>> x = jnp.array([20.0, 0.0])
        >>> print(f"{jaxact.log_softmax(x)[0]:.4e}, {jax.nn.log_softmax(x)[0]:.4e}")
        -2.0612e-09, 0.0000e+00

    References:
        jax issues 40384, 40409, 19490 and 23842.
    """
    return _log_softmax_of_any(require_array("x", x), axis, where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _log_softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis("axis", axis, x.ndim)
    return _log_softmax(masked(x, where, -math.inf), _divisor(temperature, x), axes)


@forward_mode
@_rule
@rounded_once
def _log_softmax(x: Array, t: Array | None, axis: tuple[int, ...]) -> Array:
    top = _max(x, axis)
    peak = _finite(top)
    d = jnp.minimum(x, peak) - peak
    # Beside +inf every other class is impossible. d is 0 or at least an ulp of the largest number, so the product
    # is 0 or −inf.
    d = d * jnp.where(top == jnp.inf, peak, 1)
    return (d if t is None else d / t) - jnp.log1p(_sum_of_others(x, peak, t, axis))


def _log_softmax_fwd(x: Array, t: Array | None, axis: tuple[int, ...]) -> Any:
    return _log_softmax(x, t, axis), (x, t)


def _log_softmax_bwd(axis: tuple[int, ...], residuals: Any, g: Array) -> Any:
    x, t = residuals
    dtype = x.dtype
    x, g = _widen(x), _widen(g)
    # A result of −inf is constant. The factor is 0 where x is −inf and 1 elsewhere.
    largest = float(jnp.finfo(x.dtype).max)
    g = g * jnp.minimum(jnp.maximum(x, -largest) + largest, 1)
    # The Jacobian is I − 1 pᵀ, a projection, and so applying it twice changes nothing; but what v = ȳ − p Σ ȳ lost to
    # rounding at the largest probability is Σ v, and the second time takes it off. The barrier keeps XLA from computing
    # v twice, with a contraction here and without it there.
    p = _certain(_softmax(x, t, axis))
    v = lax.optimization_barrier(g - p * jnp.sum(g, axis, keepdims=True))
    v = v - p * jnp.sum(v, axis, keepdims=True)
    if t is None:
        return v.astype(dtype), None
    log_p = _log_softmax(x, t, axis)
    finite = log_p > -jnp.inf
    t_bar = -jnp.sum(jnp.where(finite, v * jnp.where(finite, log_p, 0), 0)) / t
    return (v / t).astype(dtype), t_bar


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


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
        0 where the sum is empty. Reverse mode keeps `a` (and `b`).

    Numerics:
        m + log1p(Σ of the others) with m the maximum, so that logsumexp([0, −20]) is 2.06e-9 and not 0.
        16-bit types are computed in float32 and rounded once. Held by `tests/test_softmax.py`.

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
    return _logsumexp_of_any(require_array("a", a), axis, b, keepdims, return_sign, where)


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
    axes = canonical_axis("axis", axis, a.ndim)
    x = masked(a, where, -math.inf)
    if b is None:
        out = _logsumexp(x, axes)
        # The sum of exponentials is positive, 0 where it is empty and nan where it is nan.
        fixed = lax.stop_gradient(out)
        sign = jnp.where(jnp.isnan(fixed), fixed, (fixed > -jnp.inf).astype(fixed.dtype))
    else:
        out, sign = _weighted_logsumexp(x, masked(b, where, 0), axes)
        if not return_sign:
            out = jnp.where(sign < 0, jnp.nan, out)
    if not keepdims:
        out, sign = jnp.squeeze(out, axes), jnp.squeeze(sign, axes)
    return (out, sign) if return_sign else out


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@rounded_once
def _logsumexp(x: Array, axis: tuple[int, ...]) -> Array:
    top = _max(x, axis)
    return top + jnp.log1p(_sum_of_others(x, _finite(top), None, axis))


def _logsumexp_fwd(x: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    return _logsumexp(x, axis), x


def _logsumexp_bwd(axis: tuple[int, ...], x: Array, g: Array) -> tuple[Array]:
    return ((_widen(g) * _softmax(_widen(x), None, axis)).astype(x.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


@forward_mode
@_rule
@rounded_once
def _weighted_logsumexp(a: Array, b: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    # Terms of weight 0 are left out before the maximum is taken: however large, they must not scale the rest away.
    a = jnp.where(b == 0, -jnp.inf, a)
    top = _max(a, axis)
    peak = _finite(top)
    at_peak = jnp.minimum(a, peak) == peak
    others = jnp.sum(jnp.where(at_peak, 0, b * jnp.exp(a - peak)), axis, keepdims=True)
    weight_at_peak = jnp.sum(jnp.where(at_peak, b, 0), axis, keepdims=True)
    total = others + weight_at_peak
    # As without weights, log1p of what differs from 1 where the sum is near 1.
    excess = others + (weight_at_peak - 1)
    near_one = jnp.abs(excess) < 0.5
    log_total = jnp.where(near_one, jnp.log1p(jnp.where(near_one, excess, 0)), jnp.log(jnp.abs(total)))
    return top + log_total, jnp.sign(total)


def _weighted_logsumexp_fwd(a: Array, b: Array, axis: tuple[int, ...]) -> Any:
    out, sign = _weighted_logsumexp(a, b, axis)
    return (out, sign), (a, b, out, sign)


def _weighted_logsumexp_bwd(axis: tuple[int, ...], residuals: Any, g: Any) -> Any:
    a, b, out, sign = residuals
    dtype = a.dtype
    a, b, out, sign, g_out = map(_widen, (a, b, out, sign, g[0]))
    # ∂out/∂b = s e^{a − out}. A sum that is empty has no derivative, and exponents of +inf share the row by weight.
    empty = out == -jnp.inf
    infinite = (a == jnp.inf) & (b != 0)
    share = 1 / jnp.abs(jnp.sum(jnp.where(infinite, b, 0), axis, keepdims=True))
    ratio = jnp.where(out == jnp.inf, jnp.where(infinite, share, 0), jnp.exp(jnp.where(empty, -jnp.inf, a) - out))
    ratio = jnp.where(empty, 0, ratio)
    b_bar = g_out * sign * ratio
    # A term of weight 0 does not count, however large its exponent; but ∂ā/∂b is not 0 there.
    a_bar = g_out * sign * b * jnp.where((b == 0) & ~jnp.isfinite(ratio), 0, ratio)
    return a_bar.astype(dtype), b_bar.astype(dtype)


_weighted_logsumexp.defvjp(_weighted_logsumexp_fwd, _weighted_logsumexp_bwd)


def _certain(y: Array) -> Array:
    """`y`, with 1 for a probability within 2 ulp of 1, where e·(1/e), as XLA divides, may have left a little less.

    Below, subtracting means leaves ε² of the largest entry where its probability is 1 − ε instead of 1, and that can
    exceed the small entries. The correction is constant: derivatives of the rule go through `y`.
    """
    eps = float(jnp.finfo(y.dtype).eps)
    return y + lax.stop_gradient(jnp.minimum(1 - y, jnp.maximum(y - (1 - 4 * eps), 0)))


# The shift, and what is summed after it.


def _exponentials(x: Array, peak: Array, t: Array | None, count: int) -> Array:
    """exp((x − s)/t), times a factor common to the row that keeps the sum of `count` of them within range.

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
    # Room for the sum: a power of 2, where the maximum is so large that it flushes none of the small ones.
    large = jnp.minimum(jnp.floor(jnp.maximum(peak / 64, 0)), 1)
    return jnp.exp(x - shift) * (1 - large * (1 - _reciprocal_power_of_2(count)))


def _reciprocal_power_of_2(count: int) -> float:
    """The largest power of 2 that is at most 1/count, and the least sum of exponentials."""
    return 2.0 ** -(max(count, 1) - 1).bit_length()


def _count(x: Array, axis: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in axis)


def _sum_of_others(x: Array, peak: Array, t: Array | None, axis: tuple[int, ...]) -> Array:
    """Σ e^{(xⱼ − m)/t} over all j but one at which m is attained; 0 where no class is left."""
    count = _count(x, axis)
    at_peak = _exponentials(peak, peak, t, count)
    all_but_one = jnp.sum(_exponentials(x, peak, t, count), axis, keepdims=True) / at_peak - 1
    # Where this difference is small it has cancelled. But then no second logit lies within 1 of the maximum, and the
    # weights below are 0 at the maximum and 1 elsewhere. The barrier makes the two sums two passes over x on CPU,
    # where XLA would otherwise write the exponentials to memory to share them.
    peak = lax.optimization_barrier(peak)
    distance = peak - jnp.minimum(x, peak)
    weight = jnp.minimum(distance if t is None else distance / t, 1)
    far = jnp.sum(_exponentials(x, peak, t, count) * weight, axis, keepdims=True) / at_peak
    return jnp.where(all_but_one > 0.25, all_but_one, far)


def _max(x: Array, axis: tuple[int, ...]) -> Array:
    return jnp.max(x, axis, keepdims=True, initial=-jnp.inf)


def _finite(top: Array) -> Array:
    """The nearest finite number, so that ∞ − ∞ never occurs. Not `clip`, at which XLA for CPU splits the kernel."""
    largest = float(jnp.finfo(top.dtype).max)
    return -jnp.maximum(-jnp.maximum(top, -largest), -largest)


def _divisor(temperature: ArrayLike | None, x: Array) -> Array | None:
    if temperature is None:
        return None
    t = as_float("temperature", temperature).astype(compute_dtype(x.dtype))
    return jnp.where(t > 0, t, jnp.nan)


def _widen(x: Array) -> Array:
    return x.astype(compute_dtype(x.dtype))

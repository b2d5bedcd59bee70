"""softmax, with its rule below it."""

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
    compute_dtype,
    divisor,
    masked,
    optional_array,
    require_array,
    static_axis,
    widen,
)
from jaxact._classes import vary, varying
from jaxact._exponentials import exponentials, scaled_exponentials, shift_about
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import certain, over_total, times_jacobian
from jaxact._limits import finite
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
    sum_over,
)
from jaxact._row_sums import RowSums, Sums, written_sum


def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0) -> Array:
    """Softmax, e^{xᵢ/T} / Σⱼ e^{xⱼ/T}, over one axis or several.

    Args:
        x: logits, an array of any shape; real. Integers and bools become the default float.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `x`. False means that this class does not exist.
        temperature: T > 0, a scalar. May be traced and differentiated; a traced T ≤ 0 gives nan.

    Returns:
        Probabilities with the shape and dtype of `x`, summing to 1 over `axis`. Exactly 0 for a class that is masked
        or has logit −inf; all 0 where no class is left. Logits of +inf share the row equally; beside them the largest
        finite number counts as one, but not that of 16 bits. A nan makes its own row nan and no other.

    Raises:
        TypeError: if `x` is complex or not an array, `axis` not integer, `where` not boolean.
        ValueError: if `axis` is out of range or named twice, `where` does not broadcast, `temperature` is not positive.

    Derivative:
        x̄ = y ⊙ (ȳ − ⟨ȳ, y⟩)/T and T̄ = −Σ x̄ log y. Reverse mode keeps `y`, and the mask; for float16 it keeps `x`
        instead, since a small `y` has few digits there, or none.

    Numerics:
        At most 6 ulp in float32 at logit scale 30 and T = 1; there the gradient is within 9·u·Σⱼ|Jᵢⱼ||ȳⱼ| of each
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
    where = optional_array("where", where)
    return _softmax_of_any(require_array("x", x), static_axis(axis), where, canonical_temperature(temperature))


@functools.partial(jax.jit, static_argnums=1)
def _softmax_of_any(x: ArrayLike, axis: Axis, where: ArrayLike | None, temperature: ArrayLike | None) -> Array:
    x = as_float("x", x)
    axes = canonical_axis(axis, x.ndim)
    y = _softmax(masked(x, where, -math.inf), temperature_of(x, temperature), axes, False)
    return masked(y, where, 0)  # for derivatives: so that not even a cotangent of nan counts at what is masked


def temperature_of(x: Array, temperature: ArrayLike | None) -> Array | None:
    """The temperature, with a cotangent of its own on every device that has logits of its own."""
    t = divisor(temperature, x)
    return None if t is None else vary(t, varying(x))


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax(x: Array, t: Array | None, axis: Axes, summed: bool) -> Array:
    """Softmax over the axes. Our own exponential takes less time than XLA's, but not in what is then `summed`."""
    peak = finite(widen(maximum(x, axis)))
    if not summed and _by_own_exponential(x, t, axis):
        e, _ = scaled_exponentials(widen(x), peak, axis)
        total = written_sum(e, axis)
    else:
        e = exponentials(widen(x), shift_about(peak, t, class_count(x, axis)), t, axis)
        total = sum_over(e, axis)
    return over_total(e, total, axis).astype(x.dtype)


def _by_own_exponential(x: Array, t: Array | None, axis: Axes) -> bool:
    """Whether exponentials are written to an array, by our own, which takes less time than to sum XLA's.

    So it is on CPU, but of little, and where XLA makes one kernel of softmax and the array exceeds the cache.
    """
    most = 2**22 if at_once(x, axis) else math.inf
    return (
        t is None
        and on_cpu()
        and compute_dtype(x.dtype) == jnp.float32
        and not class_by_class(x, axis)
        and not small(x)
        and size(x) <= most
    )


def _of_one_class(x: Array) -> Array:
    """It takes everything, exactly: a total that was found elsewhere may be of an exponential rounded otherwise."""
    return jnp.where(jnp.isnan(x), x, (x > -jnp.inf).astype(x.dtype))


def _softmax_fwd(x: Array, t: Array | None, axis: Axes, summed: bool) -> Any:
    y = _softmax(x, t, axis, summed)
    # Of a probability below 6e-5 float16 keeps fewer digits, and below 3e-8 none; but its cotangent may be large.
    return y, (x if y.dtype == jnp.float16 else y, t)


def _softmax_bwd(axis: Axes, summed: bool, residuals: Any, g: Array) -> Any:
    kept, t = residuals
    dtype = kept.dtype
    y = _softmax(widen(kept), t, axis, summed) if dtype == jnp.float16 else widen(kept)
    return _cotangents(y, t, g, axis, dtype)


def _cotangents(y: Array, t: Array | None, g: Array, axis: Axes, dtype: Any) -> tuple[Array, Array | None]:
    def row_sum(a: Array) -> Array:
        # A barrier for what `written_sum` has a selection: that of what is transposed would not be linear. Larger
        # arrays need memory between two kernels, which takes longer, and so does a kernel more for few numbers.
        total = sum_over(a, axis)
        return spread(total if few(y) or size(y) > 2**20 else lax.optimization_barrier(total), axis)

    z = times_jacobian(y, widen(g), axis, row_sum)
    if t is None:
        return z.astype(dtype), None
    # Σ z̄ = 0, so the logits in T̄ = −Σ z̄ x/T² may be shifted, and T log y is a shift of x.
    log_y = jnp.log(jnp.where(y > 0, y, 1))
    return (z / t).astype(dtype), -jnp.sum(z * log_y) / t


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def softmax_of_sums(
    x: Array, t: Array | None, sums: Sums | RowSums, axis: Axes, exp: Callable[[Array], Array]
) -> Array:
    """Softmax over the axes of what has been summed, wide. The sums are not differentiated."""
    if t is None and class_count(x, axis) == 1:
        return _of_one_class(x)
    # Behind a barrier, XLA computes the exponentials again and does not keep them from where the sums were found.
    shift, total = lax.optimization_barrier((shift_about(sums.peak, t, class_count(x, axis)), sums.total))
    e = exponentials(x, shift, t, axis, exp)
    return over_total(e, total, axis)


def _softmax_of_sums_fwd(
    x: Array, t: Array | None, sums: Sums | RowSums, axis: Axes, exp: Callable[[Array], Array]
) -> Any:
    y = softmax_of_sums(x, t, sums, axis, exp)
    return y, (certain(y), t)


def _softmax_of_sums_bwd(axis: Axes, exp: Callable[[Array], Array], residuals: Any, g: Array) -> Any:
    y, t = residuals
    return *_cotangents(y, t, g, axis, y.dtype), None


softmax_of_sums.defvjp(_softmax_of_sums_fwd, _softmax_of_sums_bwd)

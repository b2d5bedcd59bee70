"""sigmoid, log_sigmoid, softplus and logit, each with its rule below it."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxact._canonical import as_float, require_array, rounded_once
from jaxact._elementary import exp, log1p_of_fraction, log1p_of_positive
from jaxact._forward_mode import forward_mode


def sigmoid(x: ArrayLike) -> Array:
    """Logistic sigmoid, σ(x) = 1/(1 + e⁻ˣ), element by element.

    Args:
        x: array or number of any shape; real. Integers and bools become the default float.

    Returns:
        σ(x) in [0, 1], with the shape and dtype of `x`; nan where `x` is nan.

    Raises:
        TypeError: if `x` is complex or not an array.

    Derivative:
        σ′(x) = σ(x)σ(−x). Reverse mode keeps `x`.

    Numerics:
        At most 1.65 ulp in float32 (`jax.nn.sigmoid`: 2.48), and 2.38 ulp for σ′ wherever that is a normal number:
        s(1 − s), as in `jax.nn`, is exactly 0 from x = 17 on. 16-bit types: within 0.51 ulp, value and derivative.
        Held by `tests/test_exhaustive.py`.

    Example:
        >>> import jax, jaxact
        >>> print(jaxact.sigmoid(0.0))
        0.5
        >>> print(f"{jax.grad(jaxact.sigmoid)(17.0):.4e}, {jax.grad(jax.nn.sigmoid)(17.0):.4e}")
        4.1399e-08, 0.0000e+00

    References:
        jax issues 40385 and 40342.
    """
    return _sigmoid_of_any(require_array("x", x))


@jax.jit
def _sigmoid_of_any(x: ArrayLike) -> Array:
    return _sigmoid(as_float("x", x))


@forward_mode
@jax.custom_vjp
@rounded_once
def _sigmoid(x: Array) -> Array:
    # With e = e^−|x| it is e/(1 + e) for x < 0, and 1 less that for the others. Both are b − b·e/(1 + e), with b = e or
    # b = 1: what the quotient loses counts for less there, and no exponential overflows.
    e = exp(-jnp.abs(x))
    b = jnp.where(x < 0, e, 1)
    return b - b * (e / (1 + e))


def _sigmoid_fwd(x: Array) -> tuple[Array, Array]:
    return _sigmoid(x), x


@rounded_once
def _sigmoid_bwd(x: Array, g: Array) -> tuple[Array]:
    return (g * sigmoid_slope(x),)


_sigmoid.defvjp(_sigmoid_fwd, _sigmoid_bwd)


@forward_mode
@jax.custom_vjp
def sigmoid_slope(x: Array) -> Array:
    # σ′ = σ(x)σ(−x) = e/(1 + e)² with e = e^−|x|, multiplied out: of the terms of 1 + e(2 + e) the largest is exact.
    e = exp(-jnp.abs(x))
    return e / (1 + e * (2 + e))


def _sigmoid_slope_fwd(x: Array) -> tuple[Array, Array]:
    return sigmoid_slope(x), x


def _sigmoid_slope_bwd(x: Array, g: Array) -> tuple[Array]:
    # σ″ = σ′(1 − 2σ) = −σ′ tanh(x/2): a product, and so accurate at 0 and in the tails.
    return (-g * sigmoid_slope(x) * jnp.tanh(x / 2),)


sigmoid_slope.defvjp(_sigmoid_slope_fwd, _sigmoid_slope_bwd)


def softplus(x: ArrayLike) -> Array:
    """Softplus, log(1 + eˣ), element by element.

    Args:
        x: array or number of any shape; real. Integers and bools become the default float.

    Returns:
        log(1 + eˣ) ≥ 0, with the shape and dtype of `x`; nan where `x` is nan.

    Raises:
        TypeError: if `x` is complex or not an array.

    Derivative:
        softplus′ = σ. Reverse mode keeps `x`.

    Numerics:
        At most 1.98 ulp in float32; 16-bit types within 0.51 ulp, value and derivative. Every higher derivative
        is exact too, where that of `jax.nn.softplus` falls to 0. Held by `tests/test_exhaustive.py`.

    Example:
        >>> import jax, jaxact
        >>> print(f"{jaxact.softplus(-50.0):.4e}")
        1.9287e-22
        >>> print(f"{jax.grad(jax.grad(jaxact.softplus))(40.0):.4e}, {jax.grad(jax.grad(jax.nn.softplus))(40.0):.4e}")
        4.2484e-18, 0.0000e+00

    References:
        jax issue 40387. Mächler, "Accurately computing log(1 − exp(−|a|))" (2012), for the forms of log(1 + eˣ).
    """
    return _softplus_of_any(require_array("x", x))


@jax.jit
def _softplus_of_any(x: ArrayLike) -> Array:
    return _softplus(as_float("x", x))


@forward_mode
@jax.custom_vjp
@rounded_once
def _softplus(x: Array) -> Array:
    # log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|): two terms of one sign, and no overflow.
    return jnp.maximum(x, 0) + log1p_of_fraction(exp(-jnp.abs(x)))


def _softplus_fwd(x: Array) -> tuple[Array, Array]:
    return _softplus(x), x


@rounded_once
def _softplus_bwd(x: Array, g: Array) -> tuple[Array]:
    return (g * _sigmoid(x),)


_softplus.defvjp(_softplus_fwd, _softplus_bwd)


def log_sigmoid(x: ArrayLike) -> Array:
    """Logarithm of the sigmoid, log σ(x) = −softplus(−x), element by element.

    Args:
        x: array or number of any shape; real. Integers and bools become the default float.

    Returns:
        log σ(x) ≤ 0, with the shape and dtype of `x`; nan where `x` is nan.

    Raises:
        TypeError: if `x` is complex or not an array.

    Derivative:
        (log σ)′(x) = σ(−x), which is 1 − σ(x) without the cancellation. Reverse mode keeps −x.

    Numerics:
        As `softplus`.

    Example:
        >>> import jax, jaxact
        >>> print(f"{jaxact.log_sigmoid(20.0):.4e}, {jax.grad(jaxact.log_sigmoid)(20.0):.4e}")
        -2.0612e-09, 2.0612e-09

    References:
        jax issue 40383.
    """
    return _log_sigmoid_of_any(require_array("x", x))


@jax.jit
def _log_sigmoid_of_any(x: ArrayLike) -> Array:
    # The rule of softplus is this function's rule: negation is exact.
    return -_softplus(-as_float("x", x))


def logit(p: ArrayLike) -> Array:
    """Inverse of the sigmoid, logit(p) = log(p/(1 − p)), element by element.

    Args:
        p: array or number of any shape; real. Integers and bools become the default float.

    Returns:
        logit(p), with the shape and dtype of `p`; −inf at 0, +inf at 1, nan outside [0, 1].

    Raises:
        TypeError: if `p` is complex or not an array.

    Derivative:
        logit′(p) = 1/(p(1 − p)); +inf at 0 and 1, nan outside. Reverse mode keeps `p`.

    Numerics:
        At most 2.00 ulp in float32 for normal `p`; log(p/(1 − p)) is off by up to 131,051 ulp, near ½. 16-bit types
        within 0.51 ulp, value and derivative. Where XLA reads subnormal numbers as 0, as on CPU, so does logit.
        Held by `tests/test_exhaustive.py`.

    Example:
        >>> import jaxact
        >>> print(jaxact.logit(0.5), f"{jaxact.logit(1e-30):.4f}")
        0.0 -69.0776
        >>> print(jaxact.sigmoid(jaxact.logit(0.25)))
        0.25

    References:
        SciPy's `special.logit` switches formulas near ½ for the same reason.
    """
    return _logit_of_any(require_array("p", p))


@jax.jit
def _logit_of_any(p: ArrayLike) -> Array:
    return _logit(as_float("p", p))


@forward_mode
@jax.custom_vjp
@rounded_once
def _logit(p: Array) -> Array:
    # Near ½ the odds are near 1 and their logarithm near 0, so we need odds − 1, of the likelier against the other:
    # |2p − 1|/min(p, 1 − p), whose numerator is exact there.
    less_likely = jnp.minimum(p, 1 - p)
    magnitude = log1p_of_positive(jnp.abs((2 * p - 1) / less_likely))
    magnitude = jnp.where(less_likely >= 0, magnitude, jnp.nan)
    return jnp.where(p < 0.5, -magnitude, magnitude)


def _logit_fwd(p: Array) -> tuple[Array, Array]:
    return _logit(p), p


@rounded_once
def _logit_bwd(p: Array, g: Array) -> tuple[Array]:
    return (g * _logit_slope(p),)


_logit.defvjp(_logit_fwd, _logit_bwd)


@forward_mode
@jax.custom_vjp
def _logit_slope(p: Array) -> Array:
    # The absolute value makes it +inf at −0 too.
    return jnp.where((p < 0) | (p > 1), jnp.nan, 1 / jnp.abs(p * (1 - p)))


def _logit_slope_fwd(p: Array) -> tuple[Array, Array]:
    return _logit_slope(p), p


def _logit_slope_bwd(p: Array, g: Array) -> tuple[Array]:
    # (1/(p(1 − p)))′ = (2p − 1)/(p(1 − p))². Written as a product with 2p − 1, exact near ½ where p − (1 − p) is not.
    slope = _logit_slope(p)
    return (g * slope * ((2 * p - 1) * slope),)


_logit_slope.defvjp(_logit_slope_fwd, _logit_slope_bwd)

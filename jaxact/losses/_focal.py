"""The focal loss of independent binary decisions, element by element, with its rule below it.

In what follows q = 1 − p_t = (1 − y) σ(x) + y σ(−x), what the model leaves for the other decision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxact._canonical import as_float, canonical_scalar, masked, optional_array, require_array, widen
from jaxact._classes import alike, vary, varying
from jaxact._elementary import FAR, exp_and_rest, exp_of_sum, log, log1p_and_rest
from jaxact._error_free import two_product, two_sum
from jaxact._forward_mode import forward_mode
from jaxact._options import times
from jaxact._sigmoid import sigmoid, sigmoid_slope, softplus
from jaxact.losses._binary_cross_entropy import binary_cross_entropy, label_probability, like_logits


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    *,
    where: ArrayLike | None = None,
) -> Array:
    """α_t (1 − p_t)^γ times the binary cross-entropy, element by element.

    With p = σ(x), 1 − p_t = (1 − y) p + y (1 − p) and α_t = α y + (1 − α)(1 − y), or 1 without α.

    Args:
        logits: x, a real array of any shape. Integers become the default float.
        labels: y in [0, 1], broadcastable to the shape of `logits`: real, integer or boolean.
        alpha: α in [0, 1], the share of the positive examples; broadcastable to the shape of `logits`. A Python number
            is checked, an array is not. None weighs both alike.
        gamma: γ ≥ 0, a scalar.
        where: boolean, broadcastable to the shape of `logits`. False means that this element does not count.

    Returns:
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1], but for
        four units of rounding, as in `sigmoid_binary_cross_entropy`.

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit, `gamma` is negative or above 1e30, or a number `alpha` is not in [0, 1].

    Derivative:
        α_t (1 − p_t)^γ (γ (1 − 2y) σ′(x)/(1 − p_t) · BCE + BCE′): for y = 0 and 1 both terms have one sign. Reverse
        mode keeps `logits`, and `labels` and `alpha` in their shape, in float32 or wider; and the mask.

    Numerics:
        For y = 0 and 1 and γ ≤ 5 within 4 ulp of where x(1 ± u) puts the loss, which changes by a factor of up to
        1 ± (γ + 1)|x|u. Right at ±inf. Held by `tests/test_losses.py`.

    Example:
        >>> from jaxact import losses
        >>> print(f"{losses.sigmoid_focal_loss(5.0, 1):.4e}, {losses.sigmoid_focal_loss(5.0, 0):.4e}")
        3.0081e-07, 4.9399e+00

    References:
        Lin et al., "Focal Loss for Dense Object Detection" (2017); optax issue 1267: nan gradients.
    """
    canonical_scalar("gamma", gamma, lambda c: 0 <= c <= 1e30, "not negative and at most 1e30")
    if isinstance(alpha, (int, float)):
        canonical_scalar("alpha", alpha, lambda a: 0 <= a <= 1, "from 0 to 1, or None to weigh both alike")
    logits, labels = require_array("logits", logits), require_array("labels", labels)
    return _focal_of_any(logits, labels, optional_array("alpha", alpha), gamma, optional_array("where", where))


@jax.jit
def _focal_of_any(
    logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike | None, gamma: ArrayLike, where: ArrayLike | None
) -> Array:
    x = masked(as_float("logits", logits), where, 0)
    y = label_probability(labels, x, where)
    a = None if alpha is None else like_logits("alpha", alpha, x, where, 0)
    x, y, a = alike(x, y, a)
    loss = _focal_loss(x, y, a, vary(as_float("gamma", gamma).astype(y.dtype), varying(x)))
    return masked(loss, where, 0)


def _share(y: Array, alpha: Array | None) -> Array:
    return jnp.ones_like(y) if alpha is None else alpha * y + (1 - alpha) * (1 - y)


def _log_whole(x: Array) -> tuple[Array, Array, Array]:
    """e = e^−|x|, and log(1 + e), which both the loss and log q have, with what its rounding loses."""
    e, rest = exp_and_rest(-jnp.minimum(jnp.abs(x), FAR))
    return e, *log1p_and_rest(e, rest)


def _opposed(x: Array, y: Array) -> Array:
    """How much of the label is on the other side of 0 than x: 0 or 1 for y = 0 and 1."""
    return jnp.where(x < 0, y, 1 - y)


def _power(x: Array, y: Array, gamma: Array) -> tuple[Array, Array]:
    """s and r with q^γ = s(1 + r), of which 1 + r would be rounded."""
    # log q is −|x| − log(1 + e) where x is on the label's side, and −log(1 + e) on the other. A power multiplies
    # every rounding before it, so that this is known to more digits than a number has.
    e, log_whole, of_whole = _log_whole(x)
    far, gamma = _opposed(x, y), jnp.broadcast_to(gamma, x.shape)
    log_part = jnp.where(far == 0, -jnp.minimum(jnp.abs(x), FAR), log(far + (1 - far) * e))
    (a, of_a), (b, of_b) = two_product(gamma, log_part), two_product(gamma, -log_whole)
    exponent, of_exponent = two_sum(a, b)
    # At most e⁸⁷: more than 1 for a negative power alone, which has a factor that is as small.
    return exp_of_sum(jnp.minimum(exponent, 87.0), of_exponent + ((of_a + of_b) - gamma * of_whole))


# For y = 0 and 1 nothing cancels in q^γ, in log q and in its slope. Their derivatives are written for any y, since a
# choice by y has none in it.


@jax.custom_jvp
def _focus(x: Array, y: Array, gamma: Array) -> Array:
    """q^γ."""
    s, r = _power(x, y, gamma)
    return s * (1 + r)


@_focus.defjvp
def _focus_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, y, gamma), (x_dot, y_dot, gamma_dot) = primals, tangents
    focus, of_logit = _focus(x, y, gamma), gamma * (1 - 2 * y) * _slope_ratio(x, y)
    # Not the power over q, which may be 0 where this is not.
    of_label = gamma * _focus(x, y, gamma - 1) * _q_slope(x)
    log_q = _log_q(x, y)
    of_gamma = times(focus, jnp.where(jnp.isinf(log_q), 0, log_q))  # a constant where q is 0, also for γ = 0
    return focus, focus * of_logit * x_dot + of_label * y_dot + of_gamma * gamma_dot


@jax.custom_jvp
def _log_q(x: Array, y: Array) -> Array:
    """log q."""
    return jnp.where(y == 1, -softplus(x), jnp.where(y == 0, -softplus(-x), jnp.log(_positive_q(x, y))))


@_log_q.defjvp
def _log_q_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, y), (x_dot, y_dot) = primals, tangents
    of_label = _q_slope(x) / _positive_q(x, y)
    return _log_q(x, y), (1 - 2 * y) * _slope_ratio(x, y) * x_dot + of_label * y_dot


@jax.custom_jvp
def _slope_ratio(x: Array, y: Array) -> Array:
    """σ′/q, so that ∂log q/∂x = (1 − 2y) σ′/q."""
    soft = sigmoid_slope(x) / _positive_q(x, y)
    return jnp.where(y == 1, sigmoid(x), jnp.where(y == 0, sigmoid(-x), soft))


@_slope_ratio.defjvp
def _slope_ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # With σ″ = σ′(σ(−x) − σ(x)), ∂/∂x is the ratio times (y σ(−x)² − (1 − y) σ(x)²)/q.
    (x, y), (x_dot, y_dot) = primals, tangents
    ratio, p, not_p, q = _slope_ratio(x, y), sigmoid(x), sigmoid(-x), _positive_q(x, y)
    of_logit = y * not_p * (not_p / q) - (1 - y) * p * (p / q)
    return ratio, ratio * (of_logit * x_dot - _q_slope(x) / q * y_dot)


@jax.custom_jvp
def _q_slope(x: Array) -> Array:
    """∂q/∂y = 1 − 2σ(x) = −tanh(x/2)."""
    return -jnp.tanh(x / 2)


# Written down, since 1 − tanh² is 0 where tanh rounds to 1.
_q_slope.defjvps(lambda x_dot, _, x: -2 * sigmoid_slope(x) * x_dot)


def _positive_q(x: Array, y: Array) -> Array:
    """q, or 1 where it is 0, to divide by."""
    q = (1 - y) * sigmoid(x) + y * sigmoid(-x)
    return jnp.where(q == 0, 1, q)


@forward_mode
@jax.custom_vjp
def _focal_loss(x: Array, y: Array, alpha: Array | None, gamma: Array) -> Array:
    wide = widen(x)
    s, r = _power(wide, y, gamma)
    # The loss is log(1 + e), and |x| more on the side away from the label: known as exactly as the power, it is
    # rounded when 1 + r has multiplied it.
    (_, log_whole, of_whole), far, distance = _log_whole(wide), _opposed(wide, y), jnp.abs(wide)
    loss = log_whole + times(far, distance)
    _, of_loss = two_sum(log_whole, far * jnp.minimum(distance, FAR))
    loss = loss + jnp.where(loss < jnp.inf, r * loss + (of_loss + of_whole), 0)
    return times(_share(y, alpha) * s, loss)


def _focal_loss_fwd(x: Array, y: Array, alpha: Array | None, gamma: Array) -> Any:
    return _focal_loss(x, y, alpha, gamma), (x, y, alpha, gamma)


def _focal_loss_bwd(residuals: Any, g: Array) -> Any:
    x, y, alpha, gamma = residuals
    wide = widen(x)
    focus, loss, share = _focus(wide, y, gamma), binary_cross_entropy(wide, y, None), _share(y, alpha)
    slope = (1 - y) * sigmoid(wide) - y * sigmoid(-wide)
    x_bar = share * focus * (times(gamma * (1 - 2 * y) * _slope_ratio(wide, y), loss) + slope)
    # That of the cross-entropy is −x. The power divided by q is another: of their quotient's derivative, q² may be 0.
    of_labels = times(gamma * _focus(wide, y, gamma - 1) * _q_slope(wide), loss) - times(focus, wide)
    y_bar = times(share, of_labels)
    alpha_bar = None
    if alpha is not None:
        y_bar = y_bar + (2 * alpha - 1) * times(focus, loss)
        alpha_bar = g * (2 * y - 1) * times(focus, loss)
    # Where the loss is 0, log q may be −∞, and where that is 0 the loss infinite.
    of_power = jnp.where(loss == 0, 0, times(_log_q(wide, y), loss))
    gamma_bar = jnp.sum(g * share * times(focus, of_power))
    return (g * x_bar).astype(x.dtype), g * y_bar, alpha_bar, gamma_bar


_focal_loss.defvjp(_focal_loss_fwd, _focal_loss_bwd)

"""Losses of independent binary decisions, element by element, each with its rule below it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxact._canonical import (
    as_float,
    broadcast,
    canonical_scalar,
    compute_dtype,
    masked,
    require_array,
    require_arrays,
    widen,
)
from jaxact._classes import alike, vary, varying
from jaxact._elementary import exp, exp_and_rest, exp_of_sum, log, log1p_and_rest, log1p_of_fraction
from jaxact._error_free import product_and_rest, sum_and_rest
from jaxact._forward_mode import forward_mode
from jaxact._sigmoid import sigmoid, softplus


def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """−y log σ(x) − (1 − y) log σ(−x), element by element.

    Args:
        logits: x, a real array of any shape. Integers become the default float.
        labels: y in [0, 1], broadcastable to the shape of `logits`: real, integer or boolean.
        pos_weight: a factor ≥ 0 for the first term, broadcastable to the shape of `logits`. Not checked.
        label_smoothing: ε in [0, 1]; y becomes (1 − ε) y + ε/2.
        where: boolean, broadcastable to the shape of `logits`. False means that this element does not count.

    Returns:
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1].

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit or an option is out of its range.

    Derivative:
        (1 − y) σ(x) − pos_weight·y·σ(−x); of y, −x, or pos_weight·softplus(−x) − softplus(x). Reverse mode keeps
        `logits`, and `labels` in the shape of the logits and in float32 or wider.

    Numerics:
        At most 4 ulp for y = 0 and 1, the derivative too: no 1 − σ(x) is formed. Right at ±inf, where 0·inf would be
        nan. Held by `tests/test_losses.py`.

    Example:
        >>> import jax
        >>> from jaxact import losses
        >>> print(f"{losses.sigmoid_binary_cross_entropy(40.0, 1.0):.4e}")
        4.2484e-18
        >>> print(losses.sigmoid_binary_cross_entropy(float("inf"), 1), losses.sigmoid_binary_cross_entropy(0.0, -1))
        0.0 nan

    References:
        optax issue 431: nan at ±inf.
    """
    e = canonical_scalar("label_smoothing", label_smoothing, lambda e: 0 <= e <= 1, "in [0, 1]", nothing=0)
    require_array("logits", logits)
    require_arrays(pos_weight=pos_weight, where=where)
    return _binary_cross_entropy_of_any(logits, require_array("labels", labels), pos_weight, e, where)


@jax.jit
def _binary_cross_entropy_of_any(
    logits: ArrayLike,
    labels: ArrayLike,
    pos_weight: ArrayLike | None,
    smoothing: ArrayLike | None,
    where: ArrayLike | None,
) -> Array:
    x = masked(as_float("logits", logits), where, 0)
    y = _probability(labels, x, where)
    if smoothing is not None:
        y = y + jnp.asarray(smoothing, y.dtype) * (0.5 - y)
    weight = (
        None
        if pos_weight is None
        else masked(broadcast("pos_weight", pos_weight, x.shape, "logits").astype(y.dtype), where, 1)
    )
    loss = _binary_cross_entropy(*alike(x, y, weight))
    return loss if where is None else masked(loss, where, 0)


def _probability(labels: ArrayLike, x: Array, where: ArrayLike | None) -> Array:
    """The labels of logits `x` in the dtype to compute in; nan outside [0, 1]."""
    y = masked(broadcast("labels", labels, x.shape, "logits").astype(compute_dtype(x.dtype)), where, 0)
    return jnp.where(y * (1 - y) >= 0, y, jnp.nan)


@forward_mode
@jax.custom_vjp
def _binary_cross_entropy(x: Array, y: Array, weight: Array | None) -> Array:
    # softplus(−x) and softplus(x) share log(1 + e^−|x|), and one of them is no more than that; no term is negative.
    x = widen(x)
    positive, negative = y if weight is None else weight * y, 1 - y
    both = log1p_of_fraction(exp(-jnp.abs(x)))
    if weight is not None:
        both = (positive + negative) * both
    return both + _times(jnp.where(x < 0, positive, negative), jnp.abs(x))


def _times(a: Array, b: Array) -> Array:
    """a·b, and 0 where `a` is 0 and `b` infinite. (Not wherever `a` is 0: the derivative there is b.)"""
    return a * jnp.where((a == 0) & jnp.isinf(b), 0, b)


def _binary_cross_entropy_fwd(x: Array, y: Array, weight: Array | None) -> Any:
    return _binary_cross_entropy(x, y, weight), (x, y, weight)


def _binary_cross_entropy_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array | None]:
    x, y, weight = residuals
    wide = widen(x)
    positive = y if weight is None else weight * y
    x_bar = g * ((1 - y) * sigmoid(wide) - positive * sigmoid(-wide))
    if weight is None:
        return x_bar.astype(x.dtype), -g * wide, None
    # w softplus(−x) − softplus(x), of which little would be left near x = 0. The two differ by x.
    less = jnp.where(wide < 0, wide, -wide)
    y_bar = g * ((weight - 1) * softplus(less) - jnp.where(wide < 0, _times(weight, wide), wide))
    return x_bar.astype(x.dtype), y_bar, g * _times(y, softplus(-wide))


_binary_cross_entropy.defvjp(_binary_cross_entropy_fwd, _binary_cross_entropy_bwd)


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
        alpha: α in [0, 1], the share of the positive examples; broadcastable to the shape of `logits`. Not checked.
            None weighs both alike.
        gamma: γ ≥ 0, a scalar.
        where: boolean, broadcastable to the shape of `logits`. False means that this element does not count.

    Returns:
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1].

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit or `gamma` is negative.

    Derivative:
        α_t (1 − p_t)^γ (γ (1 − 2y) σ′(x)/(1 − p_t) · BCE + BCE′): for y = 0 and 1 both terms have one sign. Reverse
        mode keeps `logits`, and `labels` in the shape of the logits and in float32 or wider.

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
    canonical_scalar("gamma", gamma, lambda c: 0 <= c < math.inf, "finite and not negative")
    require_array("logits", logits)
    require_arrays(alpha=alpha, where=where)
    return _focal_of_any(logits, require_array("labels", labels), alpha, gamma, where)


@jax.jit
def _focal_of_any(
    logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike | None, gamma: ArrayLike, where: ArrayLike | None
) -> Array:
    x = masked(as_float("logits", logits), where, 0)
    y = _probability(labels, x, where)
    a = None if alpha is None else masked(broadcast("alpha", alpha, x.shape, "logits").astype(y.dtype), where, 0)
    x, y, a = alike(x, y, a)
    loss = _focal_loss(x, y, a, vary(jnp.asarray(gamma, y.dtype), varying(x)))
    return loss if where is None else masked(loss, where, 0)


def _share(y: Array, alpha: Array | None) -> Array | float:
    return 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)


_FAR = 1024.0  # beyond, e^−|x| is 0 in every dtype


def _log_whole(x: Array) -> tuple[Array, Array, Array]:
    """e = e^−|x|, and log(1 + e), which both the loss and log q have, with what its rounding loses."""
    e, rest = exp_and_rest(-jnp.minimum(jnp.abs(x), _FAR))
    return e, *log1p_and_rest(e, rest)


def _far(x: Array, y: Array) -> Array:
    """How much of the label is on the other side of 0 than x: 0 or 1 for y = 0 and 1."""
    return jnp.where(x < 0, y, 1 - y)


def _power(x: Array, y: Array, gamma: Array) -> tuple[Array, Array]:
    """s and p with q^γ = s(1 + p), of which 1 + p would be rounded; q = 1 − p_t."""
    # log q is −|x| − log(1 + e) where x is on the label's side, and −log(1 + e) on the other. A power multiplies
    # every rounding before it, so that this is known to more digits than a number has.
    e, log_whole, of_whole = _log_whole(x)
    far, gamma = _far(x, y), jnp.broadcast_to(gamma, x.shape)
    log_part = jnp.where(far == 0, -jnp.minimum(jnp.abs(x), _FAR), log(far + (1 - far) * e))
    (a, of_a), (b, of_b) = product_and_rest(gamma, log_part), product_and_rest(gamma, -log_whole)
    exponent, of_exponent = sum_and_rest(a, b)
    # At most e⁸⁷: more than 1 for a negative power alone, which has a factor that is as small.
    return exp_of_sum(jnp.minimum(exponent, 87.0), of_exponent + ((of_a + of_b) - gamma * of_whole))


@jax.custom_jvp
def _focus(x: Array, y: Array, gamma: Array) -> Array:
    """q^γ."""
    s, p = _power(x, y, gamma)
    return s * (1 + p)


@_focus.defjvp
def _focus_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, y, gamma), (x_dot, y_dot, gamma_dot) = primals, tangents
    focus, of_logit = _focus(x, y, gamma), gamma * (1 - 2 * y) * _slope_ratio(x, y)
    # Not the power over q, which may be 0 where this is not.
    of_label = gamma * _focus(x, y, gamma - 1) * _label_slope(x)
    return focus, focus * of_logit * x_dot + of_label * y_dot + _times(focus, _log_rest(x, y)) * gamma_dot


# For y = 0 and 1, log q and its slope are those in which nothing cancels. Their derivatives are written for any y,
# since a choice by y has none in it.


@jax.custom_jvp
def _log_rest(x: Array, y: Array) -> Array:
    """log q."""
    return jnp.where(y == 1, -softplus(x), jnp.where(y == 0, -softplus(-x), jnp.log(_positive_rest(x, y))))


@_log_rest.defjvp
def _log_rest_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, y), (x_dot, y_dot) = primals, tangents
    of_label = _label_slope(x) / _positive_rest(x, y)
    return _log_rest(x, y), (1 - 2 * y) * _slope_ratio(x, y) * x_dot + of_label * y_dot


@jax.custom_jvp
def _slope_ratio(x: Array, y: Array) -> Array:
    """σ′/q, so that ∂log q/∂x = (1 − 2y) σ′/q."""
    soft = sigmoid(x) * sigmoid(-x) / _positive_rest(x, y)
    return jnp.where(y == 1, sigmoid(x), jnp.where(y == 0, sigmoid(-x), soft))


@_slope_ratio.defjvp
def _slope_ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # With σ″ = σ′(σ(−x) − σ(x)), ∂/∂x is the ratio times (y σ(−x)² − (1 − y) σ(x)²)/q.
    (x, y), (x_dot, y_dot) = primals, tangents
    ratio, p, rest, q = _slope_ratio(x, y), sigmoid(x), sigmoid(-x), _positive_rest(x, y)
    of_logit = y * rest * (rest / q) - (1 - y) * p * (p / q)
    return ratio, ratio * (of_logit * x_dot - _label_slope(x) / q * y_dot)


@jax.custom_jvp
def _label_slope(x: Array) -> Array:
    """∂q/∂y = 1 − 2σ(x) = −tanh(x/2)."""
    return -jnp.tanh(x / 2)


# Written down, since 1 − tanh² is 0 where tanh rounds to 1.
_label_slope.defjvps(lambda x_dot, _, x: -2 * sigmoid(x) * sigmoid(-x) * x_dot)


def _positive_rest(x: Array, y: Array) -> Array:
    """q, or 1 where it is 0, to divide by."""
    q = (1 - y) * sigmoid(x) + y * sigmoid(-x)
    return jnp.where(q == 0, 1, q)


@forward_mode
@jax.custom_vjp
def _focal_loss(x: Array, y: Array, alpha: Array | None, gamma: Array) -> Array:
    wide = widen(x)
    s, p = _power(wide, y, gamma)
    # The loss is log(1 + e), and |x| more on the side away from the label: known as exactly as the power, it is
    # rounded when 1 + p has multiplied it.
    (_, log_whole, of_whole), far, distance = _log_whole(wide), _far(wide, y), jnp.abs(wide)
    loss = log_whole + _times(far, distance)
    _, of_loss = sum_and_rest(log_whole, far * jnp.minimum(distance, _FAR))
    loss = loss + jnp.where(loss < jnp.inf, p * loss + (of_loss + of_whole), 0)
    return _share(y, alpha) * s * loss


def _focal_loss_fwd(x: Array, y: Array, alpha: Array | None, gamma: Array) -> Any:
    return _focal_loss(x, y, alpha, gamma), (x, y, alpha, gamma)


def _focal_loss_bwd(residuals: Any, g: Array) -> Any:
    x, y, alpha, gamma = residuals
    wide = widen(x)
    focus, loss, share = _focus(wide, y, gamma), _binary_cross_entropy(wide, y, None), _share(y, alpha)
    slope = (1 - y) * sigmoid(wide) - y * sigmoid(-wide)
    x_bar = share * focus * (_times(gamma * (1 - 2 * y) * _slope_ratio(wide, y), loss) + slope)
    # That of the cross-entropy is −x. The power divided by q is another: of their quotient's derivative, q² may be 0.
    of_labels = _times(gamma * _focus(wide, y, gamma - 1) * _label_slope(wide), loss) - _times(focus, wide)
    y_bar = share * of_labels
    alpha_bar = None
    if alpha is not None:
        y_bar = y_bar + (2 * alpha - 1) * _times(focus, loss)
        alpha_bar = g * (2 * y - 1) * _times(focus, loss)
    # Where the loss is 0, log q may be −∞, and where that is 0 the loss infinite.
    of_power = jnp.where(loss == 0, 0, _times(_log_rest(wide, y), loss))
    gamma_bar = jnp.sum(g * share * _times(focus, of_power))
    return (g * x_bar).astype(x.dtype), g * y_bar, alpha_bar, gamma_bar


_focal_loss.defvjp(_focal_loss_fwd, _focal_loss_bwd)

"""Losses of independent binary decisions, element by element, each with its rule below it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxact._canonical import (
    as_float,
    broadcast,
    canonical_scalar,
    compute_dtype,
    masked,
    require_array,
    require_arrays,
)
from jaxact._elementary import exp, exp_and_rest, log1p_of_fraction
from jaxact._exponentials import widen
from jaxact._forward_mode import forward_mode
from jaxact._sigmoid import sigmoid, softplus


def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """−y log σ(x) − (1 − y) log σ(−x), element by element.

    Args:
        logits: x, a real array of any shape. Integers become the default float.
        labels: y in [0, 1], broadcastable to the shape of `logits`: real, integer or boolean.
        pos_weight: a factor for the first term, broadcastable to the shape of `logits`.
        label_smoothing: ε in [0, 1]; y becomes (1 − ε) y + ε/2.
        where: boolean, broadcastable to the shape of `logits`. False means that this element does not count.

    Returns:
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1].

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit or an option is out of its range.

    Derivative:
        (1 − y) σ(x) − pos_weight·y·σ(−x); of y, −x, or pos_weight·softplus(−x) − softplus(x). Reverse mode keeps
        `logits` and `labels`.

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
    weight = None if pos_weight is None else masked(broadcast("pos_weight", pos_weight, x).astype(y.dtype), where, 1)
    loss = _binary_cross_entropy(x, y, weight)
    return loss if where is None else masked(loss, where, 0)


def _probability(labels: ArrayLike, x: Array, where: ArrayLike | None) -> Array:
    """The labels of logits `x` in the dtype to compute in; nan outside [0, 1]."""
    y = masked(broadcast("labels", labels, x).astype(compute_dtype(x.dtype)), where, 0)
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
    """a·b, and 0 where `a` is 0, of infinity too."""
    return jnp.where(a == 0, 0, a * b)


def _binary_cross_entropy_fwd(x: Array, y: Array, weight: Array | None) -> Any:
    return _binary_cross_entropy(x, y, weight), (x, y, weight)


def _binary_cross_entropy_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array | None]:
    x, y, weight = residuals
    wide = widen(x)
    positive = y if weight is None else weight * y
    x_bar = g * ((1 - y) * sigmoid(wide) - positive * sigmoid(-wide))
    if weight is None:
        return x_bar.astype(x.dtype), -g * wide, None
    y_bar = g * (weight * softplus(-wide) - softplus(wide))
    return x_bar.astype(x.dtype), y_bar, g * _times(y, softplus(-wide))


_binary_cross_entropy.defvjp(_binary_cross_entropy_fwd, _binary_cross_entropy_bwd)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    *,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """α_t (1 − p_t)^γ times the binary cross-entropy, element by element.

    With p = σ(x), 1 − p_t = (1 − y) p + y (1 − p) and α_t = α y + (1 − α)(1 − y), or 1 without α.

    Args:
        logits: x, a real array of any shape. Integers become the default float.
        labels: y in [0, 1], broadcastable to the shape of `logits`: real, integer or boolean.
        alpha: α, the share of the positive examples; broadcastable to the shape of `logits`. None weighs both alike.
        gamma: γ ≥ 0, a scalar.
        where: boolean, broadcastable to the shape of `logits`. False means that this element does not count.

    Returns:
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1].

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit or `gamma` is negative.

    Derivative:
        α_t (1 − p_t)^γ (γ (1 − 2y) σ′(x)/(1 − p_t) · BCE + BCE′): for y = 0 and 1 both terms have one sign. Reverse
        mode keeps `logits` and `labels`.

    Numerics:
        For y = 0 and 1 within 4 ulp of where x(1 ± u) puts the loss, which changes by a factor of up to
        1 ± (γ + 1)|x|u; so for γ = 1 and 2, and within 6 ulp of there at γ = 1.5 and 3. Right at ±inf.
        Held by `tests/test_losses.py`.

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
    # A small whole power is multiplied out.
    power = int(gamma) if isinstance(gamma, (int, float)) and gamma in range(1, 9) else None
    return _focal_of_any(logits, require_array("labels", labels), alpha, gamma, where, power)


@functools.partial(jax.jit, static_argnums=5)
def _focal_of_any(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None,
    gamma: ArrayLike,
    where: ArrayLike | None,
    power: int | None,
) -> Array:
    x = masked(as_float("logits", logits), where, 0)
    y = _probability(labels, x, where)
    a = None if alpha is None else masked(broadcast("alpha", alpha, x).astype(y.dtype), where, 0)
    loss = _focal_loss(power, x, y, a, jnp.asarray(gamma, y.dtype))
    return loss if where is None else masked(loss, where, 0)


def _focus(power: int | None, q: Array, gamma: Array) -> Array:
    if power is not None:
        return lax.integer_pow(q, power)
    # At 0 the derivative of a power is 0 times infinity.
    return jnp.where(q == 0, jnp.where(gamma == 0, 1, 0), jnp.power(jnp.where(q == 0, 1, q), gamma))


def _share(y: Array, alpha: Array | None) -> Array | float:
    return 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _focal_loss(power: int | None, x: Array, y: Array, alpha: Array | None, gamma: Array) -> Array:
    # 1 − p_t is of the likelier side e/(1 + e), of the other 1/(1 + e).
    wide = widen(x)
    e, rest = exp_and_rest(-jnp.abs(wide))
    of_e = jnp.where(wide < 0, 1 - y, y)
    part, whole = jnp.where(wide < 0, y, 1 - y) + of_e * e, 1 + e
    loss = _binary_cross_entropy(wide, y, None)
    # A power multiplies every rounding, so what the sum and the exponential have lost is put back to first order: with
    # the rest r of e, e(1 + r)/(1 + e + er) is e/(1 + e − r). The maximum changes no value and keeps XLA from folding
    # the difference to 0.
    rest = of_e * rest
    lost = (e - (jnp.maximum(whole, 1) - 1)) - rest
    if power is None:
        focused = _times(_focus(power, part / (whole + lost), gamma), loss)
    else:
        # There is one quotient. Where e is a factor of it the loss is nearly another, and so has the same rest.
        focused, divisor = lax.integer_pow(part, power), lax.integer_pow(whole, power - 1)
        focused = jnp.where(focused == 0, 0, focused / (divisor * (whole + (power * lost - rest * whole))) * loss)
    return _share(y, alpha) * focused


def _focal_loss_fwd(power: int | None, x: Array, y: Array, alpha: Array | None, gamma: Array) -> Any:
    return _focal_loss(power, x, y, alpha, gamma), (x, y, alpha, gamma)


def _focal_loss_bwd(power: int | None, residuals: Any, g: Array) -> Any:
    x, y, alpha, gamma = residuals
    wide = widen(x)
    p, rest = sigmoid(wide), sigmoid(-wide)
    q = (1 - y) * p + y * rest
    focus, loss, share = _focus(power, q, gamma), _binary_cross_entropy(wide, y, None), _share(y, alpha)
    # σ′/q is a multiple of e^−|x|, but for a hard label on its own side, where q is one too and it cancels.
    e, likely, far = exp(-jnp.abs(wide)), jnp.maximum(p, rest), jnp.where(wide > 0, 1 - y, y)
    of_focus = gamma * likely * jnp.where(far == 0, 1, e / jnp.where(far == 0, 1, far + (1 - far) * e))
    x_bar = share * focus * (_times((1 - 2 * y) * of_focus, loss) + ((1 - y) * p - y * rest))
    # ∂q/∂y = 1 − 2p, and that of the cross-entropy is −x.
    of_labels = _times(gamma * focus * (rest - p), loss / q) - _times(focus, wide)
    y_bar = share * of_labels
    alpha_bar = None
    if alpha is not None:
        y_bar = y_bar + (2 * alpha - 1) * _times(focus, loss)
        alpha_bar = g * (2 * y - 1) * _times(focus, loss)
    log_q = jnp.where(y == 1, -softplus(wide), jnp.where(y == 0, -softplus(-wide), jnp.log(q)))
    gamma_bar = jnp.sum(g * share * _times(focus * loss, log_q))
    return (g * x_bar).astype(x.dtype), g * y_bar, alpha_bar, gamma_bar


_focal_loss.defvjp(_focal_loss_fwd, _focal_loss_bwd)

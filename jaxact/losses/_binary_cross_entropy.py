"""The cross-entropy of independent binary decisions, element by element, with its rule below it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxact._canonical import (
    as_float,
    broadcast,
    canonical_smoothing,
    compute_dtype,
    masked,
    optional_array,
    require_array,
    widen,
)
from jaxact._classes import alike
from jaxact._elementary import exp, log1p_of_fraction
from jaxact._forward_mode import forward_mode
from jaxact._options import times
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
        One loss ≥ 0 per element, in float32 for 16-bit logits; 0 where masked; nan for a label outside [0, 1] by more
        than the four units by which a sum of probabilities may be rounded: what is beyond by less counts as 0 or 1.

    Raises:
        TypeError: if an argument is complex or not an array, `where` not boolean.
        ValueError: if shapes do not fit or an option is out of its range.

    Derivative:
        (1 − y) σ(x) − pos_weight·y·σ(−x); of y, −x, or pos_weight·softplus(−x) − softplus(x); of pos_weight,
        y·softplus(−x). Reverse mode keeps `logits`, and `labels` and `pos_weight` in their shape, in float32 or
        wider; and the mask.

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
    e = canonical_smoothing(label_smoothing)
    logits, labels = require_array("logits", logits), require_array("labels", labels)
    pos_weight, where = optional_array("pos_weight", pos_weight), optional_array("where", where)
    return _binary_cross_entropy_of_any(logits, labels, pos_weight, e, where)


@jax.jit
def _binary_cross_entropy_of_any(
    logits: ArrayLike,
    labels: ArrayLike,
    pos_weight: ArrayLike | None,
    smoothing: ArrayLike | None,
    where: ArrayLike | None,
) -> Array:
    x = masked(as_float("logits", logits), where, 0)
    y = label_probability(labels, x, where)
    if smoothing is not None:
        share = as_float("label_smoothing", smoothing).astype(y.dtype)
        y = (1 - share) * y + share / 2
    weight = None if pos_weight is None else like_logits("pos_weight", pos_weight, x, where, 1)
    return masked(binary_cross_entropy(*alike(x, y, weight)), where, 0)


def label_probability(labels: ArrayLike, x: Array, where: ArrayLike | None) -> Array:
    """The labels of logits `x` in the dtype to compute in; nan outside [0, 1].

    A sum of probabilities may round to a little more than 1, and counts as 1: up to four units of the labels' dtype.
    """
    y = like_logits("labels", labels, x, where, 0)
    beyond = lax.stop_gradient(y - jnp.clip(y, 0, 1))
    unit = float(jnp.finfo(as_float("labels", labels).dtype).eps)
    return jnp.where(jnp.abs(beyond) <= 4 * unit, y - beyond, jnp.nan)


def like_logits(name: str, value: ArrayLike, x: Array, where: ArrayLike | None, fill: float) -> Array:
    """What stands beside logits `x`: in their shape and the dtype to compute in, `fill` where masked."""
    return masked(broadcast(name, value, x.shape, "logits").astype(compute_dtype(x.dtype)), where, fill)


@forward_mode
@jax.custom_vjp
def binary_cross_entropy(x: Array, y: Array, weight: Array | None) -> Array:
    # softplus(−x) and softplus(x) share log(1 + e^−|x|), and one of them is no more than that; no term is negative.
    x = widen(x)
    positive, negative = y if weight is None else weight * y, 1 - y
    both = log1p_of_fraction(exp(-jnp.abs(x)))
    if weight is not None:
        both = (positive + negative) * both
    return both + times(jnp.where(x < 0, positive, negative), jnp.abs(x))


def _binary_cross_entropy_fwd(x: Array, y: Array, weight: Array | None) -> Any:
    return binary_cross_entropy(x, y, weight), (x, y, weight)


def _binary_cross_entropy_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array | None]:
    x, y, weight = residuals
    wide = widen(x)
    positive = y if weight is None else weight * y
    x_bar = g * ((1 - y) * sigmoid(wide) - positive * sigmoid(-wide))
    if weight is None:
        return x_bar.astype(x.dtype), -g * wide, None
    # w softplus(−x) − softplus(x), of which little would be left near x = 0. The two differ by x.
    less = jnp.where(wide < 0, wide, -wide)
    y_bar = g * ((weight - 1) * softplus(less) - jnp.where(wide < 0, times(weight, wide), wide))
    return x_bar.astype(x.dtype), y_bar, g * times(y, softplus(-wide))


binary_cross_entropy.defvjp(_binary_cross_entropy_fwd, _binary_cross_entropy_bwd)

"""Losses over logits, name for name those of `optax.losses`: one value per example, never falsely 0, never nan by
accident, in every mode of differentiation."""

import functools
import math
import operator
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
    canonical_scalar,
    compute_dtype,
    masked,
    require_array,
    require_arrays,
)
from jaxact._cross_entropy import AxisName, Classes, Options, at_index, counts, label_index, label_losses, square_of
from jaxact._exponentials import widen
from jaxact._forward_mode import forward_mode
from jaxact._logsumexp import logsumexp
from jaxact._sigmoid import sigmoid, softplus
from jaxact._softmax import log_softmax


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    temperature: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """−log softmax(logits)[label], one loss per example.

    With z = softcap(logits)/temperature, p = softmax(z), smoothing ε, class weights w and K classes that exist:
    (1 − ε) w_y (−log p_y) + ε/K Σ_c w_c (−log p_c) + z_loss·(log Σ e^z)².

    Args:
        logits: real array; the classes are on `axis`. Integers become the default float.
        labels: integers, with the shape of `logits` without the class axes. Over several axes a label is the flat
            index into them, in the order given.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `logits`, False where a class does not exist; or with the shape of
            `labels`, False where an example does not count.
        ignore_index: the label of examples that do not count.
        temperature: divides the logits; a scalar > 0.
        label_smoothing: ε in [0, 1], spread over the classes that exist.
        z_loss: its coefficient.
        logit_softcap: a positive number C; logits become C·tanh(logits/C) first.
        class_weight: (classes,), one factor for each class, as in PyTorch.
        axis_name: inside `shard_map`, the mesh axis over which the classes are split by hand: `logits`, `where` and
            `class_weight` are then this device's part, and labels count through all parts.

    Returns:
        One loss per label, in float32 for 16-bit logits. 0 for examples that do not count and where no class is left;
        +inf where the label's class is masked or has logit −inf; nan for a label that is out of range.

    Raises:
        TypeError: if `logits` is complex, `labels` or `axis` not integer, `where` not boolean.
        ValueError: if shapes do not fit, `axis` is out of range, or an option is out of its range.

    Derivative:
        (1 − ε) w_y (p − 1[y]) + ε/K (p Σ w − w) + 2·z_loss·(log Σ e^z) p, where the entry at the label is minus the sum
        of the others and not p_y − 1. Reverse mode keeps `logits`, and four numbers for each example.

    Numerics:
        log1p of the sum over all classes but the label's. So the loss keeps its digits when it is small: with logits
        [20, 0] and label 0 it is 2.06e-9, where log Σ e^z − z_y gives 0. Beyond the rounding of z_j − z_y its error is
        at most 4 ulp. Held by `tests/test_losses.py`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxact import losses
        >>> logits = jnp.array([[20.0, 0.0], [1.0, 2.0]])
        >>> loss = losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, -1]), ignore_index=-1)
        >>> print(" ".join(f"{l:.4e}" for l in loss))
        2.0612e-09 0.0000e+00

    References:
        jax issue 40384; Szegedy et al., "Rethinking the Inception Architecture" (2016), for label smoothing.
    """
    options = Options.checked(
        temperature=temperature,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        class_weight=class_weight,
    )
    if ignore_index is not None:
        try:
            ignore_index = operator.index(ignore_index)
        except TypeError:
            raise TypeError(f"ignore_index must be an int or None, got {ignore_index!r}.") from None
    require_arrays(where=where, class_weight=class_weight)
    return _of_integers(
        require_array("logits", logits), require_array("labels", labels), where, options, axis, ignore_index, axis_name
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _of_integers(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    options: Options,
    axis: Axis,
    ignore_index: int | None,
    axis_name: AxisName,
) -> Array:
    x, live = _rows("logits", as_float("logits", logits), where, axis)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without axis {axis}, {x.shape[:-1]}, got {labels.shape}."
        )
    if ignore_index is not None:
        live = counts(labels, ignore_index) if live is None else live & counts(labels, ignore_index)
    dtype = compute_dtype(x.dtype)
    y, exists = label_index(labels, x.shape[-1], axis_name)
    weights = options.weights(x.shape[-1], dtype)
    rows, _ = label_losses(Classes(axis_name), x, y, live, options.spread(weights, dtype), options.adjustment(x))
    loss = options.combine(rows, at_index(weights, y, axis_name))
    # As a factor nan reaches the gradient too.
    return _counted(loss * jnp.where(exists if live is None else exists | ~live, 1, jnp.nan), live)


def _rows(name: str, x: Array, where: ArrayLike | None, axis: Axis) -> tuple[Array, Array | None]:
    """The array with its classes last and flat, −inf where masked; and which rows count, None if all."""
    axes = canonical_axis("axis", axis, x.ndim)
    if isinstance(axis, tuple):
        axes = tuple(a % x.ndim for a in axis)  # in the order given
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    shape = tuple(x.shape[a] for a in batch)
    live = None
    if where is not None and jnp.ndim(where) == len(shape) < x.ndim:
        live = masked(jnp.ones(shape, bool), where, False)
    else:
        x = masked(x, where, -math.inf)
    return x.transpose(batch + axes).reshape(*shape, math.prod(x.shape[a] for a in axes)), live


def _counted(loss: Array, live: Array | None) -> Array:
    return loss if live is None else jnp.where(live, loss, 0)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """−Σ_c labels_c log softmax(logits)_c, one loss per example, for one-hot or soft labels.

    With z = softcap(logits)/temperature, p = softmax(z), smoothing ε, class weights w and K classes that exist:
    −Σ_c w_c ((1 − ε) labels_c + ε/K) log p_c + z_loss·(log Σ e^z)².

    Args:
        logits: real array; the classes are on `axis`. Integers become the default float.
        labels: the probability of each class, broadcastable to the shape of `logits`. They need not sum to 1.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `logits`, False where a class does not exist; or with the shape of
            the result, False where an example does not count.
        temperature: divides the logits; a scalar > 0.
        label_smoothing: ε in [0, 1], spread over the classes that exist.
        z_loss: its coefficient.
        logit_softcap: a positive number C; logits become C·tanh(logits/C) first.
        class_weight: (classes,), one factor for each class, as in PyTorch.

    Returns:
        One loss per example, in float32 for 16-bit logits. 0 for examples that do not count and where no class is left;
        +inf where a label is positive and its class has logit −inf. Masked classes take no part, labels included.

    Raises:
        TypeError: if `logits` or `labels` is complex, `axis` not integer, `where` not boolean.
        ValueError: if shapes do not fit, `axis` is out of range, or an option is out of its range.

    Derivative:
        p Σ q − q with q the smoothed and weighted labels of the classes that are possible; of the labels, −w log p, and
        0 where a class is impossible, because its logit is −inf or another's +inf.
        Reverse mode keeps `logits` in float32 and q, and log p where the labels are differentiated.

    Numerics:
        That of `jaxact.log_softmax`: never falsely 0. Held by `tests/test_losses.py`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact import losses
        >>> print(f"{losses.softmax_cross_entropy(jnp.array([20.0, 0.0]), jnp.array([1.0, 0.0])):.4e}")
        2.0612e-09

    References:
        optax issues 896 and 1762: nan at −inf.
    """
    options = Options.checked(
        temperature=temperature,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        class_weight=class_weight,
    )
    require_arrays(where=where, class_weight=class_weight)
    return _of_probabilities(require_array("logits", logits), require_array("labels", labels), where, options, axis)


@functools.partial(jax.jit, static_argnums=4)
def _of_probabilities(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None, options: Options, axis: Axis
) -> Array:
    wide = as_float("logits", logits)
    labels = _broadcast("labels", labels, wide)
    x, live = _rows("logits", wide, where, axis)
    # A masked class leaves no trace, its label included.
    q, _ = _rows("labels", labels if live is not None else masked(labels, where, 0), None, axis)
    if live is not None:
        x, q = jnp.where(live[..., None], x, 0), jnp.where(live[..., None], q, 0)
    z = options.adjustment(x)(x)
    q, weights, exists = q.astype(z.dtype), options.weights(x.shape[-1], z.dtype), z != -jnp.inf
    if options.label_smoothing is not None:
        count = jnp.maximum(jnp.sum(exists, -1, keepdims=True, dtype=z.dtype), 1)
        q = (1 - options.label_smoothing) * q + jnp.where(exists, options.label_smoothing / count, 0)
    if weights is not None:
        q = q * weights
    log_p = log_softmax(z)
    impossible = log_p == -jnp.inf
    hopeless = jnp.any((q != 0) & impossible, -1) & jnp.any(exists, -1)
    loss = jnp.where(hopeless, jnp.inf, 0) - jnp.sum(q * jnp.where(impossible, 0, log_p), -1)
    if options.z_loss is not None:
        loss = loss + options.z_loss * square_of(logsumexp(z, axis=-1))
    return _counted(loss, live)


def _broadcast(name: str, value: ArrayLike, logits: Array) -> Array:
    array = as_float(name, value)
    try:
        return jnp.broadcast_to(array, logits.shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the shape {logits.shape} of logits, got {array.shape}.") from None


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
    weight = None if pos_weight is None else masked(_broadcast("pos_weight", pos_weight, x).astype(y.dtype), where, 1)
    loss = _binary_cross_entropy(x, y, weight)
    return loss if where is None else masked(loss, where, 0)


def _probability(labels: ArrayLike, x: Array, where: ArrayLike | None) -> Array:
    """The labels of logits `x` in the dtype to compute in; nan outside [0, 1]."""
    y = masked(_broadcast("labels", labels, x).astype(compute_dtype(x.dtype)), where, 0)
    return jnp.where((y >= 0) & (y <= 1), y, jnp.nan)


@forward_mode
@jax.custom_vjp
def _binary_cross_entropy(x: Array, y: Array, weight: Array | None) -> Array:
    # softplus(−x) and softplus(x) share log(1 + e^−|x|); no term is negative.
    x = widen(x)
    positive, negative = y if weight is None else weight * y, 1 - y
    both = jnp.log1p(jnp.exp(-jnp.abs(x)))
    return (positive + negative) * both + _times(positive, jnp.maximum(-x, 0)) + _times(negative, jnp.maximum(x, 0))


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
        Relatively accurate for y = 0 and 1 as far as the rounding of γ·x allows, and right at ±inf.
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
    a = None if alpha is None else masked(_broadcast("alpha", alpha, x).astype(y.dtype), where, 0)
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
    q = (1 - y) * sigmoid(widen(x)) + y * sigmoid(-widen(x))
    return _share(y, alpha) * _times(_focus(power, q, gamma), _binary_cross_entropy(x, y, None))


def _focal_loss_fwd(power: int | None, x: Array, y: Array, alpha: Array | None, gamma: Array) -> Any:
    return _focal_loss(power, x, y, alpha, gamma), (x, y, alpha, gamma)


def _focal_loss_bwd(power: int | None, residuals: Any, g: Array) -> Any:
    x, y, alpha, gamma = residuals
    wide = widen(x)
    p, rest = sigmoid(wide), sigmoid(-wide)
    q = (1 - y) * p + y * rest
    focus, loss, share = _focus(power, q, gamma), _binary_cross_entropy(wide, y, None), _share(y, alpha)
    # σ′/q is a multiple of e^−|x|, but for a hard label on its own side, where q is one too and it cancels.
    e, likely, far = jnp.exp(-jnp.abs(wide)), jnp.maximum(p, rest), jnp.where(wide > 0, 1 - y, y)
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

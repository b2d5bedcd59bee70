"""Cross-entropies of a softmax over logits, with integer labels and with probabilities."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.typing import ArrayLike

from jaxact._canonical import (
    Axis,
    as_float,
    broadcast,
    canonical_axis,
    canonical_int,
    canonical_mask,
    compute_dtype,
    masked,
    optional_array,
    require_array,
    require_labels,
    static_axis,
)
from jaxact._classes import (
    AxisName,
    Classes,
    alike,
    as_divided,
    as_row,
    at_index,
    integer_labels,
    label_index,
    not_ignored,
    static_axis_name,
    vary,
    varying,
)
from jaxact._cross_entropy import label_losses
from jaxact._logsumexp import logsumexp
from jaxact._options import Options, square_of, times
from jaxact._soft_cross_entropy import soft_losses


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
) -> Array:
    """−log softmax(logits)[label], one loss per example.

    With z = softcap(logits)/temperature, p = softmax(z), smoothing ε, class weights w and K classes that exist:
    (1 − ε) w_y (−log p_y) + ε/K Σ_c w_c (−log p_c) + z_loss·(log Σ e^z)².

    Args:
        logits: real array; the classes are on `axis`. Integers become the default float.
        labels: integers, with the shape of `logits` without the class axes. Over several axes a label is the flat
            index into them, in the order given.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `logits`, False where a class does not exist; or, with as many
            dimensions as `labels`, broadcastable to them, False where an example does not count. So with logits
            (batch, classes) a mask of classes is given as `where[None]`.
        ignore_index: the label of examples that do not count.
        temperature: divides the logits; a scalar > 0.
        label_smoothing: ε in [0, 1], spread over the classes that exist.
        z_loss: the coefficient of (log Σ e^z)².
        logit_softcap: a positive number C ≤ 1e37; logits become C·tanh(logits/C) first.
        class_weight: (classes,), one factor for each class, as in PyTorch.
        axis_name: inside `shard_map`, the mesh axis over which the classes are split by hand: `logits`, `where` and
            `class_weight` are then this device's part, and labels count through all parts. With check_vma=False take
            gradients inside it; forward mode needs check_vma.

    Returns:
        One loss per label, in float32 for 16-bit logits. 0 for examples that do not count and where no class is left;
        +inf where the label's class is masked or has logit −inf, or another's is +inf or the largest number; nan for a
        label that is out of range.

    Raises:
        TypeError: if `logits` is complex, `labels` or `axis` not integer, `where` not boolean.
        ValueError: if shapes do not fit, `axis` is out of range, or an option that is not traced is out of its range.

    Derivative:
        Of z, (1 − ε) w_y (p − 1[y]) + ε/K (p Σ w − w) + 2·z_loss·(log Σ e^z) p, where the entry at the label is minus
        the sum of the others and not p_y − 1. Reverse mode keeps `logits`, and of each example four numbers, with
        options up to twenty, and whether its label exists; with a mask that too.

    Numerics:
        log1p of the sum over all classes but the label's. So the loss keeps its digits when it is small: with logits
        [20, 0] and label 0 it is 2.06e-9, where log Σ e^z − z_y gives 0. Of z, which temperature and cap round, it has
        at most 8 ulp at any scale, and its gradient 16·u of each entry, as hardly a logit is rounded when it is
        shifted; but a class whose logit is 87 or more (708 in float64) below the label's is lost, and XLA's sum of a
        row may lose more, as `softmax` says: 15 ulp and 27·u have been seen. Held by `tests/test_losses.py`.

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
    options = Options(temperature, label_smoothing, z_loss, logit_softcap, class_weight).checked()
    if ignore_index is not None:
        ignore_index = canonical_int("ignore_index", ignore_index)
    logits, labels = require_array("logits", logits), require_labels("labels", labels)
    where = optional_array("where", where)
    return _of_integers(logits, labels, where, options, static_axis(axis), ignore_index, static_axis_name(axis_name))


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
    x, live = _rows(as_float("logits", logits), where, axis)
    labels = integer_labels(labels, x.shape[:-1], f"logits without axis {axis}")
    if ignore_index is not None:
        live = not_ignored(labels, ignore_index) if live is None else live & not_ignored(labels, ignore_index)
    dtype = compute_dtype(x.dtype)
    options = options.in_dtype(dtype)
    x = vary(x, varying(labels))  # they may be constant where the labels are not
    y, exists = label_index(labels, x.shape[-1], axis_name)
    weights = options.weights(x.shape[-1], dtype)
    if weights is not None:
        divided = [s.mesh for s in (jax.typeof(x).sharding, jax.typeof(weights).sharding) if any(s.spec)]
        if divided:  # the label's weight may be on any device
            weights = jax.sharding.reshard(weights, NamedSharding(divided[0], P(None)))
    smoothing, classes = options.smoothing_weights(weights, dtype), Classes(axis_name)
    adjust = options.adjustment_about_maximum(x, live, classes)
    rows, _ = label_losses(classes, x, y, live, smoothing, adjust, False)
    if options.z_loss is not None:
        rows = rows._replace(lse=rows.lse + adjust.shift)
    label_weight = at_index(weights, y, axis_name)
    if label_weight is not None:
        label_weight = as_divided(label_weight, rows.nll)
    loss = _nan_unless(exists if live is None else exists | ~live, options.combine(rows, label_weight))
    return masked(loss, live, 0)


@functools.partial(jax.checkpoint, prevent_cse=False)  # what is kept is the condition, and not the factor
def _nan_unless(condition: Array, loss: Array) -> Array:
    # As a factor nan reaches the gradient too.
    return loss * jnp.where(condition, 1, jnp.nan)


def _rows(x: Array, where: ArrayLike | None, axis: Axis) -> tuple[Array, Array | None]:
    """The array with its classes last and flat, −inf where masked; and which rows count, None if all."""
    axes = canonical_axis(axis, x.ndim)
    if isinstance(axis, tuple):
        axes = tuple(a % x.ndim for a in axis)  # in the order given
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    shape = tuple(x.shape[a] for a in batch)
    live = None
    if where is not None and jnp.ndim(where) == len(shape) < x.ndim:
        live = canonical_mask(where, shape, "the rows (a mask of classes is given as `where[None]`)")
    else:
        x = masked(x, where, -math.inf, "logits")
    x = x.transpose(batch + axes)
    spec = jax.typeof(x).sharding.spec
    if any(spec[len(batch) + 1 :]):  # JAX merges axes of which the first alone is divided
        undivided = P(*spec[: len(batch) + 1], *[None] * (len(axes) - 1))
        x = jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, undivided))
    return x.reshape(*shape, math.prod(x.shape[len(batch) :])), live


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
) -> Array:
    """−Σ_c labels_c log softmax(logits)_c, one loss per example, for one-hot or soft labels.

    With z = softcap(logits)/temperature, p = softmax(z), smoothing ε, class weights w and K classes that exist:
    −Σ_c w_c ((1 − ε) labels_c + ε/K) log p_c + z_loss·(log Σ e^z)².

    Args:
        logits: real array; the classes are on `axis`. Integers become the default float.
        labels: the probability of each class, broadcastable to the shape of `logits`. They need not sum to 1.
        axis: the class axis or axes: an int, a tuple of ints, or None for all.
        where: boolean, broadcastable to the shape of `logits`, False where a class does not exist; or, with as many
            dimensions as the result, broadcastable to it, False where an example does not count. So with logits
            (batch, classes) a mask of classes is given as `where[None]`.
        temperature: divides the logits; a scalar > 0.
        label_smoothing: ε in [0, 1], spread over the classes that exist.
        z_loss: the coefficient of (log Σ e^z)².
        logit_softcap: a positive number C ≤ 1e37; logits become C·tanh(logits/C) first.
        class_weight: (classes,), one factor for each class, as in PyTorch.

    Returns:
        One loss per example, in float32 for 16-bit logits. 0 for examples that do not count and where no class is left;
        +inf where a label is positive and its class has logit −inf, or another's is +inf or the largest number. Masked
        classes take no part, labels included.

    Raises:
        TypeError: if `logits` or `labels` is complex, `axis` not integer, `where` not boolean.
        ValueError: if shapes do not fit, `axis` is out of range, or an option that is not traced is out of its range.

    Derivative:
        Of z, p Σ q − q + 2·z_loss·(log Σ e^z) p with q the smoothed and weighted labels of the classes that exist; of
        the labels, −(1 − ε) w log p, and 0 where a class is impossible, because its logit is −inf or another's +inf.
        Reverse mode keeps `logits` and `labels` as they are, and up to three numbers for each example; with a mask or
        options q instead of `labels`, adjusted logits in float32, and the mask.

    Numerics:
        The distance of each logit from the maximum, and log1p of the sum over all classes but one at the maximum. Of
        one-hot labels at most 14 ulp beyond the rounding of x − m, but for the sums that `softmax` speaks of; and of a
        class that is 87 or more (708 in float64) below the maximum only the distance counts. Held by
        `tests/test_losses.py`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact import losses
        >>> print(f"{losses.softmax_cross_entropy(jnp.array([20.0, 0.0]), jnp.array([1.0, 0.0])):.4e}")
        2.0612e-09

    References:
        optax issues 896 and 1762: nan at −inf.
    """
    options = Options(temperature, label_smoothing, z_loss, logit_softcap, class_weight).checked()
    logits, labels = require_array("logits", logits), require_array("labels", labels)
    where = optional_array("where", where)
    return _of_probabilities(logits, labels, where, options, static_axis(axis))


@functools.partial(jax.jit, static_argnums=4)
def _of_probabilities(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None, options: Options, axis: Axis
) -> Array:
    wide = as_float("logits", logits)
    labels = broadcast("labels", labels, wide.shape, "logits")
    x, live = _rows(wide, where, axis)
    # A masked class leaves no trace, its label included.
    q, _ = _rows(labels if live is not None else masked(labels, where, 0), None, axis)
    if live is not None:
        x, q = (masked(a, live[..., None], 0) for a in (x, q))
    dtype = compute_dtype(x.dtype)
    options = options.in_dtype(dtype)
    adjust = options.adjustment_about_maximum(x, live, Classes())
    # Logits of 16 bits that are not adjusted are kept as they are, unless two cotangents would be rounded apart.
    # (Of an adjustment JAX would keep what each of its steps needs, which the logits tell again.)
    adjusted = jax.checkpoint(lambda x, adjust: adjust(x), prevent_cse=False)
    z = x if adjust.is_identity and options.z_loss is None else adjusted(x, adjust)
    weights, exists = options.weights(x.shape[-1], dtype), z != -jnp.inf
    if options.label_smoothing is not None:
        count = jnp.maximum(jnp.sum(exists, -1, keepdims=True, dtype=dtype), 1)
        q = (1 - options.label_smoothing) * q.astype(dtype) + jnp.where(exists, options.label_smoothing / count, 0)
    if weights is not None:
        q = q.astype(dtype) * as_row(weights, q.ndim)
    loss, _ = soft_losses(*alike(z, q))
    if options.z_loss is not None:
        loss = loss + times(options.z_loss, square_of(logsumexp(z, axis=-1) + adjust.shift))
    return masked(loss, live, 0)
